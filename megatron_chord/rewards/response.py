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
    """The row's true answer; empty where the row has none."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The prompt as chat messages, each with ``role`` and ``content``."""
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """All fields of the prompt's row, under the names that they have in the data file."""
    finish_reason: str = "stop"
    """stop: the policy ended the answer. length: the answer reached ``data.max_response_tokens``."""
    num_tokens: int = 0
    """Of the answer, the stop token included."""
    source: str = ""
    """Name of the prompt's data source."""


@dataclass(frozen=True, kw_only=True)
class RowNeeds:
    """What a reward reads of a prompt's row."""

    truth: bool = True
    """The true answer: a row without one is faulty."""
    fields: bool = False
    """All fields of the row."""
