"""Steps that stop sampling early: which prompts they train, and how a checkpoint stores the other prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_chord.config import AsynchronousConfig, PartialConfig, RunConfig
from megatron_chord.data.cursor import Cursor
from megatron_chord.data.packing import make_layout
from megatron_chord.methods.table import method_of
from megatron_chord.records import Grade, Prompt
from megatron_chord.schedules import Constant, ScheduleInput
from megatron_chord.train import remote_routes
from megatron_chord.train.arrays import with_replaced
from megatron_chord.train.coordinator import Coordinator, StepInputs
from megatron_chord.train.stop import StopWanted
from tests.support.decoding import END, DecodingClient
from tests.support.grading import GradersAtOnce
from tests.support.step_context import sources_at_start
from tests.support.tiny import tiny_run

COUNT = 60
LIMIT = 40
PROMPTS = [
    Prompt(id=str(i), messages=({"content": "?"},), truth="", token_ids=(100 + i,)) for i in range(COUNT)
]
LENGTHS = {100 + i: (3 + i % 5, 4 + i % 3 if i % 7 else 38) for i in range(COUNT)}
"""One of seven prompts has an answer that is about eight times as long as the others'."""
LONG = {PROMPTS[i].id for i in range(0, COUNT, 7)}


def partial_run(
    *, unfinished: Any = "carry", extra: float = 0.5, max_carries: int | None = None, ahead: bool = False
) -> RunConfig:
    partial = (
        PartialConfig(extra_prompts=extra, unfinished=unfinished, max_carries=max_carries) if extra else None
    )
    run = tiny_run(Path("model"), mu=Constant(peak=0.0))
    return replace(
        run,
        data=replace(run.data, max_response_tokens=LIMIT),
        batch=replace(run.batch, prompts=4, rollouts=2, demonstrations=0),
        rollout=replace(run.rollout, partial=partial, asynchronous=AsynchronousConfig() if ahead else None),
    )


class Steps:
    """The coordinator's side of a run. The weights of a step have the step's number as version."""

    def __init__(self, run: RunConfig, checkpoint: Any = None, **more: Any) -> None:
        self.run = run
        self.client = DecodingClient(LENGTHS)
        self.rows: dict[int, list[dict[str, Any]]] = {}

        def decode(ids: Sequence[int]) -> str:
            return " ".join(str(token) for token in ids)

        template: Any = SimpleNamespace(
            stop_token_ids=(END,),
            control_tokens={},
            turn=lambda prompt, ids: decode(ids),
            decode=decode,
            decode_all=decode,
        )
        data: Any = SimpleNamespace(
            template=template,
            routes=None,
            sources=sources_at_start(PROMPTS),
        )
        graders: Any = GradersAtOnce(lambda response: Grade(float(len(response.text) % 2), None))
        log: Any = SimpleNamespace(write_samples=self.rows.__setitem__, doing=lambda text: None)
        self.coordinator = Coordinator(
            run,
            method_of(run),
            data,
            layout=make_layout(
                data=1,
                tensor=1,
                pipeline=1,
                context=1,
                sequence_parallel=False,
                virtual=False,
                attention_cost=0.0,
            ),
            graders=graders,
            log=log,
            **more,
        )
        if checkpoint is not None:
            self.coordinator.restore(json.loads(checkpoint))

    def collect(self, step: int, *, version: int | None = None, recorded: Any = None) -> StepInputs:
        clients: Any = [] if recorded is not None else [self.client]
        version = step if version is None else version
        return self.coordinator.collect(ScheduleInput(step=step), clients, version, recorded=recorded)[0]

    def take(self, steps: Sequence[int]) -> list[StepInputs]:
        taken = []
        for step in steps:
            taken.append(self.collect(step))
            self.coordinator.commit(step)
        return taken

    def checkpoint(self, step: int) -> str:
        return json.dumps(self.coordinator.run_state(step, {}))

    def prompts(self, step: int) -> list[str]:
        """Return the prompts of its groups."""
        rows = self.rows[step]
        assert all(
            first["prompt_id"] == second["prompt_id"]
            for first, second in zip(rows[::2], rows[1::2], strict=True)
        )
        return [row["prompt_id"] for row in rows[::2]]

    def first_prompts(self, count: int) -> set[str]:
        indices, _ = Cursor(name="prompts", size=COUNT, seed=0, data="").take(count)
        return {PROMPTS[index].id for index in indices}


def left_in(checkpoint: str) -> list[str]:
    return [item["prompt"] for item in json.loads(checkpoint)["unfinished"]["prompts"]]


