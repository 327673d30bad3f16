"""Imports run without the garbage collector, and it is as before afterwards."""

from __future__ import annotations

import contextlib
import gc

import pytest

from megatron_chord.importing import importing


@pytest.fixture(autouse=True)
def collector() -> None:
    assert gc.isenabled()


def test_the_collector_is_off_inside_and_on_again_after_an_error() -> None:
    enabled = []
    with contextlib.suppress(ImportError), importing():
        enabled.append(gc.isenabled())
        raise ImportError
    assert [*enabled, gc.isenabled()] == [False, True]


def test_what_was_imported_is_no_longer_visited() -> None:
    with importing():
        kept = [[] for _ in range(1000)]
    tracked = {id(found) for found in gc.get_objects()}
    assert not tracked & {id(one) for one in kept}
    gc.unfreeze()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
