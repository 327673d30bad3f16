"""The CUDA device that a rank uses."""

from __future__ import annotations

import pytest

from megatron_chord.runtime.parallel import device_index


def test_a_rank_has_its_node_s_device_or_the_only_one_it_sees() -> None:
    assert [device_index(local, 8) for local in range(8)] == list(range(8))
    assert [device_index(local, 1) for local in range(8)] == [0] * 8


def test_more_ranks_than_devices() -> None:
    with pytest.raises(ValueError, match="local rank 4, but CUDA finds 4 devices"):
        device_index(4, 4)