def test_every_prompt_is_trained_on_once_and_none_is_lost() -> None:
    steps = Steps(partial_run())
    inputs = steps.take(range(9))
    assert [len(steps.prompts(step)) for step in range(9)] == [4] * 9
    trained = [name for step in range(9) for name in steps.prompts(step)]
    left = left_in(steps.checkpoint(9))
    assert len(left) == inputs[-1].stats["unfinished_prompts"] == 2
    assert Counter([*trained, *left]) == Counter(steps.first_prompts(9 * 4 + 2))
    assert sum(step.stats["continued_prompts"] for step in inputs) > 0


def test_answers_are_as_long_as_without_early_stop() -> None:
    steps, whole = Steps(partial_run()), Steps(partial_run(extra=0.0))
    steps.take(range(9))
    whole.take(range(11))
    expected = {(row["prompt_id"], row["response"]) for step in range(11) for row in whole.rows[step]}
    found = {(row["prompt_id"], row["response"]) for step in range(9) for row in steps.rows[step]}
    assert found < expected
    assert max(row["num_tokens"] for step in range(9) for row in steps.rows[step]) == 38


def test_carried_tokens_keep_their_weights_and_are_counted_by_token() -> None:
    steps = Steps(partial_run())
    inputs = steps.take(range(9))
    mixed = 0
    for step in range(9):
        ages = []
        for row in steps.rows[step]:
            assert row["weight_version"] == min(version for version, _ in row["weight_spans"])
            assert sum(count for _, count in row["weight_spans"]) == row["num_tokens"]
            ages += [step - version for version, count in row["weight_spans"] for _ in range(count)]
            mixed += len(row["weight_spans"]) > 1
        assert inputs[step].stats["staleness_mean"] == pytest.approx(sum(ages) / len(ages))
        assert inputs[step].stats["staleness_max"] == max(ages) == step - inputs[step].weight_version
    assert mixed > 0
    assert mixed == round(sum(step.stats["mixed_rollouts"] * 8 for step in inputs))


def test_a_bound_on_how_often_a_prompt_is_carried_over() -> None:
    def oldest(run: RunConfig) -> int:
        return max(step.stats["staleness_max"] for step in Steps(run).take(range(9)))

    assert oldest(partial_run()) > 2
    assert [oldest(partial_run(max_carries=most)) for most in (1, 2)] == [1, 2]
    begun, straight = Steps(partial_run(max_carries=2)), Steps(partial_run(max_carries=2))
    straight.take(range(6))
    begun.take(range(3))
    resumed = Steps(partial_run(max_carries=2), begun.checkpoint(3))
    resumed.take(range(3, 6))
    assert {**begun.rows, **resumed.rows} == straight.rows


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_resumed_run_goes_on_with_the_same_prompts_and_tokens(at: int) -> None:
    straight, begun = Steps(partial_run()), Steps(partial_run())
    straight.take(range(9))
    begun.take(range(at))
    resumed = Steps(partial_run(), begun.checkpoint(at))
    resumed.take(range(at, 9))
    assert {**begun.rows, **resumed.rows} == straight.rows
    assert resumed.checkpoint(9) == straight.checkpoint(9)
    assert any(row["weight_spans"][0][0] < at for step in range(at, 9) for row in resumed.rows[step])


def test_a_step_that_is_repeated_draws_the_same() -> None:
    """A lost server makes the run repeat a step. The step must then draw the same prompts."""
    steps, undisturbed = Steps(partial_run()), Steps(partial_run())
    undisturbed.take(range(4))
    steps.take(range(3))
    steps.collect(3)
    steps.collect(3)
    assert steps.rows == undisturbed.rows


def test_steps_sampled_ahead_are_collected_again_from_a_checkpoint() -> None:
    """Sampling is one step ahead: the first weights sample two steps, and each later version samples one."""
    straight = Steps(partial_run(ahead=True))
    straight.collect(0)
    for step in range(1, 6):
        straight.collect(step, version=step - 1)
        straight.coordinator.commit(step - 1)
    saved = straight.checkpoint(5)
    (record,) = json.loads(saved)["ahead"]
    assert (record["step"], record["version"]) == (5, 4)
    resumed = Steps(partial_run(ahead=True), saved)
    before = straight.collect(6, version=5)
    again = resumed.collect(5, recorded=record["rounds"])
    assert resumed.rows[5] == straight.rows[5]
    assert again.stats["unfinished_prompts"] == 2
    after = resumed.collect(6, version=5)
    assert resumed.rows[6] == straight.rows[6], "it goes on with what step 5 has left"
    assert before.stats == after.stats
    assert before.stats["staleness_max"] > 1


@pytest.mark.parametrize("ahead", [None, AsynchronousConfig(), AsynchronousConfig(in_flight="keep")])
def test_a_stop_interrupts_a_collection_unless_a_resumed_run_could_not_repeat_it(
    ahead: AsynchronousConfig | None,
) -> None:
    run = partial_run()
    steps = Steps(
        replace(run, rollout=replace(run.rollout, asynchronous=ahead)), stop_wanted=lambda: bool(steps.rows)
    )
    steps.take(range(1))
    if ahead is not None and ahead.in_flight == "drain":
        steps.take(range(1, 2))
        return
    with pytest.raises(StopWanted):
        steps.collect(1)
    assert json.loads(steps.checkpoint(1))["ahead"] == []


