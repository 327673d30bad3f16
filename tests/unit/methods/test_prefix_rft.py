"""Prefix-RFT: which tokens are given, the advantages of prefix and continuation, and which tokens are trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_chord.config import ObjectiveConfig, RunConfig
from megatron_chord.config_methods import PrefixRFTConfig
from megatron_chord.losses.terms import TermTokens, TokenStats, empty_output
from megatron_chord.methods.groups import make_group
from megatron_chord.methods.prefix_rft import (
    PrefixRFT,
    continuation_advantages,
    hybrid_samples,
    keep_most_uncertain,
    prefix_loss,
    prefix_of,
    prefix_share,
)
from megatron_chord.methods.table import method_of
from megatron_chord.schedules import ScheduleInput
from tests.support.scripted import ScriptedContext, graded, prompt
from tests.support.tiny import terms_of, tiny_run
from tests.unit.methods.guided import assert_refused

DEMONSTRATION = tuple(range(100, 110))


def run_of(*, rollouts: int = 3, prompts: int = 3, **changes: Any) -> RunConfig:
    run = tiny_run(Path("model"), method="prefix_rft", **changes)
    return replace(
        run,
        data=replace(run.data, aligned=True),
        batch=replace(run.batch, rollouts=rollouts, prompts=prompts, demonstrations=0),
    )


# ---- the prefix


@pytest.mark.parametrize(
    ("share", "length", "expected"),
    [
        (0.5, 10, 5),
        (0.59, 10, 5),
        (0.05, 10, 0),
        (0.95, 10, 9),
        # 19 of 20 tokens: all but the stop token.
        (0.95, 20, 19),
        (0.95, 1, 0),
        (0.999999, 3, 2),
    ],
)
def test_prefix_length(share: float, length: int, expected: int) -> None:
    assert prefix_of(range(length), share) == tuple(range(expected))


def test_shares_are_uniform_and_a_function_of_seed_and_position() -> None:
    shares = [prefix_share(7, position, low=0.2, high=0.8) for position in range(2000)]
    assert shares == [prefix_share(7, position, low=0.2, high=0.8) for position in range(2000)]
    assert shares != [prefix_share(8, position, low=0.2, high=0.8) for position in range(2000)]
    assert min(shares) >= 0.2
    assert max(shares) <= 0.8
    # The mean is 0.5. One draw has the standard deviation 0.6 / sqrt(12) = 0.173, the mean of 2000 has 0.0039.
    assert abs(sum(shares) / 2000 - 0.5) < 4 * 0.0039
    for low in (0.2, 0.4, 0.6):
        assert abs(sum(low <= share < low + 0.2 for share in shares) - 2000 / 3) < 4 * 21.1
    assert prefix_share(7, 3, low=0.95, high=0.95) == 0.95


@pytest.mark.parametrize(
    ("step", "expected"),
    # Half a cosine over 4 steps: 0.05 + 0.9 x (1, 0.8535534, 0.5, 0.1464466, 0), and then 0.05.
    [(0, 0.95), (1, 0.8181981), (2, 0.5), (3, 0.1818019), (4, 0.05), (9, 0.05)],
)
def test_the_shortest_prefix_decays_along_half_a_cosine(step: int, expected: float) -> None:
    method = PrefixRFT(settings=PrefixRFTConfig(decay_steps=4))
    assert method.lowest_share(ScheduleInput(step=step), steps=10) == pytest.approx(expected, abs=1e-6)


def test_the_decay_takes_the_whole_run_unless_told() -> None:
    assert PrefixRFT().lowest_share(ScheduleInput(step=5), steps=10) == pytest.approx(0.5)
    assert PrefixRFT().lowest_share(ScheduleInput(step=10), steps=10) == pytest.approx(0.05)


# ---- advantages


def test_a_hybrid_earns_its_reward_and_its_prefix_what_it_gained() -> None:
    group = make_group(graded(prompt("a"), (1.0, 0.0, 0.0, 0.0)))
    assert group is not None
    hybrid = graded(prompt("a"), (1.0,), prefix=(90, 91, 92))
    (sample,) = hybrid_samples([hybrid], [group], hybrids_per_prompt=1, objective=ObjectiveConfig())
    assert sample.token_ids.tolist() == [5, 6, 90, 91, 92, 20, 21]
    prefix, continuation = sample.parts
    assert (prefix.term, prefix.positions.tolist()) == ("prefix", [2, 3, 4])
    assert prefix.constants == {"advantage": 0.75}
    assert (continuation.term, continuation.positions.tolist()) == ("policy", [5, 6])
    assert continuation.constants["advantage"] == 1.0
    assert continuation.constants["rollout_logprob"] == pytest.approx([-0.5, -1.0])


def test_a_hybrid_that_fails_punishes_its_prefix_by_the_groups_mean() -> None:
    group = make_group(graded(prompt("a"), (1.0, 1.0, 0.0, 0.0)))
    assert group is not None
    hybrid = graded(prompt("a"), (0.0,), prefix=(90,))
    (sample,) = hybrid_samples([hybrid], [group], hybrids_per_prompt=1, objective=ObjectiveConfig())
    assert [part.constants["advantage"] for part in sample.parts] == [-0.5, 0.0]


def test_several_hybrids_of_a_prefix_are_a_group_and_share_its_gain() -> None:
    # Rewards 1, 0, 0 (one grading failed of four): mean 1/3; against the unprefixed mean 0.25, a quarter each.
    group = make_group(graded(prompt("a"), (0.5, 0.0)))
    assert group is not None
    hybrids = graded(prompt("a"), (1.0, None, 0.0, 0.0), prefix=(90,))
    objective = ObjectiveConfig(advantage="group_mean")
    samples = hybrid_samples([hybrids], [group], hybrids_per_prompt=4, objective=objective)
    assert [sample.parts[0].constants["advantage"] for sample in samples] == [0.1875, -0.0625, -0.0625]
    found = [sample.parts[1].constants["advantage"] for sample in samples]
    assert found == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert [sample.token_ids.tolist()[-2:] for sample in samples] == [[20, 21], [40, 41], [50, 51]]


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "batch_std", "leave_one_out"])
def test_groups_of_none_and_one_and_many(kind: Any) -> None:
    found = continuation_advantages([(), (0.7,), (1.0, 1.0)], ObjectiveConfig(advantage=kind))
    assert found == [(), (0.7,), (0.0, 0.0)]


def test_truncated_hybrids_are_masked_where_asked() -> None:
    group = make_group(graded(prompt("a"), (1.0, 0.0)))
    assert group is not None
    hybrid = graded(prompt("a"), (1.0,), prefix=(90,), finish_reason="length")
    counts = [
        len(
            hybrid_samples(
                [hybrid], [group], hybrids_per_prompt=1, objective=ObjectiveConfig(truncated=truncated)
            )
        )
        for truncated in ("keep", "mask")
    ]
    assert counts == [1, 0]


# ---- a step


def test_a_step() -> None:
    # Step 0 of the published schedule: every prefix has exactly 95 % of its demonstration, 9 of 10 tokens.
    scores: dict[tuple[str, str], Any] = {("", name): (1.0, 0.0) for name in "abc"}
    scores |= {("hybrid", "a"): (1.0,), ("hybrid", "b"): (0.0,), ("hybrid", "c"): (None,)}
    context: Any = ScriptedContext(
        run=run_of(advantage="group_mean"),
        scores=scores,
        demonstrations=dict.fromkeys("abc", DEMONSTRATION),
    )
    collected = PrefixRFT().collect(context)
    assert [(attempt, samples) for attempt, _, samples in context.asked] == [("", 2), ("hybrid", 1)]
    assert collected.weights == {"policy": 1.0, "prefix": 1.0}
    assert [len(sample.parts) for sample in collected.samples] == [1] * 6 + [2] * 2
    assert collected.samples[6].token_ids.tolist() == [5, 6, *DEMONSTRATION[:9], 20, 21]
    advantages = [[part.constants["advantage"] for part in sample.parts] for sample in collected.samples]
    assert advantages == [[0.5], [-0.5]] * 3 + [[0.5, 1.0], [-0.5, 0.0]]
    # The two hybrids whose grading succeeded.
    assert collected.stats["hybrid_reward_mean"] == 0.5
    assert collected.stats["reward_mean"] == 0.5
    assert collected.stats["prefix_low"] == pytest.approx(0.95)
    assert collected.stats["prefix_share"] == pytest.approx(0.9)


def test_hybrids_follow_the_groups_that_are_left() -> None:
    """b has no group, so it has no hybrid. a and c have one each."""
    scores: dict[tuple[str, str], Any] = {
        ("", "a"): (1.0, 0.0),
        ("", "b"): (None, 0.0),
        ("", "c"): (1.0, 1.0),
        ("hybrid", "a"): (1.0,),
        ("hybrid", "c"): (1.0,),
    }
    demonstrations = {name: tuple(range(start, start + 10)) for name, start in (("a", 100), ("c", 300))}
    context: Any = ScriptedContext(run=run_of(), scores=scores, demonstrations=demonstrations)
    collected = PrefixRFT().collect(context)
    assert [item.prompt.id for item in context.asked[1][1]] == ["a", "c"]
    assert [sample.token_ids.tolist()[2] for sample in collected.samples[-2:]] == [100, 300]
    assert [sample.parts[0].constants["advantage"] for sample in collected.samples[-2:]] == [0.5, 0.0]


def test_a_step_is_the_same_when_it_is_collected_again() -> None:
    scores: dict[tuple[str, str], Any] = {("", name): (1.0, 0.0) for name in "abc"}
    scores |= {("hybrid", name): (1.0,) for name in "abc"}

    def collect() -> list[list[int]]:
        context: Any = ScriptedContext(
            run=run_of(), scores=scores, demonstrations=dict.fromkeys("abc", DEMONSTRATION), step=5
        )
        return [sample.token_ids.tolist() for sample in PrefixRFT().collect(context).samples]

    assert collect() == collect()
    assert len({len(ids) for ids in collect()[6:]}) > 1


# ---- the loss


def tokens_of(**columns: Any) -> TermTokens:
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    count = len(next(iter(tensors.values())))
    return TermTokens(
        index=torch.arange(count),
        sequence=torch.zeros(count, dtype=torch.int64),
        lengths=torch.tensor([float(count)]),
        held=torch.tensor([count]),
        columns=tensors,
    )


def test_only_the_most_uncertain_of_the_whole_update_are_kept() -> None:
    # 7 tokens in two micro-batches here, 3 on another rank: the 20 % of 10 are the 2 with 0.9 and 0.8.
    here = [tokens_of(old_entropy=[0.1, 0.9, 0.2, 0.3]), tokens_of(old_entropy=[0.7, 0.0, 0.4])]
    elsewhere = torch.tensor([0.8, 0.5, 0.6])
    across: Any = SimpleNamespace(collect=lambda values: torch.cat([values, elsewhere]))
    kept = [columns["kept"].tolist() for columns in keep_most_uncertain(0.2)(here, across)]
    assert kept == [[0, 1, 0, 0], [0, 0, 0]]
    kept = [columns["kept"].tolist() for columns in keep_most_uncertain(0.31)(here, across)]
    assert kept == [[0, 1, 0, 0], [1, 0, 0]]
    assert [columns["kept"].tolist() for columns in keep_most_uncertain(1.0)(here, across)] == [
        [1] * 4,
        [1] * 3,
    ]


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "cispo", "unclipped"])
@pytest.mark.parametrize("ratio_from", ["rollout", "current"])
def test_a_prefix_is_on_policy_in_its_ratio(surrogate: Any, ratio_from: Any) -> None:
    """d L / d l = -A for every l: the demonstration's probabilities have no effect. The filtered token has no
    gradient."""
    logprobs = torch.tensor([-0.1, -7.0, -2.0], requires_grad=True)
    tokens = tokens_of(advantage=[0.5, -0.25, 0.5], kept=[1.0, 1.0, 0.0])
    objective = ObjectiveConfig(surrogate=surrogate, ratio_from=ratio_from)
    output = prefix_loss(TokenStats(logprobs, torch.tensor([0.3, 0.2, 0.1]), None), tokens, objective)
    output.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.5, 0.25, 0.0])
    assert output.means["prefix_kept"].tolist() == [1.0, 1.0, 0.0]
    assert output.means["prefix_nll"].tolist() == pytest.approx([0.1, 7.0, 2.0])
    assert output.means["prefix_entropy"].tolist() == pytest.approx([0.3, 0.2, 0.1])
    if surrogate != "cispo":
        assert output.loss.tolist() == pytest.approx([-0.5, 0.25, 0.0])


def test_with_recomputed_ratios_the_prefix_is_clipped_as_the_objective_says() -> None:
    # The ratios to the policy before the step are e^0.5 = 1.649 and 1.0: the first is clipped at 1.2, and 3 limits A <
    # 0.
    logprobs = torch.tensor([-0.5, -1.0, -1.0], requires_grad=True)
    tokens = tokens_of(advantage=[1.0, 1.0, -1.0], kept=[1.0, 1.0, 1.0], old_logprob=[-1.0, -1.0, -3.0])
    objective = ObjectiveConfig(ratio_from="recomputed", dual_clip=3.0)
    output = prefix_loss(TokenStats(logprobs, torch.zeros(3), None), tokens, objective)
    output.loss.sum().backward()
    assert logprobs.grad is not None
    assert output.loss.tolist() == pytest.approx([-1.2, -1.0, 3.0])
    assert logprobs.grad.tolist() == pytest.approx([0.0, -1.0, 0.0])
    assert output.means["prefix_clip_fraction"].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("ratio_from", ["rollout", "recomputed"])
def test_terms(ratio_from: Any) -> None:
    terms = terms_of(run_of(ratio_from=ratio_from, aggregation="seq-mean-token-sum-norm", dual_clip=3.0))
    assert terms["prefix"].pool == terms["policy"].pool
    assert terms["prefix"].aggregation == terms["policy"].aggregation == "seq-mean-token-sum-norm"
    assert terms["prefix"].aggregation_length == terms["policy"].aggregation_length == 16
    assert ("old_logprob" in terms["prefix"].scored) == (ratio_from == "recomputed")
    outputs = [empty_output(term) for term in terms.values()]
    names = [name for output in outputs for name in (*output.losses, *output.means, *output.maxima)]
    assert len(set(names)) == len(names)
    assert {"logprob_gap", "logprob_gap_max", "entropy", "prefix_kept", "prefix_loss"} <= set(names)


@pytest.mark.parametrize(
    ("settings", "batch", "reason"),
    [
        ({"high": 1.0}, {}, "method.low_start <= method.high < 1"),
        ({"high": 0.5}, {}, "got 0.05, 0.95 and 0.5"),
        ({"low_end": -0.1}, {}, "0 <= method.low_end"),
        ({"low_start": 0.3, "low_end": 0.4}, {}, "method.low_end <= method.low_start"),
        ({"entropy_share": 0}, {}, r"method.entropy_share must lie in \(0, 1\], got 0"),
        ({"decay_steps": -1}, {}, "method.decay_steps must be >= 0"),
        ({"hybrids": 0}, {}, "method.hybrids must be >= 1"),
        ({"hybrids": 2}, {}, "batch.rollouts 3 minus method.hybrids 2 leaves a group of 1"),
    ],
)
def test_refusals(settings: Any, batch: Any, reason: str) -> None:
    assert_refused(lambda: run_of(settings=settings), batch=batch, reason=reason)


def test_it_needs_demonstrations() -> None:
    method_of(run_of())
    with pytest.raises(ValueError, match="needs every prompt's own demonstration"):
        method_of(tiny_run(Path("model"), method="prefix_rft"))
