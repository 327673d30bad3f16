"""An endless order over several data sets in which each has its share of the items.

The weights alone decide which data set is next; there is no random number. Item k of a data set with weight w (k = 0,
1, ...) is due at time (k + 1/2) / w. Items are taken in the order of these times; at equal times the data set that is
listed first comes first. So after n items, each of the m data sets has contributed n w / (sum of weights) items, with
an error of at most (m + 1) / 2 for every n. Every data set has its own shuffled order (``Cursor``) and epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any

from megatron_chord.data.cursor import Cursor, fingerprint
from megatron_chord.records import Demonstration, Prompt


@dataclass(frozen=True, kw_only=True)
class MixedCursor:
    """A position in the endless order of several data sets. Immutable, like ``Cursor``.

    Indices number the items of all data sets, one data set after the other.
    """

    name: str
    parts: tuple[Cursor, ...]
    """The cursor of each data set, at position 0."""
    weights: tuple[Fraction, ...]
    position: int = 0
    """Number of items taken since the start of the run, from all data sets."""

    def __post_init__(self) -> None:
        assert len(self.parts) == len(self.weights) > 1
        assert min(self.weights) > 0

    @property
    def size(self) -> int:
        """Number of items of all data sets."""
        return sum(part.size for part in self.parts)

    def take(self, count: int) -> tuple[list[int], MixedCursor]:
        """The next ``count`` indices and the cursor after them."""
        assert count >= 0
        end = self.position + count
        return [self.index_at(position) for position in range(self.position, end)], replace(
            self, position=end
        )

    def index_at(self, position: int) -> int:
        """The index of the item at a position in the endless order."""
        taken = self._taken(position)
        part = self._next(taken)
        before = sum(other.size for other in self.parts[:part])
        return before + self.parts[part].index_at(taken[part])

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain JSON: the position and the cursor of each data set."""
        taken = self._taken(self.position)
        return {
            "name": self.name,
            "position": self.position,
            "weights": list(map(str, self.weights)),
            "sources": [
                replace(part, position=count).state() for part, count in zip(self.parts, taken, strict=True)
            ],
        }

    def restored(self, state: dict[str, Any]) -> MixedCursor:
        """This cursor at the position of ``state``.

        Raises:
            ValueError: ``state`` belongs to other data sets, weights or another seed.
        """
        expected = self.state()
        if set(state) != set(expected):
            raise ValueError(
                f"data.{self.name}: the checkpoint was written with one source, and there are "
                f"{len(self.parts)} now"
            )
        names, saved = [part.name for part in self.parts], [source["name"] for source in state["sources"]]
        if names != saved:
            raise ValueError(f"data.{self.name}: the sources were {', '.join(saved)}, now {', '.join(names)}")
        if state["weights"] != expected["weights"]:
            raise ValueError(
                f"data.{self.name}: cannot continue in the saved order: the weights were "
                f"{', '.join(state['weights'])} and are {', '.join(expected['weights'])}"
            )
        for part, source in zip(self.parts, state["sources"], strict=True):
            part.restored(source)
        restored = replace(self, position=state["position"])
        if restored.state() != state:
            raise ValueError(f"data.{self.name}: the saved positions do not fit each other: {state}")
        return restored

    def _taken(self, position: int) -> list[int]:
        """For each data set, how many of the first ``position`` items come from it."""
        # Start at a time that is certainly not too late. Until then, round(time x weight) items come from each data
        # set. Add the others one by one.
        time = Fraction(max(0, position - len(self.parts))) / sum(self.weights)
        taken = [int(time * weight + Fraction(1, 2)) for weight in self.weights]
        for _ in range(position - sum(taken)):
            taken[self._next(taken)] += 1
        return taken

    def _next(self, taken: Sequence[int]) -> int:
        """The data set whose next item is due first."""
        due = [(count + Fraction(1, 2)) / weight for count, weight in zip(taken, self.weights, strict=True)]
        return due.index(min(due))


def cursor_over(
    name: str,
    records: Sequence[Prompt | Demonstration],
    weights: dict[str, float],
    *,
    seed: int,
    tag: str = "",
) -> Cursor | MixedCursor:
    """The cursor over records that are ordered by source.

    Args:
        name: prompts or demonstrations.
        weights: of each source, by the name that its records carry, in their order.
        tag: used in place of ``name`` to derive the shuffled order.

    Raises:
        ValueError: a source has no records.
    """
    if len(weights) == 1:
        return _cursor(tag or name, records, seed)
    by_source = {source: [record for record in records if record.source == source] for source in weights}
    if empty := [source for source, own in by_source.items() if not own]:
        raise ValueError(f"data.{name}: no usable row is left in {', '.join(empty)}")
    exact = [Fraction(str(weight)) for weight in weights.values()]
    scale = lcm(*(weight.denominator for weight in exact))
    return MixedCursor(
        name=name,
        parts=tuple(_cursor(f"{tag or name}/{source}", own, seed) for source, own in by_source.items()),
        weights=tuple(weight * scale for weight in exact),
    )


def _cursor(name: str, records: Sequence[Prompt | Demonstration], seed: int) -> Cursor:
    return Cursor(name=name, size=len(records), seed=seed, data=fingerprint(records))