def test_dropped_prompts_are_counted_and_not_asked_again() -> None:
    steps = Steps(partial_run(unfinished="drop"))
    inputs = steps.take(range(9))
    trained = [name for step in range(9) for name in steps.prompts(step)]
    assert len(trained) == len(set(trained)) == 9 * 4
    assert left_in(steps.checkpoint(9)) == []
    assert [step.stats["unfinished_prompts"] for step in inputs] == [2] * 9
    assert set(trained) < steps.first_prompts(9 * 6)
    assert all(step.stats["unfinished_tokens"] > 0 for step in inputs)
    assert "staleness_max" not in inputs[0].stats, "nothing is older than its step"
    # This is the bias that the documentation warns of.
    asked = steps.first_prompts(9 * 6)
    of_long, of_short = (
        len(names & set(trained)) / len(names & asked)
        for names in (LONG, {item.id for item in PROMPTS} - LONG)
    )
    assert of_long < 0.5 < of_short


def test_carrying_over_trains_on_prompts_with_long_answers_too() -> None:
    steps = Steps(partial_run())
    steps.take(range(9))
    trained = {name for step in range(9) for name in steps.prompts(step)}
    assert len(LONG & trained) >= len(LONG & steps.first_prompts(9 * 4)) - 2, "but for the two under way"


@pytest.mark.parametrize("other", [{"unfinished": "drop"}, {"extra": 0.0}])
def test_a_checkpoint_resumed_without_carrying_samples_its_prompts_anew(other: Any) -> None:
    begun = Steps(partial_run())
    begun.take(range(3))
    saved = begun.checkpoint(3)
    assert any(item["partial_rollouts"] for item in json.loads(saved)["unfinished"]["prompts"])
    resumed = Steps(partial_run(**other), saved)
    resumed.take(range(3, 5))
    asked = {request.prompt_ids[0]: len(request.prompt_ids) for request in resumed.client.asked}
    assert {asked[100 + int(name)] for name in left_in(saved)} == {1}, "from the beginning"
    assert all(row["weight_spans"][0][0] >= 3 for step in (3, 4) for row in resumed.rows[step])
    if other == {"extra": 0.0}:
        assert set(left_in(saved)) <= set(resumed.prompts(3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda run: replace(run, rollout=replace(run.rollout, temperature=0.5)),
            "'rollout.temperature': 1.0",
        ),
        (
            lambda run: replace(run, data=replace(run.data, max_response_tokens=9)),
            "'data.max_response_tokens': 9",
        ),
        (lambda run: replace(run, batch=replace(run.batch, rollouts=3)), "rollout.partial.unfinished=drop"),
    ],
)
def test_unfinished_answers_are_not_continued_with_other_settings(change: Any, reason: str) -> None:
    begun = Steps(partial_run())
    begun.take(range(3))
    with pytest.raises(ValueError, match=reason):
        Steps(change(partial_run()), begun.checkpoint(3))


def test_checkpoints_from_before_anything_was_stopped_are_resumed() -> None:
    begun = Steps(partial_run(extra=0.0))
    begun.take(range(3))
    saved = json.loads(begun.checkpoint(3))
    del saved["unfinished"]
    resumed = Steps(partial_run(), json.dumps(saved))
    resumed.take(range(3, 6))
    trained = [name for steps in (begun, resumed) for step in steps.rows for name in steps.prompts(step)]
    assert len(set(trained)) == 6 * 4


def test_dynamic_sampling_goes_on_with_them_in_its_next_round() -> None:
    run = partial_run()
    run = replace(run, batch=replace(run.batch, sampling_attempts=3))
    steps = Steps(run)
    inputs = steps.take(range(5))
    assert all(step.stats["prompts_sampled"] >= 4 for step in inputs)
    assert max(step.stats["sampling_rounds"] for step in inputs) > 1
    seen = [name for step in range(5) for name in steps.prompts(step)] + left_in(steps.checkpoint(5))
    assert len(seen) == len(set(seen))
    position = json.loads(steps.checkpoint(5))["cursors"]["prompts"]["position"]
    assert set(seen) == steps.first_prompts(position), "every prompt that was drawn, once"


def test_without_router_replay_nothing_is_searched_for_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as in a dense model. The memory of a method and unfinished prompts may be large."""
    searched: list[Any] = []

    def search(value: Any, *others: Any) -> Any:
        searched.append(value)
        return with_replaced(value, *others)

    monkeypatch.setattr(remote_routes, "with_replaced", search)
    steps = Steps(partial_run())
    steps.take(range(3))
    assert left_in(steps.checkpoint(3))
    assert searched == []
