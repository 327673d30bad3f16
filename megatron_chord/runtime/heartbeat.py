"""The watchdog: it detects a frozen rank, names it, and ends the run so that it can be resumed.

The main thread of a rank records its phase and its progress (``Pulse``). A thread of the same process (``Watch``)
writes this record to a file every few seconds, the heartbeat. It also checks for two faults:

    silence      the file of another rank does not change: its process is stopped, hangs in the kernel, or its node is
                 lost. Rank 0 checks all ranks; every other rank checks rank 0
    no progress  this rank's main thread is in one phase for longer than the phase may take without progress

A running watchdog thread proves nothing about the main thread, so only the main thread's record counts. The rank
that finds a fault reports it in one line, saves the stacks of all ranks that still run, and ends its process with
``EXIT_CODE``, also if the main thread waits in a collective. The launcher, or Slurm, then ends the other ranks.

The file system may be what hangs, and with it the thread that writes the heartbeats. Therefore a second thread checks
the phases' limits without any file (``_last_resort``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_chord.files import overwrite
from megatron_chord.network import node_name
from megatron_chord.process_table import kill_descendants, state_of

EXIT_CODE = 79
"""Exit code of a run that was ended because a rank was frozen."""
FOLDER_VARIABLE = "CHORD_HEARTBEATS"
"""Environment variable with the folder for the ranks' files, which must be empty. A job sets it, to a new folder for
each restart."""
STACK_SIGNAL = signal.SIGUSR2
"""Signal on which a rank prints the stacks of all its threads to standard error."""
_VERDICT = "verdict.json"
_BEAT_BYTES = 1024
"""Length of the file of a heartbeat, if the heartbeat is not longer."""
_FRAMES = 4
_READS = 20
"""Maximum number of attempts to read a file that is being written."""
_PACKAGE = str(Path(__file__).resolve().parents[1])
_PRINT_S = 1.0
"""Maximum time that the last resort waits for its message to be printed."""
_STACKS_S = 10.0
"""Maximum time that the rank which found the fault waits for the stacks of the other ranks."""

Phase = Literal[
    "loading", "collecting", "waiting for servers", "pushing", "computing", "evaluating", "saving"
]


class _Note(NamedTuple):
    phase: Phase
    position: int
    """Number of phases entered and micro-batches begun. Ranks run the same program, so the smallest number shows the
    slowest rank."""
    moved: float
    """time.monotonic() of the last change of ``position``."""

    def still_s(self, now: float, awake_since: float) -> float:
        """Seconds without progress. Time before ``awake_since``, when the process was stopped, does not count."""
        return now - max(self.moved, awake_since)


class Pulse:
    """The record of the main thread's phase and progress. An update only reads the clock; it neither writes nor
    locks."""

    def __init__(self) -> None:
        self._note = _Note("loading", 0, time.monotonic())
        self._helped = 0.0

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Context manager for a phase of the program. The main thread of every rank uses it in the same places."""
        before = self._note.phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def enter(self, name: Phase) -> None:
        """Set the main thread's phase for all parts of the program that are not inside of ``phase``."""
        self._enter(name)

    def tick(self) -> None:
        """Record progress within the phase. The main thread of every rank calls it in the same places."""
        self._enter(self._note.phase)

    def progress_elsewhere(self, *phases: Phase) -> None:
        """Record progress of another thread. It counts if the main thread is in one of ``phases``, waiting for it."""
        if self._note.phase in phases:
            self._helped = time.monotonic()

    def read(self) -> _Note:
        note = self._note
        return note._replace(moved=max(note.moved, self._helped))

    def _enter(self, name: Phase) -> None:
        self._note = _Note(name, self._note.position + 1, time.monotonic())


@dataclass(frozen=True, kw_only=True)
class Limits:
    beat_s: float
    """Seconds between two heartbeats."""
    silence_s: float
    """Maximum time without a heartbeat from a process."""
    phases: Mapping[Phase, float]
    """Maximum time without progress of this rank's main thread, by phase. Other phases have no limit."""


