"""An endless shuffled order over a data set, which can be resumed at any item.

No random generator is used: epoch e visits its items in the order of blake2b("name/seed/e/item"). The order depends
only on name, seed and size. Batch sizes, the number of ranks and the versions of libraries do not change it. A
position is one integer.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_chord.records import Demonstration, Prompt


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A position in the endless order. Immutable: `take` returns the cursor after the taken items."""

    name: str
    """Distinguishes the cursors of a run (`prompts`, `demonstrations`), so that their orders differ."""
    size: int
    """Number of items of the data set."""
    seed: int
    data: str
    """`fingerprint` of the data set."""
    position: int = 0
    """Number of items taken since the start of the run, over all epochs."""

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"{self.name}: a cursor needs at least one item, got {self.size}")

    @property
    def epoch(self) -> int:
        return self.position // self.size

    def take(self, count: int) -> tuple[list[int], Cursor]:
        """The next `count` indices and the cursor after them."""
        assert count >= 0
        end = self.position + count
        return [self.index_at(position) for position in range(self.position, end)], replace(
            self, position=end
        )

    def state(self) -> dict[str, int | str]:
        """The cursor's state for a checkpoint, as plain JSON."""
        return {
            "name": self.name,
            "size": self.size,
            "seed": self.seed,
            "data": self.data,
            "position": self.position,
        }

    def restored(self, state: dict[str, Any]) -> Cursor:
        """This cursor at the position of `state`.

        Raises:
            ValueError: `state` belongs to other data, another seed or another cursor.
        """
        expected = self.state()
        if "sources" in state:
            raise ValueError(
                f"{self.name}: the checkpoint was written with {len(state['sources'])} sources, and there is one now"
            )
        if set(state) != set(expected):
            raise ValueError(f"{self.name}: expected a cursor's state, got the fields {sorted(state)}")
        reasons = {
            "name": "it is another cursor's",
            "size": "the data set has another number of usable rows",
            "seed": "the run has another seed",
            "data": "the data set, its chat template or its token limits have changed",
        }
        for field, reason in reasons.items():
            if state[field] != expected[field]:
                raise ValueError(
                    f"{self.name}: cannot continue in the saved order, because {reason}: {field} was "
                    f"{state[field]!r} and is {expected[field]!r}"
                )
        position = state["position"]
        if isinstance(position, bool) or not isinstance(position, int) or position < 0:
            raise ValueError(f"{self.name}: the saved position must be a whole number >= 0, got {position!r}")
        return replace(self, position=position)

    def index_at(self, position: int) -> int:
        """The index of the item at a position in the endless order."""
        epoch, offset = divmod(position, self.size)
        return _epoch_order(self.name, self.seed, epoch, self.size)[offset]


def fingerprint(records: Iterable[Prompt | Demonstration]) -> str:
    """Hash of the contents of the records, in their order."""
    digest = hashlib.sha256()
    for record in records:
        extra = (
            record.truth.encode()
            if isinstance(record, Prompt)
            else np.asarray(record.trainable, np.bool_).tobytes()
        )
        parts = [record.id.encode(), np.asarray(record.token_ids, np.int64).tobytes(), extra]
        if isinstance(record, Prompt) and record.fields:
            parts.append(json.dumps(record.fields, sort_keys=True, default=str).encode())
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


@lru_cache(maxsize=64)  # the current epochs of a run's cursors, two of each source
def _epoch_order(name: str, seed: int, epoch: int, size: int) -> array[int]:
    prefix = hashlib.blake2b(f"{name}/{seed}/{epoch}/".encode())

    def key(index: int) -> bytes:
        item = prefix.copy()
        item.update(str(index).encode())
        return item.digest()

    return array("q", sorted(range(size), key=key))
