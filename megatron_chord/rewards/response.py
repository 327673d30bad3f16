"""The argument of a reward function. NumPy is not imported, because a grader process has little memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer of the policy to one prompt."""

    text: str
    """The answer, decoded, without special tokens."""
    truth: str = ""
    """The ground truth of the row; empty if the row has none."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The prompt as chat messages, each with ``role`` and ``content``."""
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """All fields of the prompt's row, under the names that they have in the data file."""
    finish_reason: str = "stop"
    """stop: the policy ended the answer. length: the answer reached ``data.max_response_tokens``."""
    num_tokens: int = 0
    """Number of tokens of the answer, including the stop token."""
    source: str = ""
    """Name of the prompt's data source."""


@dataclass(frozen=True, kw_only=True)
class RowNeeds:
    """The parts of a prompt's row that a reward reads."""

    truth: bool = True
    """True if it reads the ground truth. A row without one is then faulty."""
    fields: bool = False
    """True if it reads all fields of the row."""
