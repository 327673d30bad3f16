"""Direct preference optimisation (DPO, arXiv 2305.18290) as a loss per token, over pairs that lie anywhere.

    margin  m = beta [(S_c - S_c^ref) - (S_r - S_r^ref)],  S a response's sum of log-probs;  L = -log sigma(m)

The loss of a pair is a function of two whole sequences, which may lie in two micro-batches on two ranks. Before the
update every pair's margin is summed over all ranks; then a token's loss is a constant, its share of L, plus

    -beta sigma(-m) s (l - sg(l)),   s = +1 in the chosen response, -1 in the rejected one

whose gradient is exactly DPO's at the weights that scored it. So the weights must not move in between: one update
per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from megatron_chord.losses.policy import logprob_gap_stats
from megatron_chord.losses.terms import AcrossRanks, Term, TermOutput, TermTokens, TokenStats, segment_sums


def dpo_term(*, beta: float, max_pairs: int, pool: str = "dpo") -> Term:
    """The mean over pairs of DPO's loss. Every pair has two sequences, and both are in the same update.

    Columns: pair (an index below ``max_pairs``), sign (+1 chosen, -1 rejected), is_rollout (1 for tokens that the
    present policy sampled, else 0), rollout_logprob (0 where is_rollout is 0).
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
    """Each token's slope and its share of its pair's numbers; one all-reduce of [3, max_pairs].

    The pool counts sequences, two to a pair, so the mean over pairs is 2 times its ``seq-mean-token-sum``.
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
    """[n, max_pairs]: sums of ``values`` [K, n] over each pair's tokens that are here.

    First over each sequence, in order; then the one or two sequences of a pair, whose sum is the same in either order.
    So the atomics with which CUDA adds at an index cannot change a bit, and all tensor-parallel ranks get the same.

    Args:
        pair: [K], of each token.
        held: [S], the tokens of each sequence, which lie together in the sequences' order.
    """
    sums = values.new_zeros(max_pairs, values.shape[1])
    if len(values) > 0:
        # A sequence without a token here adds 0, to whichever pair.
        first = (held.cumsum(0) - held).clamp(max=len(values) - 1)
        sums.index_add_(0, pair[first], segment_sums(values, held))
    return sums.t()


def dpo_loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
    """Sums to the pairs' mean loss, with its gradient; columns as ``pair_columns`` gives them.

    The gap to the rollout engine's log-probs is the mean over the tokens that the present policy sampled.
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
