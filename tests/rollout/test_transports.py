"""Staging memory can be shared."""

from __future__ import annotations

import pytest
import torch

from megatron_chord.rollout.transports import without_expandable_segments


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        (
            "max_split_size_mb:512,expandable_segments:True,roundup_power2_divisions:[256:1,512:2]",
            "max_split_size_mb:512,expandable_segments:False,roundup_power2_divisions:[256:1,512:2]",
        ),
        ("max_split_size_mb:512", "max_split_size_mb:512"),
    ],
)
def test_expandable_segments_are_off_for_staging_memory_alone(settings: str, within: str) -> None:
    """torch forgets every setting that is not named when it gets new ones, so all of them are given again."""
    before = torch._C._accelerator_getAllocatorSettings()
    torch._C._accelerator_setAllocatorSettings(settings)
    found = []
    try:
        with without_expandable_segments():
            found.append(torch._C._accelerator_getAllocatorSettings())
        assert found == [within]
        assert torch._C._accelerator_getAllocatorSettings() == settings
    finally:
        torch._C._accelerator_setAllocatorSettings(before)
