from __future__ import annotations

import dataclasses

import pytest

from megatron_chord.costs.gpus import GPUS, gpu_by_driver_name


def test_gpus_state_their_source() -> None:
    for gpu in GPUS.values():
        assert all(getattr(gpu, item.name) for item in dataclasses.fields(gpu))


def test_names_of_the_driver() -> None:
    found = gpu_by_driver_name("NVIDIA H200")
    assert found is not None
    assert found.memory == 141e9
    assert len({gpu.driver_name for gpu in GPUS.values()}) == len(GPUS)


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H100", "NVIDIA GeForce RTX 4090", ""])
def test_other_kinds_are_unknown(name: str) -> None:
    assert gpu_by_driver_name(name) is None
