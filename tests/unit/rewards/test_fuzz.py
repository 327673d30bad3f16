"""Each grader's real workers survive hostile strings. `benchmarks/fuzz_graders.py` uses 10,000 for each."""

from __future__ import annotations

import pytest

from benchmarks.fuzz_graders import TRUTHS, fuzz


@pytest.mark.parametrize("kind", TRUTHS)
def test_hostile_text_is_graded_and_not_run(kind: str) -> None:
    grades, _, left = fuzz(kind, count=150, seed=1, timeout_s=60, workers=2)
    assert left == []
    assert [grade.error for grade in grades if grade.score is None] == []
    assert len(grades) == 150
