"""Self-distillation: which rollouts are taught, what their teachers see, and what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from megatron_chord.config import KLConfig, ObjectiveConfig, RunConfig
from megatron_chord.config_methods import SelfDistillationConfig
from megatron_chord.data.rows import RowError
from megatron_chord.losses.policy import policy_loss
from megatron_chord.losses.terms import PASSES, need_reference, num_forward_passes
from megatron_chord.methods.self_distillation import (
    another_right,
    filled,
    self_distillation_loss,
)
from megatron_chord.methods.table import method_of
from megatron_chord.records import GradedRollouts
from tests.support.scripted import ScriptedContext, WordTemplate
from tests.support.tiny import terms_of, tiny_run
from tests.unit.methods.guided import assert_refused, stats_of, tokens_of

DEMONSTRATIONS = {"a": tuple(map(ord, "demo")), "b": tuple(map(ord, "other"))}


class Template(WordTemplate):
    """Answers are texts; `#` is a control token."""

    def prompt_ids(self, messages: Sequence[Any], *, tools: Sequence[Any]) -> tuple[int, ...]:
        if any("#" in message["content"] for message in messages):
            raise RowError("a control token")
        return super().prompt_ids(messages, tools=tools)

    def turn(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        return self.decode(response_ids)


class Context(ScriptedContext):
    """Rollout i of a prompt has the text ``texts[i]``."""

    texts: ClassVar[tuple[str, ...]] = ("one", "two", "<think>so</think>three")

    def rollouts(self, *arguments: Any, **named: Any) -> list[GradedRollouts]:
        found = super().rollouts(*arguments, **named)
        return [replace(item, texts=self.texts[: len(item.texts)]) for item in found]


def run_of(*, limit: int = 100, rollouts: int = 3, weight: float = 1.0, **changes: Any) -> RunConfig:
    run = tiny_run(Path("model"), method="self_distillation", weight=weight, **changes)
    shows = run.method.shows  # type: ignore[union-attr]
    aligned = shows in ("demonstration", "rollout_or_demonstration")
    data = replace(run.data, aligned=aligned, max_prompt_tokens=limit - run.data.max_response_tokens)
    return replace(run, data=data, batch=replace(run.batch, prompts=2, rollouts=rollouts))


def collect(scores: Mapping[str, Sequence[float | None]], run: RunConfig) -> Any:
    context: Any = Context(
        run=run,
        scores={("", name): values for name, values in scores.items()},
        demonstrations=DEMONSTRATIONS,
        template=Template(),
    )
    return method_of(run).collect(context)


def teachers(collected: Any) -> list[tuple[int, float, str | None]]:
    """For each sample: its first answer token, ``taught``, and the text of its teacher's prompt."""
    found = []
    for sample in collected.samples:
        (part,) = sample.parts
        count = len(part.positions)
        prompt = None
        if sample.teacher_ids is not None:
            assert sample.teacher_ids[-count:].tolist() == sample.token_ids[-count:].tolist()
            prompt = "".join(map(chr, sample.teacher_ids[:-count]))
        found.append((int(sample.token_ids[part.positions[0]]), part.constants["taught"], prompt))
    return found


TEMPLATE = "{problem}|{solution}"


def test_a_rollout_is_taught_by_another_right_one_of_its_group() -> None:
    # Of a, only the second is right, so it has no teacher. b has two right rollouts, which teach each other; the wrong
    # one is taught by the next.
    run = run_of(template=TEMPLATE)
    collected = collect({"a": (0.0, 1.0, 0.0), "b": (1.0, 0.0, 1.0)}, run)
    assert teachers(collected) == [
        (20, 1.0, "s?|two"),
        (40, 1.0, "s?|two"),
        (20, 1.0, "s?|<think>so</think>three"),
        (30, 1.0, "s?|<think>so</think>three"),
        (40, 1.0, "s?|one"),
    ]
    assert collected.weights == {"policy": 1.0}
    assert collected.stats["taught_rollouts"] == pytest.approx(5 / 6)
    assert collected.stats["teacher_prompt_length"] == pytest.approx((6 + 6 + 25 + 25 + 6) / 5)


def test_beside_rl_the_others_are_trained_too() -> None:
    run = run_of(template=TEMPLATE, weight=0.5, advantage="group_mean")
    collected = collect({"a": (0.0, 1.0, 0.0), "b": (0.0, 0.0, 0.0)}, run)
    assert teachers(collected)[:3] == [(20, 1.0, "s?|two"), (30, 0.0, None), (40, 1.0, "s?|two")]
    assert teachers(collected)[3:] == [(20, 0.0, None), (30, 0.0, None), (40, 0.0, None)]
    assert [sample.parts[0].constants["advantage"] for sample in collected.samples[:3]] == pytest.approx(
        [-1 / 3, 2 / 3, -1 / 3]
    )
    dropped = collect({"a": (0.0, 1.0, 0.0), "b": (0.0, 0.0, 0.0)}, run_of(weight=0.5, equal_groups="drop"))
    assert len(dropped.samples) == 3


