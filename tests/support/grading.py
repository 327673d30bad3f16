"""Functions that grade plain pairs of text and truth."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_chord.rewards.pool import Grade, GraderPool
from megatron_chord.rewards.response import Response


def grades_of(pool: GraderPool, items: Sequence[tuple[str, str]]) -> list[Grade]:
    """Return the grade of each pair of text and truth."""
    return pool.grade_all([Response(text=text, truth=truth) for text, truth in items])
