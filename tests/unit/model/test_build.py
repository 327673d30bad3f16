"""Settings of Megatron that nobody may override."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.families.table import read_shape
from megatron_chord.model.build import check_overrides
from tests.support.tiny import save_qwen2


@pytest.mark.parametrize("name", ["cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"])
def test_cuda_graphs_are_refused(name: str, tmp_path: Path) -> None:
    """CUDA graphs keep the shapes and addresses of one pass. Here both change from pass to pass."""
    with pytest.raises(ValueError, match=f"{name} cannot be set: packed micro-batches differ in length"):
        check_overrides({name: "local"}, read_shape(save_qwen2(tmp_path, layers=1)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda_graph_modules", "packed micro-batches differ in length"),
        ("use_mup", "scale the model"),
        ("mup_output_mult", "scale the model"),
        ("gtp_weight_remat_size", "cut only over the tensor axis"),
        ("mla_down_proj_fusion", "one by one"),
    ],
)
def test_settings_of_newer_versions_are_refused_by_every_version(
    name: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be set: .*{reason}"):
        check_overrides({name: 2}, read_shape(save_qwen2(tmp_path, layers=1)))
