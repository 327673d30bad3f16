"""All graders of a run: a pool of processes for each term of the reward. Their grades are combined into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from megatron_chord.rewards.kinds.base import RewardKind
from megatron_chord.rewards.pool import Grade, GraderPool, RewardRefused
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
        """Kill all workers. A running grade_all raises. May be called twice."""
        self._stack.close()

    def grade_all(self, responses: Sequence[Response]) -> list[Grade]:
        """One grade for each response, in their order. The terms grade at the same time.

        Raises:
            RuntimeError: closed.
        """

        def grades_of(name: str) -> dict[int, Grade]:
            term = self._terms[name]
            chosen = [i for i, response in enumerate(responses) if term.grades(response.source)]
            return dict(zip(chosen, self._pools[name].grade_all([responses[i] for i in chosen]), strict=True))

        if len(self._pools) == 1:
            found = {name: grades_of(name) for name in self._pools}
        else:
            with ThreadPoolExecutor(len(self._pools)) as threads:
                found = dict(zip(self._pools, threads.map(grades_of, self._pools), strict=True))
        return [
            combined(
                {name: grades[i] for name, grades in found.items() if i in grades}, of_many=len(found) > 1
            )
            for i in range(len(responses))
        ]


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
