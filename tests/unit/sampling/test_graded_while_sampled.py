"""Answers are graded while others are still sampled: real grader processes, and a real HTTP server of recorded answers.

The processes tell each other through named pipes what has happened, so no test depends on how fast they are.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config import PartialConfig
from megatron_chord.data.cursor import Cursor
from megatron_chord.records import Grade, GradedRollouts, Prompt, Rollout, RolloutRequest
from megatron_chord.rewards.graders import Graders, PendingGrade
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.pool import GraderPool
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import SumReward
from megatron_chord.rollout.replies import RolloutError
from megatron_chord.sampling.context import SamplingServices, StepContext
from megatron_chord.sampling.recorded import to_json
from megatron_chord.sampling.rounds import Grading, Sampling, TooManyGraderErrors, sample
from megatron_chord.schedules import Constant
from tests.support.recorded import END, VERSION, Recorded, numbers_template, recorded_server
from tests.support.step_context import step_context
from tests.support.tiny import tiny_run

LIMIT_S = 100.0
SAMPLING = Sampling(num_rollouts=2, temperature=1.0, max_tokens=4, stop_token_ids=(END,))
MODULE = """
import asyncio
import os

HERE = os.path.dirname(os.path.abspath(__file__))
begun = []

def note(text):
    pipe = os.open(os.path.join(HERE, "graded"), os.O_WRONLY)
    os.write(pipe, text.encode() + b"\\n")
    os.close(pipe)

def tells(response):
    note(response.text)
    return float(response.text)

def refuses(response):
    note(response.text)
    raise ValueError("no grade for " + response.text)

def loops(response):
    while response.text == "10":
        pass
    return 1.0

def last_digit(response):
    if response.text == "21":
        raise ValueError("odd")
    return float(int(response.text) % 10)

def places(responses):
    return [100.0 * len(responses) + place for place in range(len(responses))]

def held(response):
    note(response.text)
    if response.text == "1":
        open(os.path.join(HERE, "release")).read()
    return float(response.text)

async def judge(response):
    return {"half": int(response.text) / 2, "one": 1.0}

async def pair(response):
    note(response.text)
    begun.append(asyncio.Event())
    if len(begun) == 2:
        begun[0].set()
    await begun[0].wait()
    return float(response.text)
