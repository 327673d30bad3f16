"""One row as a loader read it, for code that inspects a data set without training on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_chord.records import Compact, Message


@dataclass(frozen=True, kw_only=True)
class Observed:
    source: str = ""
    """The name that the row's source has in the run."""
    file: str
    """Name of the row's file."""
    number: int
    """Number of the row in its file, from 1."""
    messages: tuple[Message, ...]
    """The messages as the chat template gets them, including the system prompt."""
    token_ids: tuple[int, ...] | Compact[int]
    trainable: tuple[bool, ...] | Compact[bool] = ()
    """For a demonstration, one value for each token; empty for a prompt."""
    truth: str | None = None
    """The ground truth of a prompt."""
    is_overlong: bool
    """True if the row exceeds a limit and is left out."""

    @property
    def place(self) -> str:
        """The file and row number, which are unique in the data set."""
        named = self.source and self.source != self.file.partition(".")[0]
        return f"{self.source}/{self.file}:{self.number}" if named else f"{self.file}:{self.number}"


Observe = Callable[[Observed], None]
"""Called for every row that can be used, and for rows whose only fault is their length."""
