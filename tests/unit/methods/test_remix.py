"""ReMix: which groups are stored and chosen again, and the loss with its clip around pi_k / pi_{k-i}."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_chord.config import KLConfig, ObjectiveConfig, RunConfig
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.losses.terms import TermTokens, TokenStats, empty_output
from megatron_chord.methods import remix
from megatron_chord.methods.remix import choose_stale, num_stale, remember, stale_loss, stale_samples
from megatron_chord.methods.table import method_of
from megatron_chord.records import Prompt, Rollout, RolloutGroup
from megatron_chord.schedules import ScheduleInput
from tests.support.tiny import terms_of, tiny_run

OBJECTIVE = ObjectiveConfig()


def rollout(tokens: tuple[int, ...], *, finish_reason: Any = "stop") -> Rollout:
    logprobs = tuple(-1 / (3 + token) for token in tokens)
    return Rollout(token_ids=tokens, logprobs=logprobs, finish_reason=finish_reason, weight_version=0)


def group(name: str, *rollouts: Rollout, rewards: tuple[float, ...] = (1.0, 0.0)) -> RolloutGroup:
    return RolloutGroup(
        prompt=Prompt(id=name, messages=(), truth="", token_ids=(5, 6, 7)),
        rollouts=rollouts or (rollout((8, 9)), rollout((10,))),
        texts=("",) * len(rewards),
        rewards=rewards,
        advantages=tuple(2 * reward - 1 + 0.1 for reward in rewards),
    )


# ---- the draws


def test_the_number_of_stale_groups_is_binomial_and_a_function_of_seed_and_step() -> None:
    counts = [num_stale(3, step, 10, 0.4) for step in range(400)]
    assert counts == [num_stale(3, step, 10, 0.4) for step in range(400)]
    assert counts != [num_stale(4, step, 10, 0.4) for step in range(400)]
    # 4000 draws of probability 0.4: mean 1600, standard deviation 31.
    assert abs(sum(counts) - 1600) < 4 * 31
    assert {num_stale(3, step, 10, 0.0) for step in range(50)} == {0}
    assert {num_stale(3, step, 10, 1.0) for step in range(50)} == {10}


def memory_of(*sizes: int) -> list[Any]:
    """A memory of steps 0, 1, ... with so many groups each. A group is only a name here."""
    return [{"step": step, "groups": [f"{step}.{i}" for i in range(size)]} for step, size in enumerate(sizes)]


def test_no_group_is_chosen_twice_in_a_step_and_every_group_is_chosen_equally_often() -> None:
    memory, times = memory_of(3, 2), dict.fromkeys(["0.0", "0.1", "0.2", "1.0", "1.1"], 0)
    for step in range(1000):
        chosen = choose_stale(memory, 7, step, 2)
        assert chosen == choose_stale(memory, 7, step, 2)
        assert len({name for _, name in chosen}) == 2
        for sampled_at, name in chosen:
            assert str(name).startswith(f"{sampled_at}.")
            times[str(name)] += 1
    # Each is chosen 1000 x 2/5 = 400 times, with a standard deviation of 15.5.
    assert all(abs(count - 400) < 4 * 15.5 for count in times.values()), times


def test_a_memory_with_too_few_groups_gives_all_it_has() -> None:
    assert choose_stale([], 0, 0, 4) == []
    assert choose_stale(memory_of(1, 1), 0, 2, 4) == [(0, "0.0"), (1, "1.0")]
    assert choose_stale(memory_of(1, 1), 0, 2, 0) == []


# ---- the memory


def test_it_holds_the_fresh_groups_of_the_last_steps_only() -> None:
    memory: list[Any] = []
    for step in range(6):
        memory = remember(memory, [group(str(step))], step, 2, OBJECTIVE)
        assert [entry["step"] for entry in memory] == list(range(max(0, step - 1), step + 1))
    # With a lag of one step, the next step may only draw from the present one.
    assert [entry["step"] for entry in remember(memory, [], 6, 1, OBJECTIVE)] == [6]


def test_a_remembered_group_comes_back_from_json_bit_for_bit() -> None:
    memory = remember([], [group("a")], 4, 2, OBJECTIVE)
    again = json.loads(json.dumps(memory))
    assert again == memory
    assert again[0]["groups"][0][0] == {
        "prompt": [5, 6, 7],
        "tokens": [8, 9],
        "logprobs": [-1 / 11, -1 / 12],
        "advantage": 1.1,
    }
    for before, after in zip(
        stale_samples(choose_stale(memory, 0, 5, 1), 5),
        stale_samples(choose_stale(again, 0, 5, 1), 5),
        strict=True,
    ):
        assert before.token_ids.tolist() == after.token_ids.tolist()
        assert before.parts[0].positions.tolist() == after.parts[0].positions.tolist()
        for name, value in before.parts[0].constants.items():
            assert np.array_equal(value, after.parts[0].constants[name])


def test_what_was_not_trained_on_is_not_remembered() -> None:
    cut = group("a", rollout((8, 9)), rollout((10,), finish_reason="length"))
    equal = group("b", rewards=(1.0, 1.0))
    (entry,) = remember([], [cut, equal], 0, 2, ObjectiveConfig(equal_groups="drop", truncated="mask"))
    assert [[answer["tokens"] for answer in answers] for answers in entry["groups"]] == [[[8, 9]]]
    (entry,) = remember([], [cut, equal], 0, 2, OBJECTIVE)
    assert [len(answers) for answers in entry["groups"]] == [2, 2]


def test_a_stale_sample_knows_its_age_and_the_log_probs_it_was_sampled_with() -> None:
    memory = remember([], [group("a")], 4, 2, OBJECTIVE)
    first, second = stale_samples([(entry["step"], g) for entry in memory for g in entry["groups"]], 6)
    assert first.token_ids.tolist() == [5, 6, 7, 8, 9]
    (part,) = first.parts
    assert (part.term, part.positions.tolist()) == ("stale", [3, 4])
    logprobs = part.constants["stale_logprob"]
    assert isinstance(logprobs, np.ndarray)
    assert logprobs.dtype == np.float32
    assert logprobs.tolist() == np.array([-1 / 11, -1 / 12], np.float32).tolist()
    assert (part.constants["advantage"], part.constants["age"]) == (1.1, 2.0)
    assert second.parts[0].constants["advantage"] == -0.9


# ---- one step


class FakeSampling:
    """``sample_groups`` without an engine. It returns the requested number of groups, whose names have the step."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, context: Any, *, prompts: int) -> Any:
        self.asked.append(prompts)
        groups = [
            group(f"{context.now.step}.{i}", rollout((20 + context.now.step,)), rollout((9,)))
            for i in range(prompts)
        ]
        return SimpleNamespace(groups=groups, stats={"reward_mean": 0.5})


