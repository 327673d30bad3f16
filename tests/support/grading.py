"""Grades of plain pairs of text and truth, and graders without processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from megatron_chord.records import Grade
from megatron_chord.rewards.graders import PendingGrade
from megatron_chord.rewards.pool import GraderPool
from megatron_chord.rewards.response import Response


def grades_of(pool: GraderPool, items: Sequence[tuple[str, str]]) -> list[Grade]:
    """Return the grade of each pair of text and truth."""
    return pool.grade_all([Response(text=text, truth=truth) for text, truth in items])


class GradersAtOnce:
    """``Graders`` with one term, a function that is called in the caller's thread."""

    def __init__(self, grade: Callable[[Response], Grade]) -> None:
        self._grade = grade

    def submit(self, response: Response) -> PendingGrade:
        done: Future[list[Grade]] = Future()
        done.set_result([self._grade(response)])
        return PendingGrade(response=response, started={"at once": done})

    def wait(
        self, pending: Sequence[PendingGrade], *, check: Callable[[], None] = lambda: None
    ) -> list[Grade]:
        return [grade for item in pending for future in item.started.values() for grade in future.result()]
