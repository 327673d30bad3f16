from __future__ import annotations

import dataclasses

import pytest

from megatron_chord.costs.gpus import GPUS, gpu_by_driver_name, gpu_named


def test_gpus_state_their_source() -> None:
    for gpu in GPUS.values():
        assert all(getattr(gpu, item.name) for item in dataclasses.fields(gpu))


def test_names_of_the_driver() -> None:
    found = gpu_by_driver_name("NVIDIA H200")
    assert found is not None
    assert found.memory == 141e9
    assert len({gpu.driver_name for gpu in GPUS.values()}) == len(GPUS)


@pytest.mark.parametrize("name", ["NVIDIA H100", "NVIDIA GeForce RTX 4090", ""])
def test_other_kinds_are_unknown(name: str) -> None:
    assert gpu_by_driver_name(name) is None


@pytest.mark.parametrize("name", ["H100-PCIe", "h100 pcie", "H100_PCIE", " h100-pcie"])
def test_names_in_any_case(name: str) -> None:
    assert gpu_named(name).peak_flops == 756e12


def test_every_name_is_found_and_another_is_refused() -> None:
    assert [gpu_named(name.upper()) for name in GPUS] == list(GPUS.values())
    assert {"b200", "gb200", "h100-pcie", "l40s", "mi300x"} <= GPUS.keys()
    with pytest.raises(ValueError, match="'h1000' is not known; known are h100, "):
        gpu_named("h1000")
