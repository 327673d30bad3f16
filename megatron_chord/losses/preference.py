"""Direct preference optimisation (DPO, arXiv 2305.18290) as a loss per token.

    margin  m = beta [(S_c - S_c^ref) - (S_r - S_r^ref)],  S = sum of a response's log-probs;  L = -log sigma(m)

The loss of a pair is a function of two whole sequences. These may lie in different micro-batches and on different
ranks. So every pair's margin is summed over all ranks before the update. The loss of a token is then its share of L,
a constant, plus

    -beta sigma(-m) s (l - sg(l)),   s = +1 in the chosen response, -1 in the rejected one

The gradient of this sum is exactly DPO's gradient at the weights with which the margins were computed. So the weights
must not change between the two, and a step can have one update only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from megatron_chord.losses.policy import logprob_gap_stats
from megatron_chord.losses.terms import AcrossRanks, Term, TermOutput, TermTokens, TokenStats, segment_sums


def dpo_term(*, beta: float, max_pairs: int, pool: str = "dpo") -> Term:
    """The mean of DPO's loss over pairs. Every pair has two sequences, and both are in the same update.

    Columns: pair (an index below ``max_pairs``), sign (+1 chosen, -1 rejected), is_rollout (1 for tokens that the
    current policy sampled, else 0), rollout_logprob (0 if is_rollout is 0).
    """

    def prepare(batches: Sequence[TermTokens], across: AcrossRanks) -> list[Mapping[str, Tensor]]:
        return pair_columns(batches, across, beta=beta, max_pairs=max_pairs)

    return Term(
        loss=dpo_loss,
        pool=pool,
        aggregation="seq-mean-token-sum",
        scored=frozenset({"old_logprob", "reference_logprob"}),
        prepare=prepare,
    )


def pair_columns(
    batches: Sequence[TermTokens], across: AcrossRanks, *, beta: float, max_pairs: int
) -> list[Mapping[str, Tensor]]:
    """For each token the slope of its loss, and its share of the loss and metrics of its pair.

    The pool counts sequences, and a pair has two. So the mean over pairs is 2 times the pool's ``seq-mean-token-sum``.
    Collectives: one all-reduce of [3, max_pairs].
    """

    def joined(name: str) -> Tensor:
        return torch.cat([batch[name] for batch in batches])

    log_ratios = joined("sign").double() * (joined("old_logprob") - joined("reference_logprob")).double()
    counted = torch.stack([log_ratios, torch.ones_like(log_ratios), joined("is_rollout").double()], dim=1)
    held = torch.cat([batch.held for batch in batches])
    sums = pair_sums(counted, joined("pair").long(), held, max_pairs)
    log_ratio, length, num_sampled = across.sum(sums)
    margin = beta * log_ratio
    share = 2 / length.clamp(min=1)
    gap_weight = length.sum() / num_sampled.sum().clamp(min=1)

    def of_tokens(batch: TermTokens) -> dict[str, Tensor]:
        pair = batch["pair"].long()
        slope = -2 * beta * torch.sigmoid(-margin)[pair].float() * batch["sign"]
        return {
            "slope": slope,
            "loss_share": (share * softplus(-margin))[pair].float(),
            "margin_share": (share * margin)[pair].float(),
            "accuracy_share": (share * (margin > 0))[pair].float(),
            "gap_weight": gap_weight.float() * batch["is_rollout"],
        }

    return [of_tokens(batch) for batch in batches]


def pair_sums(values: Tensor, pair: Tensor, held: Tensor, max_pairs: int) -> Tensor:
    """[n, max_pairs]: sums of ``values`` [K, n] over the tokens of each pair that this rank holds.

    The values are first summed over each sequence, in order. Then the one or two sequence sums of a pair are added; the
    result does not depend on their order. CUDA adds at an index with atomics in any order, which therefore cannot
    change a bit of the result, and all tensor-parallel ranks get the same bits.

    Args:
        pair: [K], the pair of each token.
        held: [S], the number of tokens of each sequence. A sequence's tokens are contiguous, in the order of the
            sequences.
    """
    sums = values.new_zeros(max_pairs, values.shape[1])
    if len(values) > 0:
        # A sequence without a token on this rank adds 0 to an arbitrary pair.
        first = (held.cumsum(0) - held).clamp(max=len(values) - 1)
        sums.index_add_(0, pair[first], segment_sums(values, held))
    return sums.t()


def dpo_loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
    """DPO's loss per token: its sum is the mean loss over pairs and has the gradient of that mean.

    The columns are those of ``pair_columns``. The gap to the rollout engine's log-probs is a mean over the tokens that
    the current policy sampled.
    """
    logprobs = stats.logprobs
    loss = tokens["loss_share"] + tokens["slope"] * (logprobs - logprobs.detach())
    apart = logprob_gap_stats(logprobs, tokens["rollout_logprob"])
    return TermOutput(
        loss,
        {
            "dpo_loss": loss.detach(),
            "dpo_margin": tokens["margin_share"],
            "dpo_accuracy": tokens["accuracy_share"],
        },
        {
            "entropy": stats.entropy.detach(),
            **{name: values * tokens["gap_weight"] for name, values in apart.items()},
        },
        {"logprob_gap_max": apart["logprob_gap"] * tokens["is_rollout"]},
    )


# ---- all pairs of a group


def alignment_columns(
    batches: Sequence[TermTokens],
    across: AcrossRanks,
    *,
    beta: float,
    max_groups: int,
    max_members: int,
    with_reference: bool,
) -> list[Mapping[str, Tensor]]:
    """The columns of the group alignment loss (GAL, arXiv 2604.08926): DPO's loss over all pairs of a right and a wrong
    answer of a group, averaged over the group's pairs and then over groups.

        GAL = mean over groups of mean over pairs of -log sigma(beta (S_right - S_wrong))

    S is the sum of an answer's log-probs, or with ``with_reference`` of its log-ratios to the reference policy. As in
    ``dpo_loss``, the sum over tokens of ``alignment_slope`` x log p has GAL's gradient at the weights with which S was
    computed, and the sum of ``alignment_share`` is GAL. ``alignment_accuracy_share`` sums up to the share of pairs with
    S_right > S_wrong, averaged in the same way. A group whose answers are all of one kind has zeros.

    Columns: group (below ``max_groups``), member (below ``max_members``), sign (+1 right, -1 wrong), old_logprob, and
    reference_logprob with ``with_reference``. Each answer is one sequence.

    Collectives: one all-reduce of [4, max_groups x max_members].
    """

    def joined(name: str) -> Tensor:
        return torch.cat([batch[name] for batch in batches])

    def slots(tokens: TermTokens) -> Tensor:
        return tokens["group"].long() * max_members + tokens["member"].long()

    log_ratios = joined("old_logprob").double()
    if with_reference:
        log_ratios = log_ratios - joined("reference_logprob").double()
    sign = joined("sign").double()
    counted = torch.stack([log_ratios, torch.ones_like(log_ratios), sign > 0, sign < 0], dim=1)
    held = torch.cat([batch.held for batch in batches])
    slot = torch.cat([slots(batch) for batch in batches])
    found = across.sum(pair_sums(counted, slot, held, max_groups * max_members))
    log_ratio, length, right, wrong = found.view(4, max_groups, max_members)
    is_pair = ((right > 0)[:, :, None] & (wrong > 0)[:, None, :]).double()
    margin = beta * (log_ratio[:, :, None] - log_ratio[:, None, :])
    num_pairs = is_pair.sum((1, 2))
    num_groups = (num_pairs > 0).sum().clamp(min=1)
    share = is_pair / (num_pairs.clamp(min=1) * num_groups)[:, None, None]  # of a pair in the mean
    push = beta * share * torch.sigmoid(-margin)
    slope = (push.sum(1) - push.sum(2)).flatten()
    tokens_of_group = length.sum(1).clamp(min=1)
    loss = (share * softplus(-margin)).sum((1, 2)) / tokens_of_group
    accuracy = (share * (margin > 0)).sum((1, 2)) / tokens_of_group

    def of_tokens(batch: TermTokens) -> dict[str, Tensor]:
        group = batch["group"].long()
        return {
            "alignment_slope": slope[slots(batch)].float(),
            "alignment_share": loss[group].float(),
            "alignment_accuracy_share": accuracy[group].float(),
        }

    return [of_tokens(batch) for batch in batches]
