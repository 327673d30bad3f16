"""Stops that docs/running.md lists: they end a run with their message and an exit code, not with a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_chord.rollout.client import RolloutError, StaleWeights
from megatron_chord.rollout.server import ServerError
from megatron_chord.rollout.sync import SyncError
from megatron_chord.sampling.rounds import TooManyGraderErrors
from megatron_chord.train.agreement import LogprobMismatch
from megatron_chord.train.sanity import NonFiniteWeights
from megatron_chord.train.state import NonFiniteGradient

EXIT_CODE_NUMBERS = 70
"""Numbers are wrong: resuming as it is ends the same way (EX_SOFTWARE of sysexits.h)."""
EXIT_CODE_SERVICE = 69
"""A server or the graders failed: worth another try (EX_UNAVAILABLE)."""

_NUMBERS = (LogprobMismatch, NonFiniteGradient, NonFiniteWeights, StaleWeights)
_SERVICE = (SyncError, RolloutError, ServerError, TooManyGraderErrors)


class Halted(Exception):
    """The run has stopped itself; the message begins with the stop's name in the documentation."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def halting() -> Iterator[None]:
    """Raise a listed stop as Halted."""
    try:
        yield
    except _NUMBERS as error:
        raise _halted(error, EXIT_CODE_NUMBERS) from error
    except _SERVICE as error:
        raise _halted(error, EXIT_CODE_SERVICE) from error


def _halted(error: Exception, exit_code: int) -> Halted:
    return Halted(f"{type(error).__name__}: {error}", exit_code=exit_code)