def test_all_wrong_groups_are_taught_by_the_demonstration() -> None:
    run = run_of(template=TEMPLATE, shows="rollout_or_demonstration", equal_groups="drop")
    collected = collect({"a": (0.0, 1.0, 0.0), "b": (0.0, 0.0, 0.0)}, run)
    assert [prompt for _, _, prompt in teachers(collected)] == [
        "s?|two",
        "s?|demo",
        "s?|two",
        *["s?|other"] * 3,
    ]


def test_the_demonstration_teaches_every_rollout_or_only_the_wrong_ones() -> None:
    scores = {"a": (0.0, 1.0, 0.0), "b": (1.0, 1.0, 1.0)}
    everyone = collect(scores, run_of(template=TEMPLATE, shows="demonstration"))
    assert [prompt for _, _, prompt in teachers(everyone)] == [*["s?|demo"] * 3, *["s?|other"] * 3]
    wrong = collect(scores, run_of(template=TEMPLATE, shows="demonstration", teaches="wrong"))
    assert teachers(wrong) == [(20, 1.0, "s?|demo"), (40, 1.0, "s?|demo")]


def test_a_verdict_shows_the_rollout_itself() -> None:
    run = run_of(shows="verdict", template="{attempt} {verdict} {truth}.", rollouts=2)
    collected = collect({"a": (0.0, 1.0), "b": (0.0, 0.0)}, run)
    assert [prompt for _, _, prompt in teachers(collected)] == [
        "sone wrong .",
        "stwo right .",
        "sone wrong .",
        "stwo wrong .",
    ]


def test_default_texts_show_problem_and_solution() -> None:
    collected = collect({"a": (0.0, 1.0, 0.0), "b": (0.0, 0.0, 0.0)}, run_of(limit=1000))
    assert all(text in (teachers(collected)[0][2] or "") for text in ("?", "two"))
    collected = collect({"a": (0.0, 1.0, 0.0), "b": (0.0, 0.0, 0.0)}, run_of(limit=1000, shows="verdict"))
    assert all(text in (teachers(collected)[0][2] or "") for text in ("?", "one", "wrong"))


def test_thinking_is_shown_or_not() -> None:
    scores = {"a": (0.0, 0.0, 1.0), "b": (0.0, 0.0, 0.0)}
    run = run_of(template=TEMPLATE, drop_thinking=True)
    assert {prompt for _, _, prompt in teachers(collect(scores, run))} == {"s?|three"}


@pytest.mark.parametrize("limit", [5, 6])
def test_a_teachers_prompt_that_is_too_long_teaches_nothing(limit: int) -> None:
    scores = {"a": (0.0, 1.0, 0.0), "b": (0.0, 0.0, 0.0)}
    collected = collect(scores, run_of(template=TEMPLATE, teacher_prompt_tokens=limit))
    assert len(collected.samples) == (2 if limit == 6 else 0)
    assert collected.stats["taught_rollouts"] == pytest.approx(2 / 6 if limit == 6 else 0)


def test_neither_does_a_text_with_a_control_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "texts", ("one", "t#o", "three"))
    scores = {"a": (0.0, 1.0, 0.0), "b": (1.0, 0.0, 0.0)}
    collected = collect(scores, run_of(template=TEMPLATE, weight=0.5))
    assert [taught for _, taught, _ in teachers(collected)] == [0, 0, 0, 0, 1, 1]


def test_truncated_rollouts_are_left_out_of_both_losses() -> None:
    run = run_of(template=TEMPLATE, shows="demonstration", truncated="mask")
    context: Any = Context(
        run=run,
        scores={("", "a"): (0.0, 1.0, 0.0), ("", "b"): (0.0, 1.0, 0.0)},
        demonstrations=DEMONSTRATIONS,
        template=Template(),
    )
    whole = context.rollouts

    def cut(*arguments: Any, **named: Any) -> list[GradedRollouts]:
        return [
            replace(item, rollouts=tuple(replace(r, finish_reason="length") for r in item.rollouts))
            for item in whole(*arguments, **named)
        ]

    context.rollouts = cut
    assert method_of(run).collect(context).samples == []


def test_texts_are_not_read_as_templates() -> None:
    assert filled("{problem} \\boxed{x} {solution}", {"problem": "{solution}", "solution": "b"}) == (
        "{solution} \\boxed{x} b"
    )
    assert another_right(("a", "b"), (True, False), 0) is None
    assert another_right(("a", "b", "c"), (True, True, False), 1) == "a"


# ---- the loss