class Watch:
    """The watchdog's thread: writes this rank's heartbeat and checks those of other ranks."""

    def __init__(
        self, pulse: Pulse, limits: Limits, *, rank: int, world_size: int, folder: Path | None, logs: Path
    ) -> None:
        """Start the thread.

        Args:
            folder: folder for the heartbeats, the same and visible on all ranks; None in a world of one.
            logs: parent of the folder to which stacks are written.
        """
        self._pulse = pulse
        self._limits = limits
        self._rank = rank
        self.folder = folder
        self._logs = logs
        self._main = threading.main_thread().ident
        self._count = 0
        self._num_bytes = _BEAT_BYTES
        """Length of the file of this rank's heartbeat."""
        self._ends_since = -math.inf
        """When this thread began to end the process. It then waits for the stacks of other ranks."""
        self._awake_since = time.monotonic()
        others = range(1, world_size) if rank == 0 else (0,)
        self._seen: dict[int, tuple[dict[str, Any] | None, float]] = dict.fromkeys(
            others if folder is not None else (), (None, self._awake_since)
        )
        """Last heartbeat of each checked rank, and the time at which that heartbeat was seen first."""
        with contextlib.suppress(OSError, ValueError):  # standard error may have no file descriptor
            faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)
        self._beat()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._last_resort, name="last resort", daemon=True).start()

    def close(self) -> None:
        """Stop the threads and remove this rank's heartbeat, unless its file system hangs."""
        self._closing.set()
        self._thread.join(self._limits.silence_s)
        if self.folder is not None and not self._thread.is_alive():
            # The last rank to leave removes the folders.
            with contextlib.suppress(OSError):
                self._path(self._rank).unlink(missing_ok=True)
                self.folder.rmdir()
                self.folder.parent.rmdir()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(self._limits.beat_s):
            now = time.monotonic()
            if now - last > self._limits.silence_s / 2:
                self._restart_clocks(now)
            last = now
            found = self._look(now)
            if found is not None:
                self._end(found)

    def _look(self, now: float) -> dict[str, Any] | None:
        """Write this rank's heartbeat. Returns the fault that another rank or this one has found, if there is one."""
        if not self._beat():
            # The disk is full, or cannot be written. Then the silence of others says nothing about them.
            self._forget_silence(now)
        return self._verdict() or self._no_progress(now) or self._silence(now)

    def _last_resort(self) -> None:
        """End this process if it is in a phase for ``silence_s`` longer than the phase may take.

        The other thread would have ended it, so that thread hangs: most likely in a file system that does not respond.
        This one therefore uses no file, and prints to standard error from a thread that it does not wait for.
        """
        last = awake_since = time.monotonic()
        while not self._closing.wait(self._limits.beat_s):
            now = time.monotonic()
            if now - last > self._limits.silence_s / 2:
                awake_since = now  # this process was stopped
            last = now
            note, limit = self._note_and_limit()
            still_s = note.still_s(now, awake_since)
            is_ending = now - self._ends_since <= _STACKS_S + self._limits.silence_s
            if limit is None or still_s <= limit + self._limits.silence_s or is_ending:
                continue
            line = (
                f"error: frozen: rank {self._rank} on {node_name()} (process {os.getpid()}) has made no progress for "
                f"{still_s:.0f} s (limit {limit:g} s), and its watchdog hangs, too (a file system that does not "
                f"respond?). It was {note.phase}, at {self._whereabouts()}\n"
            )
            threading.Thread(target=_print_with_stacks, args=(line,), daemon=True).start()
            time.sleep(_PRINT_S)
            if self._closing.is_set():
                return
            kill_descendants()
            os._exit(EXIT_CODE)

    def _note_and_limit(self) -> tuple[_Note, float | None]:
        """The present record of this rank's main thread, and the time limit of its phase in seconds; None: no
        limit."""
        note = self._pulse.read()
        return note, self._limits.phases.get(note.phase)

    def _restart_clocks(self, now: float) -> None:
        """Restart the measured times of all ranks. This is needed after this process itself was stopped or waited for
        its disk, because it does not know what the others did in that time."""
        self._awake_since = now
        self._forget_silence(now)

    def _forget_silence(self, now: float) -> None:
        """Restart the measured times without a heartbeat of other ranks."""
        self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}

    def _beat(self) -> bool:
        """Write this rank's heartbeat. Returns false if that is not possible; a full disk ends the run elsewhere, with
        its own message."""
        if self.folder is None:
            return True
        self._count += 1
        text = json.dumps(self._own_beat())
        self._num_bytes = max(self._num_bytes, len(text))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Written in place: if a file is replaced, another node may see the old one for a minute (NFS). The length
            # stays the same and the file is not truncated, so that a full disk does not matter.
            overwrite(self._path(self._rank), text.ljust(self._num_bytes).encode())
        except OSError:
            return False
        return True

    def _own_beat(self) -> dict[str, Any]:
        note, now = self._pulse.read(), time.monotonic()
        return {
            "count": self._count,
            "node": node_name(),
            "pid": os.getpid(),
            "phase": note.phase,
            "position": note.position,
            "still_s": round(note.still_s(now, self._awake_since), 1),
            "at": self._whereabouts(),
        }

    def _whereabouts(self) -> str:
        """The innermost frame of the main thread, and the innermost ones of this package."""
        frame = sys._current_frames().get(self._main or 0)
        places: list[str] = []
        while frame is not None and len(places) < _FRAMES:
            code = frame.f_code
            if not places or code.co_filename.startswith(_PACKAGE):
                file = "/".join(code.co_filename.split("/")[-2:])
                places.append(f"{file}:{frame.f_lineno} {code.co_name}")
            frame = frame.f_back
        return " < ".join(places)

    def _no_progress(self, now: float) -> dict[str, Any] | None:
        note, limit = self._note_and_limit()
        still_s = note.still_s(now, self._awake_since)
        if limit is None or still_s <= limit:
            return None
        rank, beat = min(self._beats().items(), key=lambda item: (item[1]["position"], -item[1]["still_s"]))
        if beat["phase"] != note.phase:  # the phase has just changed, and the limit is that of the old one
            rank, beat = self._rank, self._own_beat()
        return self._found(
            rank, beat, f"has made no progress for {beat['still_s']:.0f} s (limit {limit:g} s)"
        )

    def _silence(self, now: float) -> dict[str, Any] | None:
        for rank, (known, since) in list(self._seen.items()):
            try:
                beat = self._read(rank)
            except FileNotFoundError:
                if known is not None:
                    del self._seen[rank]  # the rank has ended normally
                    continue
                beat = None
            if beat is not None and (known is None or beat["count"] != known["count"]):
                self._seen[rank] = beat, now
            elif now - since > self._limits.silence_s:
                beat = known or {"node": "another node", "pid": 0, "phase": "loading", "at": "its beginning"}
                silent = (
                    f"has written no heartbeat for {now - since:.0f} s (limit {self._limits.silence_s:g} s)"
                )
                return self._found(rank, beat, f"{silent}: {_what_is_wrong(beat)}")
        return None

    def _found(self, rank: int, beat: Mapping[str, Any], what: str) -> dict[str, Any]:
        who = f"rank {rank} on {beat['node']} (process {beat['pid']})"
        stacks = self._logs / f"frozen-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        return {
            "text": f"frozen: {who} {what}. It was {beat['phase']}, at {beat['at']}",
            "by": self._rank,
            "stacks": str(stacks),
        }

    def _end(self, found: dict[str, Any]) -> None:
        """Report the fault unless another rank has; save the stacks; end this process and all its children."""
        self._ends_since = time.monotonic()
        if self.folder is not None and found["by"] == self._rank:
            try:
                with (self.folder / _VERDICT).open("x") as file:
                    json.dump(found, file)
            except FileExistsError:
                found = self._verdict() or found
            except OSError:
                pass  # a full disk: the fault is printed below
        stacks = Path(found["stacks"])
        with contextlib.suppress(OSError):
            stacks.mkdir(parents=True, exist_ok=True)
            with (stacks / f"rank-{self._rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        if found["by"] == self._rank:
            self._say(found, stacks)
        kill_descendants()
        os._exit(EXIT_CODE)

    def _say(self, found: Mapping[str, Any], stacks: Path) -> None:
        # Not print(): the main thread may hold the stream's lock.
        os.write(2, f"error: {found['text']}. Stacks: {stacks}\n".encode())
        beats = self._beats()
        rows = [
            f"rank {rank} on {beat['node']}: {beat['phase']}, {beat['still_s']} s without progress, "
            f"position {beat['position']}, at {beat['at']}"
            for rank, beat in sorted(beats.items())
        ]
        with contextlib.suppress(OSError):
            (stacks / "all-ranks.txt").write_text("\n".join([found["text"], "", *rows]) + "\n")
        deadline = time.monotonic() + min(_STACKS_S, 3 * self._limits.beat_s)
        while time.monotonic() < deadline and len(list(stacks.glob("rank-*.txt"))) < len(beats):
            time.sleep(0.1)

    def _beats(self) -> dict[int, dict[str, Any]]:
        """The last heartbeats of all ranks that have one."""
        beats = {self._rank: self._own_beat()}
        for path in self.folder.glob("rank-*.json") if self.folder is not None else ():
            rank = int(path.stem.removeprefix("rank-"))
            if rank != self._rank:
                with contextlib.suppress(FileNotFoundError):
                    beat = self._read_whole(rank)
                    beats |= {rank: beat} if beat is not None else {}
        return beats

    def _read_whole(self, rank: int) -> dict[str, Any] | None:
        """Read a heartbeat, repeatedly while the file is being written. If that fails, return the last one seen.

        A process that is stopped while it writes leaves an incomplete file.
        """
        for _ in range(_READS):
            beat = self._read(rank)
            if beat is not None:
                return beat
            time.sleep(0.01)
        return self._seen.get(rank, (None, 0.0))[0]

    def _read(self, rank: int) -> dict[str, Any] | None:
        """Read a heartbeat. None if it is being written. Raises FileNotFoundError if the rank has none."""
        try:
            return json.loads(self._path(rank).read_text())
        except FileNotFoundError:
            raise
        except (OSError, ValueError):
            return None

    def _verdict(self) -> dict[str, Any] | None:
        return read_verdict(self.folder) if self.folder is not None else None

    def _path(self, rank: int) -> Path:
        assert self.folder is not None
        return self.folder / f"rank-{rank}.json"


def _print_with_stacks(line: str) -> None:
    os.write(2, line.encode())
    with contextlib.suppress(OSError, ValueError):
        faulthandler.dump_traceback(2, all_threads=True)


def read_verdict(folder: Path) -> dict[str, Any] | None:
    """The fault that a rank has found: ``text``, ``by`` (its rank), ``stacks`` (a folder). None if there is none."""
    try:
        return json.loads((folder / _VERDICT).read_text())
    except (OSError, ValueError):  # missing, or being written
        return None


def read_beat(folder: Path, rank: int) -> dict[str, Any] | None:
    """A rank's last heartbeat: ``phase``, ``at`` (where its main thread was) and more. None if there is none, or if it
    is being written."""
    try:
        return json.loads((folder / f"rank-{rank}.json").read_text())
    except (OSError, ValueError):
        return None


def _what_is_wrong(beat: Mapping[str, Any]) -> str:
    if beat["node"] != node_name():
        return "its process, its node or the node's shared file system does not respond"
    state = state_of(beat["pid"])
    if state == "T":
        return "it is stopped (SIGSTOP)"
    if state in (None, "Z"):
        return "its process is gone"
    if state == "D":
        return "it hangs in the kernel (state D: a disk or a network file system?)"
    with contextlib.suppress(OSError):
        os.kill(beat["pid"], STACK_SIGNAL)
    return "it runs, but its Python code does not (a C call that neither returns nor releases the GIL?)"
