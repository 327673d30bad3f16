"""All graders of a run: a pool of processes for each term of the reward. Their grades are combined into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType

from megatron_chord.records import Grade
from megatron_chord.rewards.kinds.base import RewardKind
from megatron_chord.rewards.pool import GraderPool, RewardRefused
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import RewardConfig, terms_of


class Graders:
    """Grades with every term of a reward. Use it as a context manager.

    Raises:
        RewardRefused: the user's file or function cannot be used.
        RuntimeError: a worker does not start, with the reason it printed.
    """

    def __init__(self, reward: RewardConfig, *, on_grade: Callable[[], None] = lambda: None) -> None:
        """``on_grade`` is called after each grading of each term, from another thread."""
        self._terms = terms_of(reward)
        with ExitStack() as stack:
            self._pools = {
                name: stack.enter_context(GraderPool(term, on_grade=on_grade))
                for name, term in self._terms.items()
            }
            self._stack = stack.pop_all()

    def __enter__(self) -> Graders:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers. Running calls of ``wait`` raise. May be called twice."""
        self._stack.close()

    def submit(self, response: Response) -> PendingGrade:
        """Start to grade a response. From any thread.

        Terms that grade lists (``batch_size``) do not start: their lists are cut from all responses of ``wait``.

        Raises:
            RuntimeError: closed.
        """
        started: dict[str, Future[list[Grade]]] = {}
        for name, pool in self._pools.items():
            if not pool.takes_lists and self._terms[name].grades(response.source):
                (started[name],) = pool.submit([response])
        return PendingGrade(response=response, started=started)

    def wait(
        self, pending: Sequence[PendingGrade], *, check: Callable[[], None] = lambda: None
    ) -> list[Grade]:
        """One grade for each response, in their order. The terms grade at the same time.

        ``check`` is called in this thread before every wait, and about every second of it. Its exception ends the wait.

        Raises:
            RuntimeError: closed.
            TimeoutError: the workers of a term finished nothing for a long time.
            Exception: that of ``check``.
        """
        submitted: dict[str, tuple[list[int], Sequence[Future[list[Grade]]]]] = {}
        for name, pool in self._pools.items():
            chosen = [i for i, item in enumerate(pending) if self._terms[name].grades(item.response.source)]
            lists = pool.submit([pending[i].response for i in chosen]) if pool.takes_lists else None
            submitted[name] = chosen, lists or [pending[i].started[name] for i in chosen]
        try:
            found = {
                name: dict(zip(chosen, self._pools[name].wait(futures, check=check), strict=True))
                for name, (chosen, futures) in submitted.items()
            }
        finally:
            for _, futures in submitted.values():
                for future in futures:
                    future.cancel()
        return [
            combined(
                {name: grades[i] for name, grades in found.items() if i in grades}, of_many=len(found) > 1
            )
            for i in range(len(pending))
        ]

    def grade_all(self, responses: Sequence[Response]) -> list[Grade]:
        """One grade for each response, in their order. Raises: as ``submit`` and ``wait``."""
        return self.wait([self.submit(response) for response in responses])


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingGrade:
    """A response whose grading has been started."""

    response: Response
    started: Mapping[str, Future[list[Grade]]]
    """Future of the one grade of each started term that grades this response, by the term's name."""

    def is_done(self) -> bool:
        """True if all started terms are done."""
        return all(future.done() for future in self.started.values())

    def error(self) -> str | None:
        """The error of the first term that has failed so far; None if none has."""
        for future in self.started.values():
            if future.done() and not future.cancelled() and (error := future.result()[0].error) is not None:
                return error
        return None

    def cancel(self) -> None:
        """Do not grade the response, unless its grading has begun already."""
        for future in self.started.values():
            future.cancel()


def combined(grades: dict[str, Grade], *, of_many: bool) -> Grade:
    """Combine the terms' grades of a response, in the order of the terms, into one grade.

    The score is that of the first term. The parts are the score of every term, and its parts as ``term.part``. The
    grade has failed if one of the terms has failed. ``of_many``: the reward has several terms, even if only some of
    them grade this response.
    """
    if grades and not of_many:
        (grade,) = grades.values()
        return grade
    errors = [f"{name}: {grade.error}" for name, grade in grades.items() if grade.score is None]
    if errors or not grades:
        return Grade(None, "; ".join(errors) or "no reward grades prompts of this data source")
    parts: dict[str, float] = {}
    for name, grade in grades.items():
        parts[name] = grade.score or 0.0
        parts |= {f"{name}.{part}": value for part, value in grade.parts.items()}
    return Grade(next(iter(grades.values())).score, None, parts)


def check_reward(reward: RewardConfig) -> None:
    """Try to load the graders that are not part of this package, each in a process that then ends.

    Raises: RewardRefused: a grader cannot be used, with the reason.
    """
    for term in terms_of(reward).values():
        if term.RUNS_USERS_CODE:
            _load(term)


def _load(term: RewardKind) -> None:
    try:
        GraderPool(replace(term, workers=1)).close()
    except RewardRefused:
        raise
    except RuntimeError as error:
        raise RewardRefused(f"reward.path: {error}") from error
