"""Notices a rank that does not move any more, names it, and ends the run so that it can be resumed.

A rank's main thread notes what it does and that it gets on (``Pulse``). A thread of the same process (``Watch``) writes
that to a file every few seconds, and looks for two faults:

    silence     another rank's file does not change: that process is stopped, hangs in the kernel, or its node is lost.
                Rank 0 looks at all ranks, and every rank at rank 0
    no progress this rank's main thread has been in one phase for longer than the phase may take without progress

The thread alone proves nothing of the main thread: only what the main thread noted counts. Whoever finds a fault says
it in one line, keeps the stacks of all ranks that still run, and ends its process with ``EXIT_CODE``, also while the
main thread waits in a collective. The launcher, or Slurm, then ends the other ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_chord.process_table import kill_descendants, state_of

EXIT_CODE = 79
"""Of a run that was ended because a rank did not move."""
FOLDER_VARIABLE = "CHORD_HEARTBEATS"
"""Environment variable: the folder for the ranks' files, empty at first; of a job, which has one for each restart."""
STACK_SIGNAL = signal.SIGUSR2
"""Has a rank print the stacks of all its threads to its standard error."""
_VERDICT = "verdict.json"
_FRAMES = 4
_READS = 20
"""Of a file that is just being written, until it is whole."""
_PACKAGE = str(Path(__file__).resolve().parents[1])
_STACKS_S = 10.0
"""At most, for other ranks to write their stacks before the one that found the fault ends."""

Phase = Literal[
    "loading", "collecting", "waiting for servers", "pushing", "computing", "evaluating", "saving"
]


class _Note(NamedTuple):
    phase: Phase
    position: int
    """Phases entered and micro-batches begun. Ranks run the same program, so the one that is behind is the slowest."""
    moved: float
    """time.monotonic() of that."""


class Pulse:
    """What the main thread does. To note it costs a look at the clock; nothing is written or locked."""

    def __init__(self) -> None:
        self._note = _Note("loading", 0, time.monotonic())
        self._helped = 0.0

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Around a part of the program; by the main thread, and on every rank alike."""
        before = self._note.phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def enter(self, name: Phase) -> None:
        """What the main thread does from now on, where it is in no part with a phase of its own."""
        self._enter(name)

    def tick(self) -> None:
        """Progress within the phase; by the main thread, and on every rank alike."""
        self._enter(self._note.phase)

    def helped(self, *phases: Phase) -> None:
        """Progress by another thread, which the main thread waits for where it is in one of ``phases``."""
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
    """Between two signs of life."""
    silence_s: float
    """Without a sign of life from a process."""
    phases: Mapping[Phase, float]
    """Without progress, for this rank's main thread; phases that are not named have no limit."""


