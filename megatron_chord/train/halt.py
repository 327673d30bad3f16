"""The errors that stop a run by themselves (docs/running.md): they end it with a message and an exit code.

There is no traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_chord.rollout.replies import RolloutError, StaleWeights
from megatron_chord.rollout.server import ServerError
from megatron_chord.rollout.sync import RankLost, SyncError
from megatron_chord.runtime.heartbeat import EXIT_CODE as EXIT_CODE_FROZEN
from megatron_chord.sampling.rounds import TooManyGraderErrors
from megatron_chord.train.agreement import LogprobMismatch
from megatron_chord.train.sanity import NonFiniteWeights
from megatron_chord.train.state import NonFiniteGradient

EXIT_CODE_NUMBERS = 70
"""Exit code if numbers are wrong: a resumed run would fail in the same way (EX_SOFTWARE of sysexits.h)."""
EXIT_CODE_SERVICE = 69
"""Exit code if a server or the graders failed: a resumed run may succeed (EX_UNAVAILABLE)."""

_NUMBERS = (LogprobMismatch, NonFiniteGradient, NonFiniteWeights, StaleWeights)
_SERVICE = (SyncError, RolloutError, ServerError, TooManyGraderErrors)
ERRORS = (*_NUMBERS, *_SERVICE)
"""Each of them is raised on every rank."""
ALONE = (RankLost,)
"""Raised on the ranks that are left."""


class Halted(Exception):
    """The run has stopped itself. The message begins with the name of the error in docs/running.md."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def halting() -> Iterator[None]:
    """Turn the listed errors into ``Halted``."""
    try:
        yield
    except _NUMBERS as error:
        raise _halted(error, EXIT_CODE_NUMBERS) from error
    except _SERVICE as error:
        raise _halted(error, EXIT_CODE_SERVICE) from error
    except ALONE as error:
        raise _halted(error, EXIT_CODE_FROZEN) from error


def _halted(error: Exception, exit_code: int) -> Halted:
    return Halted(f"{type(error).__name__}: {error}", exit_code=exit_code)
