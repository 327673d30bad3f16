"""Saves the checkpoints of a run, one at a time. Training may go on while one is written (``checkpoint.asynchronous``).

Every rank looks after its own part between two steps. A checkpoint gets its name only when all ranks have written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_chord.config import CheckpointConfig
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.train import checkpoint
from megatron_chord.train.checkpoint import Progress, Writing
from megatron_chord.train.state import TrainState


class Saver:
    """Every method but ``close`` and ``progress`` is called on every rank, and may raise what ``checkpoint.save``
    does."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        groups: ParallelGroups,
        notify: Callable[[str], None],
    ) -> None:
        """
        Args:
            folder: for the checkpoints.
            notify: gets a line for each finished checkpoint; only the coordinator's is used.
        """
        self._folder, self._settings, self._groups, self._notify = folder, settings, groups, notify
        self._writing: Writing | None = None
        stated = settings.asynchronous
        self._is_asynchronous = groups.device.type == "cuda" if stated is None else stated

    def save(
        self, state: TrainState, run_state: dict[str, Any], *, best: int | None, waits: bool = False
    ) -> None:
        """Save a checkpoint (``checkpoint.save``). The previous checkpoint is finished first.

        It may still be written when this returns, unless ``waits`` is true.
        """
        self.wait()
        self._writing = checkpoint.begin(
            state,
            run_state,
            self._folder,
            keep=self._settings.keep,
            best=best,
            notify=self._notify,
            may_stage=self._is_asynchronous and not waits,
        )
        if not self._writing.is_staged:
            self.wait()

    @property
    def progress(self) -> Progress:
        """The progress of this rank's part of the checkpoint that is being written; ``written`` if there is none."""
        return self._writing.progress if self._writing is not None else "written"

    def settle(self, progress: Sequence[Progress]) -> None:
        """Finish the checkpoint if all ranks have written their parts. If one rank has failed, stop the others and
        raise its error.

        Args:
            progress: of all ranks.
        """
        if "failed" in progress and self._writing is not None:
            writing, self._writing = self._writing, None
            with self._groups.pulse.phase("saving"):
                writing.fail()
        if all(one == "written" for one in progress):
            self.wait()

    def wait(self) -> None:
        """Finish the checkpoint that is being written, if there is one."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        with self._groups.pulse.phase("saving"):
            path = writing.finish()
        if self._groups.is_coordinator:
            self._notify(f"checkpoint {path}")

    def close(self) -> None:
        """Give up the checkpoint that is being written, if there is one. No collectives."""
        if self._writing is not None:
            self._writing.give_up()
            self._writing = None