def context_of(run: RunConfig, *, step: int, memory: Any) -> Any:
    return SimpleNamespace(
        batch=run.batch, objective=run.objective, seed=run.seed, now=ScheduleInput(step=step), memory=memory
    )


def test_a_run_mixes_in_its_first_stage_alone_and_a_repeated_step_draws_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sampling = FakeSampling()
    monkeypatch.setattr(remix, "sample_groups", sampling)
    run = tiny_run(tmp_path, method="remix", settings={"mix_steps": 8, "stale_share": 0.5})
    method, memory, seen = method_of(run), None, 0
    for step in range(10):
        context = context_of(run, step=step, memory=json.loads(json.dumps(memory)))
        collected, again = method.collect(context), method.collect(context)
        assert [s.token_ids.tolist() for s in collected.samples] == [
            s.token_ids.tolist() for s in again.samples
        ]
        stale = [sample for sample in collected.samples if sample.parts[0].term == "stale"]
        # Three groups of two rollouts, stale or fresh.
        assert len(collected.samples) == 6
        assert len(stale) == 2 * collected.stats["stale_groups"]
        if collected.stats["stale_groups"] < 3:
            assert sampling.asked[-1] == 3 - collected.stats["stale_groups"]
        for sample in stale:
            age = sample.parts[0].constants["age"]
            assert age in (1.0, 2.0)
            assert sample.token_ids[3] in (20 + step - age, 9)
        assert step < 8 or not stale
        assert (collected.memory is None) == (step >= 7)
        seen, memory = seen + len(stale), collected.memory
        assert step > 0 or not stale
        assert collected.weights == {"policy": 1.0, "stale": 1.0}
    assert seen > 0


def test_a_step_of_stale_groups_alone_samples_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sampling = FakeSampling()
    monkeypatch.setattr(remix, "sample_groups", sampling)
    run = tiny_run(tmp_path, method="remix", settings={"stale_share": 1.0})
    memory = remember([], [group("a"), group("b"), group("c")], 0, 2, OBJECTIVE)
    collected = method_of(run).collect(context_of(run, step=1, memory=memory))
    assert sampling.asked == []
    assert collected.stats == {"stale_groups": 3}
    assert {sample.parts[0].term for sample in collected.samples} == {"stale"}
    assert [entry["step"] for entry in collected.memory] == [0, 1]


def test_fresh_and_stale_tokens_are_averaged_together(tmp_path: Path) -> None:
    terms = terms_of(tiny_run(tmp_path, method="remix"))
    memory = remember([], [group("a")], 0, 2, OBJECTIVE)
    stale = stale_samples([(0, memory[0]["groups"][0])], 1)  # 2 + 1 tokens
    fresh = remix.policy_samples([group("b")], OBJECTIVE)  # 2 + 1 tokens
    scales = {
        float(part.constants["scale"]) for s in with_scales([*stale, *fresh], terms) for part in s.parts
    }
    assert scales == {1 / 6}


# ---- the loss


