"""For random configurations, Megatron-Core's logits equal Transformers', or the folder is refused with the reason."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.random_logits import TOLERANCE, compare
from tests.support.random_models import FAMILIES
from tests.support.ranks import run_ranks

SEEDS = range(4 * len(FAMILIES))


def test_random_models_are_computed_as_transformers_does_or_refused(tmp_path: Path) -> None:
    """This test takes a small sample of seeds. ``benchmarks/random_models.py`` takes any number."""
    (outcomes,) = run_ranks(compare, 1, SEEDS, tmp_path)
    for one in outcomes:
        assert one.difference is None or one.difference < TOLERANCE, one
        assert one.largest is None or one.largest > 0.1, one
        assert one.refused is None or len(one.refused) > 20, one
    computed = {one.family for one in outcomes if one.difference is not None}
    assert computed == set(FAMILIES)
    assert any(one.refused for one in outcomes)
