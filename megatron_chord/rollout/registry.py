"""The registry of a job's servers. Nodes announce their servers in it; the trainer requests replacements in it.

It is a folder on the job's shared file system, private to the user, with two small files for each server:

    server-003.json       written by the server's node when it is ready: its URL and its life (0, 1, ...)
    server-003.replace    written by the trainer: the last life that it has given up

In a job that evaluates, ``servers.json`` tells the nodes which servers to start. The evaluation writes it, because only
the evaluation knows the suite and the policy's folder.

Files are replaced atomically, so a reader sees either the old or the new file. The file with the servers' key
(``KEY_FILE``) is in the same folder, readable only by its owner.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from megatron_chord.files import write_whole
from megatron_chord.precision import Fp8Rollouts
from megatron_chord.rollout.server import ServerSettings
from megatron_chord.rollout.sync import TransportName

_JOB_FOLDER, _JOB_NODES = "CHORD_EVALUATION_JOB", "CHORD_EVALUATION_NODES"
"""Environment variables in which the first node describes the job to its evaluation: ``JobNodes``."""
VARIABLE = "CHORD_ROLLOUT"
"""Environment variable in which a node describes the job's servers to its ranks: ``JobRollout`` as JSON."""
KEY_FILE = "key"
_ORDER = "servers.json"


@dataclass(frozen=True, kw_only=True)
class JobRollout:
    """What a rank of a job must know to use the job's servers."""

    folder: Path
    count: int
    address: str
    """Address of this rank's node that the servers can reach."""
    transport: TransportName
    """The transport for ``rollout.transport: auto``; it depends on where the servers run."""

    def to_variable(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self) | {"folder": str(self.folder)})}

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """Read the environment variable; None outside of a job that has its own servers."""
        text = environment.get(VARIABLE)
        if not text:
            return None
        fields = json.loads(text)
        return cls(**fields | {"folder": Path(fields["folder"])})


@dataclass(frozen=True, kw_only=True)
class JobNodes:
    """The nodes of a job that evaluates. All of them run servers for the evaluation on the first node."""

    folder: Path
    count: int

    def to_variables(self) -> dict[str, str]:
        return {_JOB_FOLDER: str(self.folder), _JOB_NODES: str(self.count)}

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """Read the environment variables; None outside of such a job."""
        folder, count = environment.get(_JOB_FOLDER), environment.get(_JOB_NODES)
        return cls(folder=Path(folder), count=int(count)) if folder and count else None


@dataclass(frozen=True, kw_only=True)
class ServerOrder:
    """The servers that each node of a job that samples starts."""

    model: Path
    """Hugging Face folder."""
    settings: ServerSettings
    """A node sets ``visible_devices`` itself."""
    count: int
    """Number of servers of a node."""
    start_s: float
    """Longest time from the start of a server until it answers."""
    restarts: int
    """How many times each server is replaced."""


@dataclass(frozen=True, kw_only=True)
class Announcement:
    url: str
    node: str
    life: int
    """Number of servers that ran under this index before."""


class Registry:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def order(self, order: ServerOrder) -> None:
        """Have all nodes start these servers."""
        fields = asdict(order) | {"model": str(order.model.resolve())}
        write_whole(self._folder / _ORDER, json.dumps(fields))

    def ordered(self) -> ServerOrder | None:
        """The servers to start; None as long as this is not known."""
        text = _read(self._folder / _ORDER)
        if text is None:
            return None
        fields = json.loads(text)
        fp8 = fields["settings"]["fp8"]
        given = fields["settings"] | {"fp8": None if fp8 is None else Fp8Rollouts(**fp8)}
        settings = ServerSettings(**given)
        return ServerOrder(**fields | {"model": Path(fields["model"]), "settings": settings})

    def announce(self, server: int, announcement: Announcement) -> None:
        write_whole(self._path(server, "json"), json.dumps(asdict(announcement)))

    def announced(self, server: int) -> Announcement | None:
        """The newest announcement. The server may have stopped since."""
        text = _read(self._path(server, "json"))
        return None if text is None else Announcement(**json.loads(text))

    def give_up(self, server: int, life: int) -> None:
        """Request a new server instead of the one with this ``life``."""
        write_whole(self._path(server, "replace"), str(life))

    def given_up(self, server: int) -> int:
        """The last life that was given up; -1 if none was."""
        text = _read(self._path(server, "replace"))
        return -1 if text is None else int(text)

    def _path(self, server: int, kind: str) -> Path:
        return self._folder / f"server-{server:03d}.{kind}"


def read_key(folder: Path) -> str:
    """Read the key of the job's servers. Raises ValueError if other users could have read or written the file."""
    path = folder / KEY_FILE
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(
            f"{path} holds the servers' key and must belong to this user with mode 0600; it has mode "
            f"{stat.S_IMODE(status.st_mode):04o} and user {status.st_uid}"
        )
    key = path.read_text().strip()
    if len(key) < 20:
        raise ValueError(f"{path} must hold a key of at least 20 characters, it has {len(key)}")
    return key


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