class Watch:
    """This rank's sign of life, and its eye on others."""

    def __init__(
        self, pulse: Pulse, limits: Limits, *, rank: int, world_size: int, folder: Path | None, logs: Path
    ) -> None:
        """Start the thread.

        Args:
            folder: the same on all ranks, and seen by all; None in a world of one.
            logs: where the stacks go, in a folder of their own.
        """
        self._pulse = pulse
        self._limits = limits
        self._rank = rank
        self.folder = folder
        self._logs = logs
        self._main = threading.main_thread().ident
        self._count = 0
        self._awake_since = time.monotonic()
        others = range(1, world_size) if rank == 0 else (0,)
        self._seen: dict[int, tuple[dict[str, Any] | None, float]] = dict.fromkeys(
            others if folder is not None else (), (None, self._awake_since)
        )
        """Of each rank looked at: its last sign of life, and when it was seen first."""
        with contextlib.suppress(OSError, ValueError):  # no such stream
            faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)
        self._beat()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This rank's part is over."""
        self._closing.set()
        self._thread.join()
        if self.folder is not None:
            # The last one to leave takes the folders along.
            with contextlib.suppress(OSError):
                self._path(self._rank).unlink(missing_ok=True)
                self.folder.rmdir()
                self.folder.parent.rmdir()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(self._limits.beat_s):
            now = time.monotonic()
            if now - last > self._limits.silence_s / 2:
                self._forgive(now)
            last = now
            self._beat()
            found = self._verdict() or self._no_progress(now) or self._silence(now)
            if found is not None:
                self._end(found)

    def _forgive(self, now: float) -> None:
        """This process was stopped itself, or waited for its disk: what others did meanwhile it cannot know."""
        self._awake_since = now
        self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}

    def _beat(self) -> None:
        if self.folder is None:
            return
        self._count += 1
        text = json.dumps(self._own_beat())
        with contextlib.suppress(OSError):  # a disk that is full ends the run with its own message
            self.folder.mkdir(parents=True, exist_ok=True)
            # In place: of a file that is replaced, another node may see the former one for a minute (NFS).
            self._path(self._rank).write_text(text)

    def _own_beat(self) -> dict[str, Any]:
        note, now = self._pulse.read(), time.monotonic()
        return {
            "count": self._count,
            "node": _node(),
            "pid": os.getpid(),
            "phase": note.phase,
            "position": note.position,
            "still_s": round(now - max(note.moved, self._awake_since), 1),
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
        note = self._pulse.read()
        limit = self._limits.phases.get(note.phase)
        still_s = now - max(note.moved, self._awake_since)
        if limit is None or still_s <= limit:
            return None
        rank, beat = min(self._beats().items(), key=lambda item: (item[1]["position"], -item[1]["still_s"]))
        if beat["phase"] != note.phase:  # it may take its time there
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
                    del self._seen[rank]  # it has left
                    continue
                beat = None
            if beat is not None and (known is None or beat["count"] != known["count"]):
                self._seen[rank] = beat, now
            elif now - since > self._limits.silence_s:
                beat = known or {"node": "another node", "pid": 0, "phase": "loading", "at": "its beginning"}
                silent = (
                    f"has shown no sign of life for {now - since:.0f} s (limit {self._limits.silence_s:g} s)"
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
        """Say it, where no other rank has; keep the stacks; end this process and all that it has started."""
        if self.folder is not None and found["by"] == self._rank:
            try:
                with (self.folder / _VERDICT).open("x") as file:
                    json.dump(found, file)
            except FileExistsError:
                found = self._verdict() or found
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
        # The main thread may hold the stream's lock.
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
        """The last signs of life of all ranks that are there."""
        beats = {self._rank: self._own_beat()}
        for path in self.folder.glob("rank-*.json") if self.folder is not None else ():
            rank = int(path.stem.removeprefix("rank-"))
            if rank != self._rank:
                with contextlib.suppress(FileNotFoundError):
                    beat = self._read_whole(rank)
                    beats |= {rank: beat} if beat is not None else {}
        return beats

    def _read_whole(self, rank: int) -> dict[str, Any] | None:
        """As ``_read``, again where the file is just being written; then the last one that was seen.

        A process that is stopped while it writes leaves half a file.
        """
        for _ in range(_READS):
            beat = self._read(rank)
            if beat is not None:
                return beat
            time.sleep(0.01)
        return self._seen.get(rank, (None, 0.0))[0]

    def _read(self, rank: int) -> dict[str, Any] | None:
        """None where it is just being written. FileNotFoundError."""
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


def read_verdict(folder: Path) -> dict[str, Any] | None:
    """What a rank found wrong: ``text``, ``by`` (its rank), ``stacks`` (a folder)."""
    try:
        return json.loads((folder / _VERDICT).read_text())
    except (OSError, ValueError):  # not there, or just being written
        return None


def _node() -> str:
    """As Slurm calls it, in a job."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _what_is_wrong(beat: Mapping[str, Any]) -> str:
    if beat["node"] != _node():
        return "its process, its node or the shared file system there does not answer"
    state = state_of(beat["pid"])
    if state == "T":
        return "it is stopped (SIGSTOP)"
    if state in (None, "Z"):
        return "its process is gone"
    if state == "D":
        return "it hangs in the kernel (state D: a disk or a network file system?)"
    with contextlib.suppress(OSError):
        os.kill(beat["pid"], STACK_SIGNAL)
    return "it runs, but not its Python (a call into C that neither returns nor releases the interpreter?)"