def one_token(
    *,
    new: float,
    old: float,
    sampled: float,
    advantage: float,
    objective: ObjectiveConfig,
    reference: float = 0.5,
) -> tuple[float, float, Any]:
    """Return the loss, its derivative with respect to log p, and the metrics of one token with these probabilities."""
    logprobs = torch.tensor([math.log(new)], dtype=torch.float64, requires_grad=True)
    entropy = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    columns = {
        "advantage": advantage,
        "age": 1.0,
        "stale_logprob": math.log(sampled),
        "old_logprob": math.log(old),
        "reference_logprob": math.log(reference),
    }
    tokens = TermTokens(
        index=torch.zeros(1, dtype=torch.int64),
        sequence=torch.zeros(1, dtype=torch.int64),
        lengths=torch.ones(1),
        held=torch.ones(1, dtype=torch.int64),
        columns={name: torch.tensor([value], dtype=torch.float64) for name, value in columns.items()},
    )
    output = stale_loss(TokenStats(logprobs, entropy, None), tokens, objective)
    (grad,) = torch.autograd.grad(output.loss.sum(), logprobs, retain_graph=True)
    return output.loss.item(), grad.item(), output


@pytest.mark.parametrize(
    ("new", "advantage", "loss", "grad", "is_clipped"),
    [
        # The token was sampled at 0.2, and the policy before the update has 0.5: c = 2.5, the clip range is [2.3,
        # 2.78].
        # In the first update r = c: the policy gradient has the importance weight 2.5. A clip around 1 would cut it.
        (0.5, 1.0, -2.5, -2.5, False),
        (0.5, -1.0, 2.5, 2.5, False),
        # r = 0.6 / 0.2 = 3 is above 2.78: a good token gains nothing more, a bad one is pushed down with its whole
        # ratio.
        (0.6, 1.0, -2.78, 0.0, True),
        (0.6, -1.0, 3.0, 3.0, False),
        # r = 2 is below 2.3.
        (0.4, 2.0, -4.0, -4.0, False),
        (0.4, -2.0, 4.6, 0.0, True),
        # r = 2.75 is inside. A symmetrical range of 0.2 would clip it.
        (0.55, 1.0, -2.75, -2.75, False),
        (0.6, 0.0, 0.0, 0.0, False),
    ],
)
def test_the_clip_is_centred_on_the_present_policys_ratio(
    new: float, advantage: float, loss: float, grad: float, is_clipped: bool
) -> None:
    objective = ObjectiveConfig(clip_low=0.2, clip_high=0.28)
    found, slope, output = one_token(new=new, old=0.5, sampled=0.2, advantage=advantage, objective=objective)
    assert found == pytest.approx(loss, abs=1e-12)
    assert slope == pytest.approx(grad, abs=1e-12)
    assert output.means["stale_clip_fraction"].item() == float(is_clipped)
    assert output.means["stale_ratio"].item() == pytest.approx(new / 0.2)
    assert output.means["stale_age"].item() == 1.0
    assert output.losses["stale_loss"].item() == found


def test_a_centre_below_the_clips_width_is_not_clipped_from_below() -> None:
    # c = 0.1 / 0.8 = 0.125, the range [-0.075, 0.325]; r = 0.01 / 0.8.
    objective = ObjectiveConfig()
    loss, grad, _ = one_token(new=0.01, old=0.1, sampled=0.8, advantage=-1.0, objective=objective)
    assert (loss, grad) == (pytest.approx(0.0125), pytest.approx(0.0125))


def test_kl_and_entropy_reach_stale_tokens_and_are_named_apart() -> None:
    objective = ObjectiveConfig(kl=KLConfig(estimator="k1", coefficient=0.3), entropy_bonus=0.1)
    # k1 = log(0.5 / 0.25) = log 2; entropy 0.5.
    loss, grad, output = one_token(
        new=0.5, old=0.5, sampled=0.2, advantage=1.0, objective=objective, reference=0.25
    )
    assert loss == pytest.approx(-2.5 + 0.3 * math.log(2) - 0.05)
    assert grad == pytest.approx(-2.5 + 0.3)
    assert output.losses["stale_loss"].item() == pytest.approx(-2.5)
    assert output.means["stale_kl"].item() == pytest.approx(math.log(2))


def test_an_impossible_token_does_not_overflow() -> None:
    loss, _, _ = one_token(new=0.5, old=0.5, sampled=1e-300, advantage=1.0, objective=ObjectiveConfig())
    assert loss == pytest.approx(-math.exp(20))


def test_no_metric_is_reported_twice_and_the_gap_is_that_of_fresh_tokens(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, method="remix", kl=KLConfig())
    terms = terms_of(run)
    names = {
        name: [*o.losses, *o.means, *o.maxima] for name, o in ((n, empty_output(t)) for n, t in terms.items())
    }
    assert not set(names["policy"]) & set(names["stale"])
    assert all(name.startswith("stale_") for name in names["stale"])
    assert terms["stale"].scored == {"old_logprob", "reference_logprob"}
    assert terms["policy"].scored == {"reference_logprob"}


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        ({"stale_share": 1.5}, {}, r"method\.stale_share must lie in \[0, 1\]"),
        ({"lag": 0}, {}, r"method\.lag must be >= 1"),
        ({"mix_steps": -1}, {}, r"method\.mix_steps must be >= 0"),
        ({}, {"surrogate": "cispo"}, "ppo without"),
        ({}, {"dual_clip": 3.0}, "ppo without"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, settings: Any, objective: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        method_of(tiny_run(tmp_path, method="remix", settings=settings, **objective))