"""


class Pipe:
    """What the graders have noted."""

    def __init__(self, folder: Path) -> None:
        os.mkfifo(folder / "graded")
        self._pipe = os.open(folder / "graded", os.O_RDWR)
        self._lines: deque[str] = deque()

    def next(self) -> str:
        """The next line. Waits for it."""
        while not self._lines:
            ready, _, _ = select.select([self._pipe], [], [], LIMIT_S)
            assert ready, "no grader has begun"
            self._lines += os.read(self._pipe, 1000).decode().splitlines()
        return self._lines.popleft()

    def close(self) -> None:
        os.close(self._pipe)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my.py").write_text(MODULE)
    return tmp_path


@pytest.fixture
def pipe(folder: Path) -> Iterator[Pipe]:
    with contextlib.closing(Pipe(folder)) as pipe:
        yield pipe


def function(folder: Path, name: str, **settings: Any) -> FunctionReward:
    settings = {"workers": 1, "timeout_s": LIMIT_S, "allow": ("files",), **settings}
    return FunctionReward(path=folder / "my.py", name=name, **settings)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(i), messages=(), truth="11", token_ids=(i,)) for i in range(count)]


def asks(count: int) -> list[RolloutRequest]:
    return [RolloutRequest(prompt=prompt, seed=prompt.token_ids[0]) for prompt in prompts(count)]


def group(number: int) -> tuple[list[int], list[int]]:
    """The recorded answers of a prompt: 10, 11 of the first, 20, 21 of the second, ..."""
    return [10 * number + 10, END], [10 * number + 11, END]


def sampled_and_graded(
    answers: Recorded, graders: Graders, count: int, *, max_error_rate: float = 0.0
) -> list[GradedRollouts]:
    requests = asks(count)
    with (
        recorded_server(answers) as client,
        Grading(
            requests,
            template=numbers_template(),
            graders=graders,
            max_error_rate=max_error_rate,
            num_answers=2 * count,
        ) as grading,
    ):
        sampled = sample(
            [client],
            requests,
            SAMPLING,
            version=VERSION,
            deadline_s=LIMIT_S,
            on_group=lambda index, rollouts, _: grading.add(index, rollouts),
        )
        return grading.finish(range(count), sampled)


def test_the_first_answer_is_graded_while_another_is_sampled(folder: Path, pipe: Pipe) -> None:
    """The server sends the second prompt's answers only when a grader has begun with the first's."""
    seen: list[str] = []

    def answers(number: int, aborted: threading.Event) -> Sequence[Sequence[int]]:
        if number == 1:
            seen.append(pipe.next())
        return group(number)

    with Graders(function(folder, "tells")) as graders:
        graded = sampled_and_graded(answers, graders, 2)
    assert seen == ["10"]
    assert [item.rewards for item in graded] == [(10.0, 11.0), (20.0, 21.0)]


def test_too_many_errors_end_the_sampling(folder: Path, pipe: Pipe) -> None:
    """One worker: it begins with the next grading when the pool has the error of the one before."""
    over = threading.Event()

    def answers(number: int, aborted: threading.Event) -> Sequence[Sequence[int]]:
        if number == 1:
            assert [pipe.next(), pipe.next()] == ["10", "11"]
        if number == 2:
            over.wait(LIMIT_S)
        return group(number)

    with Graders(function(folder, "refuses")) as graders, contextlib.ExitStack() as stack:
        stack.callback(over.set)
        with pytest.raises(
            TooManyGraderErrors, match=r"at least [12] of 6 gradings failed .*no grade for 10"
        ):
            sampled_and_graded(answers, graders, 3)
        assert not over.is_set(), "the third prompt is still sampled"


def test_a_late_grading_is_killed_while_another_answer_is_sampled(folder: Path) -> None:
    killed = threading.Event()

    def answers(number: int, aborted: threading.Event) -> Sequence[Sequence[int]]:
        assert number == 0 or killed.wait(LIMIT_S)
        return group(number)

    with Graders(function(folder, "loops", timeout_s=2.0), on_grade=killed.set) as graders:
        graded = sampled_and_graded(answers, graders, 2, max_error_rate=0.25)
        assert [item.grades for item in graded] == [
            (Grade(None, "killed after 2 s"), Grade(1.0)),
            (Grade(1.0), Grade(1.0)),
        ]
        with pytest.raises(TooManyGraderErrors, match=r"1 of 4 gradings failed .*killed after 2 s"):
            sampled_and_graded(answers, graders, 2, max_error_rate=0.2)


def test_graders_that_are_closed_end_the_sampling(folder: Path) -> None:
    graders = Graders(function(folder, "last_digit"))

    def answers(number: int, aborted: threading.Event) -> Sequence[Sequence[int]]:
        graders.close()
        return group(number)

    with pytest.raises(RuntimeError, match="the grader pool is closed"):
        sampled_and_graded(answers, graders, 2)


def test_a_check_that_raises_ends_the_requests_to_all_servers() -> None:
    class StopAskedFor(Exception):
        pass

    over, checks = threading.Event(), iter(range(9))

    def answers(number: int, aborted: threading.Event) -> Sequence[Sequence[int]]:
        over.wait(LIMIT_S)
        return group(number)

    def check() -> None:
        if next(checks) == 1:  # the first is before any request
            raise StopAskedFor

    with (
        recorded_server(answers) as first,
        recorded_server(answers) as second,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(over.set)
        start = time.monotonic()
        with pytest.raises(StopAskedFor):
            sample([first, second], asks(4), SAMPLING, version=VERSION, deadline_s=LIMIT_S, check=check)
        while first._sampling or second._sampling:
            assert time.monotonic() < start + LIMIT_S / 2, "the requests were not cancelled"
            time.sleep(0.01)


def test_a_lost_server_ends_the_sampling_while_the_first_one_is_at_work() -> None:
    over = threading.Event()

    def answers(number: int, aborted: threading.Event) -> Sequence[Sequence[int]]:
        over.wait(LIMIT_S)
        return group(number)

    with recorded_server(answers) as first, recorded_server(answers) as lost, contextlib.ExitStack() as stack:
        stack.callback(over.set)
        lost.close()
        start = time.monotonic()
        with pytest.raises(RolloutError, match="the client was closed"):
            sample([first, lost], asks(4), SAMPLING, version=VERSION, deadline_s=LIMIT_S)
        assert time.monotonic() < start + LIMIT_S / 2


def test_rewards_do_not_depend_on_when_answers_arrive(folder: Path) -> None:
    """Four kinds of graders. A function of lists gets the lists that it would get if all answers arrived at once: of
    three, because one worker grades eight answers in lists of at most three."""
    reward = SumReward(
        terms=(
            MathReward(workers=1, timeout_s=LIMIT_S),
            function(folder, "last_digit", weight=2.0),
            function(folder, "places", batch_size=3),
            function(folder, "judge", concurrency=2),
        )
    )
    requests = asks(4)
    rollouts = [
        tuple(
            Rollout(token_ids=tuple(ids), logprobs=(0.0, 0.0), finish_reason="stop", weight_version=0)
            for ids in group(number)
        )
        for number in range(4)
    ]
    lists = [[300.0, 301.0], [302.0, 300.0], [301.0, 302.0], [200.0, 201.0]]
    expected = [
        tuple(
            Grade(None, "last_digit: ValueError: odd (my.py:28)")
            if (number, digit) == (1, 1)
            else Grade(
                float((number, digit) == (0, 1)),
                None,
                {
                    "math": float((number, digit) == (0, 1)),
                    "last_digit": float(digit),
                    "places": lists[number][digit],
                    "judge": (10 * number + 10 + digit) / 2 + 1,
                    "judge.half": (10 * number + 10 + digit) / 2,
                    "judge.one": 1.0,
                },
            )
            for digit in (0, 1)
        )
        for number in range(4)
    ]
    with Graders(reward) as graders:
        for order in ([], [3, 1, 0, 2], [2, 0]):
            with Grading(
                requests, template=numbers_template(), graders=graders, max_error_rate=0.125, num_answers=8
            ) as grading:
                for index in order:
                    grading.add(index, rollouts[index])
                graded = grading.finish(range(4), rollouts)
            assert [item.grades for item in graded] == expected, order
            assert [item.texts for item in graded][:2] == [("10", "11"), ("20", "21")]


def context_of(client: Any, graders: Graders, *, extra: float, recorded: Any = None) -> StepContext:
    run = tiny_run(Path("model"), mu=Constant(peak=0.0))
    run = replace(
        run,
        data=replace(run.data, max_response_tokens=SAMPLING.max_tokens),
        reward=replace(run.reward, max_error_rate=0.0),
        rollout=replace(run.rollout, partial=PartialConfig(extra_prompts=extra)),
    )
    services = SamplingServices(
        clients=[client], version=VERSION, template=numbers_template(), graders=graders
    )
    return step_context(run, services, prompts(8), recorded=recorded)


def test_answers_that_are_stopped_are_neither_graded_nor_counted(folder: Path) -> None:
    """Two of four prompts are wanted. The first one's answers are stopped. The last one's are complete, but only after
    the stop."""
    order, _ = Cursor(name="prompts", size=8, seed=0, data="").take(4)
    submitted: list[str] = []

    class Noting(Graders):
        def submit(self, response: Response) -> PendingGrade:
            submitted.append(response.text)
            return super().submit(response)

    def answers(number: int, aborted: threading.Event) -> Sequence[Sequence[int]]:
        if number in order[1:3]:
            return group(number)
        assert aborted.wait(LIMIT_S)
        return group(number) if number == order[3] else ([number + 50], [number + 60])

    with Noting(function(folder, "judge")) as graders, recorded_server(answers) as client:
        context = context_of(client, graders, extra=1.0)
        found = context.groups(2, num_rollouts=2)
        again = context_of(client, graders, extra=1.0, recorded=list(map(to_json, context.rounds)))
        assert again.groups(2, num_rollouts=2) == found, "from a checkpoint"
    assert [drawn.prompt.id for drawn, _ in found] == [str(number) for number in order[1:3]]
    assert [item.rewards for _, item in found] == [(26.0, 26.5), (11.0, 11.5)]
    assert sorted(submitted) == sorted(text for _, item in found for text in item.texts)
    (done,) = context.rounds
    assert [len(grades) for grades in done.grades] == [0, 2, 2, 0]
    assert [item.prompt.id for item in context.sources.unfinished] == [str(order[0]), str(order[3])]


def test_complete_answers_that_are_not_used_do_not_count(folder: Path, pipe: Pipe) -> None:
    """The third prompt is complete first, but the first two are used. Its failed gradings count in the next step, which
    uses it."""
    (folder / "my.py").write_text(
        MODULE + "def not_of_third(response):\n    note(response.text)\n"
        "    assert int(response.text) >= 10, response.text\n    return 1.0\n"
    )
    order, _ = Cursor(name="prompts", size=8, seed=0, data="").take(3)

    def answers(number: int, aborted: threading.Event) -> Sequence[Sequence[int]]:
        if number == order[2]:
            return [5, END], [6, END]
        if number == order[0]:
            assert pipe.next() == "5"
        if number == order[1]:
            assert aborted.wait(LIMIT_S), "it is complete after the stop, before the server knows of it"
        return group(number)

    with Graders(function(folder, "not_of_third")) as graders, recorded_server(answers) as client:
        context = context_of(client, graders, extra=0.5)
        found = context.groups(2, num_rollouts=2)
        assert [drawn.prompt.id for drawn, _ in found] == [str(number) for number in order[:2]]
        assert all(item.grades == (Grade(1.0), Grade(1.0)) for _, item in found)
        assert [item.prompt.id for item in context.sources.unfinished] == [str(order[2])]
        with pytest.raises(TooManyGraderErrors, match="2 of 4 gradings failed"):
            context.groups(2, num_rollouts=2)


def test_an_async_grader_gets_an_answer_while_it_works_on_another(folder: Path, pipe: Pipe) -> None:
    """The first call ends when the second has begun."""
    with GraderPool(function(folder, "pair", concurrency=2)) as pool:
        first = pool.submit([Response(text="1")])
        assert pipe.next() == "1"
        second = pool.submit([Response(text="2")])
        assert pool.wait([*first, *second]) == [Grade(1.0), Grade(2.0)]


def test_two_threads_grade_at_the_same_time(folder: Path, pipe: Pipe) -> None:
    """An evaluation does not wait until the step that is sampled ahead has all of its answers."""
    with GraderPool(function(folder, "pair", workers=1, concurrency=3)) as pool:
        waiting = pool.submit([Response(text="1")])
        assert pipe.next() == "1"
        assert pool.grade_all([Response(text="2")]) == [Grade(2.0)]
        assert pool.wait(waiting) == [Grade(1.0)]


def test_what_failed_sampling_has_added_is_not_graded(folder: Path, pipe: Pipe) -> None:
    os.mkfifo(folder / "release")
    rollout = Rollout(token_ids=(3, END), logprobs=(0.0, 0.0), finish_reason="stop", weight_version=0)
    with Graders(function(folder, "held")) as graders:
        first = graders.submit(Response(text="1"))
        assert pipe.next() == "1", "the only worker is at work"
        grading = Grading(asks(2), template=numbers_template(), graders=graders, max_error_rate=0)
        with contextlib.suppress(RolloutError), grading:
            grading.add(0, [rollout])
            raise RolloutError("a server is lost")
        grading.add(1, [rollout])
        (folder / "release").write_text("go on")
        assert graders.wait([first]) == [Grade(1.0)]
        assert graders.grade_all([Response(text="9")]) == [Grade(9.0)]
    assert pipe.next() == "9"
