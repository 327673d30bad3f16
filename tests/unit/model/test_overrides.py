"""Settings of Megatron that cannot be laid over ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.families.table import read_shape
from megatron_chord.model.build import check_overrides
from tests.support.tiny import save_qwen2


@pytest.mark.parametrize("name", ["cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"])
def test_cuda_graphs_are_refused(name: str, tmp_path: Path) -> None:
    """They keep the shapes and addresses of one pass; neither lasts here."""
    with pytest.raises(ValueError, match=f"{name} cannot be set: packed micro-batches differ in length"):
        check_overrides({name: "local"}, read_shape(save_qwen2(tmp_path, layers=1)))