def test_the_loss_by_hand() -> None:
    # p = 0.2, teacher 0.8, no teacher for the second token. RL with advantages 1 and -2 has slope -A at ratio 1.
    stats = stats_of([0.2, 0.5], [0.3, 0.3])
    columns = {
        "advantage": [1.0, -2.0],
        "rollout_logprob": stats.logprobs.tolist(),
        "taught": [1.0, 0.0],
        "teacher_logprob": torch.tensor([0.8, 1.0]).double().log().tolist(),
    }
    settings = SelfDistillationConfig(weight=0.25)
    output = self_distillation_loss(stats, tokens_of((2,), **columns), ObjectiveConfig(), settings)
    (grad,) = torch.autograd.grad(output.loss.sum(), stats.logprobs)
    log4 = torch.tensor(4.0).double().log().item()
    assert output.loss.tolist() == pytest.approx([-0.75 + 0.25 * (3 - log4), 0.75 * 2])
    assert grad.tolist() == pytest.approx([-0.75 - 0.25 * log4, 0.75 * 2])
    assert output.means["teacher_log_ratio"].tolist() == pytest.approx([log4, 0.0])
    assert output.maxima["teacher_log_ratio_max"].tolist() == pytest.approx([log4, 0.0])
    rl = policy_loss(stats, tokens_of((2,), **columns), ObjectiveConfig())
    assert output.losses["policy_loss"].tolist() == rl.losses["policy_loss"].tolist()


def test_terms_and_passes() -> None:
    present = terms_of(run_of())["policy"]
    assert present.scored == {"teacher_logprob"}
    assert (num_forward_passes([present]), need_reference([present])) == (1, False)
    run = run_of(teacher="initial", weight=0.5, ratio_from="recomputed", kl=KLConfig())
    initial = terms_of(run)["policy"]
    assert initial.scored == {"reference_teacher_logprob", "old_logprob", "reference_logprob"}
    assert (num_forward_passes([initial]), need_reference([initial])) == (3, True)
    assert initial.zero_gradient_column is None
    assert len(frozenset().union(*PASSES)) == sum(map(len, PASSES))


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "batch", "reason"),
    [
        ({"weight": 0.0}, {}, r"method.weight must lie in \(0, 1\], got 0.0"),
        ({"max_ratio": 0.0}, {}, "method.max_ratio must be > 0"),
        ({"teacher_rate": 0.0}, {}, r"method.teacher_rate must lie in \(0, 1\], got 0.0"),
        ({"teacher_prompt_tokens": -1}, {}, "method.teacher_prompt_tokens must be >= 0"),
        (
            {"template": "{problem}"},
            {},
            r"method.template must have \{solution\} with method.shows right_rollout",
        ),
        (
            {"template": "{problem} {solution}", "shows": "verdict"},
            {},
            r"must have \{attempt\} or \{verdict\} or \{truth\}",
        ),
        ({"kl": KLConfig()}, {}, "objective.kl belongs to the RL loss, but method.weight 1"),
        ({"entropy_bonus": 0.1}, {}, "objective.entropy_bonus belongs to the RL loss"),
        ({"shows": "demonstration"}, {"sampling_attempts": 2}, "dynamic sampling would replace the prompts"),
    ],
)
def test_refusals(settings: Any, batch: Any, reason: str) -> None:
    assert_refused(lambda: run_of(**settings), batch=batch, reason=reason)


def test_an_averaged_teacher_needs_the_distributed_optimizer() -> None:
    run = run_of(teacher="averaged", teacher_rate=0.1)
    method = method_of(run)
    assert method.averaging_rate() == 0.1
    assert terms_of(run)["policy"].scored >= {"averaged_teacher_logprob"}
    assert method_of(run_of()).averaging_rate() is None
    with pytest.raises(ValueError, match=r"averaged needs parallel\.distributed_optimizer: true"):
        method_of(replace(run, parallel=replace(run.parallel, distributed_optimizer=False)))


def test_demonstrations_are_needed_where_they_are_shown() -> None:
    shown = run_of(shows="demonstration")
    method_of(shown)
    with pytest.raises(ValueError, match="method self_distillation needs every prompt's own demonstration"):
        method_of(replace(shown, data=replace(shown.data, aligned=False)))
    unshown = run_of()
    method_of(unshown)
    with pytest.raises(ValueError, match=r"data\.aligned: method self_distillation uses no demonstrations"):
        method_of(replace(unshown, data=replace(unshown.data, aligned=True)))


def test_a_teachers_sequence_must_fit_the_model() -> None:
    run = run_of(limit=100)  # and answers of 16 tokens
    method = method_of(run)
    method.check_positions(run.data, 116)
    with pytest.raises(ValueError, match=r"beyond the model's 115 positions: set .* to at most 99"):
        method.check_positions(run.data, 115)
    short = run_of(limit=100, teacher_prompt_tokens=20)
    method_of(short).check_positions(short.data, 36)
