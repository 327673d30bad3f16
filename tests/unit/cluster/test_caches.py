"""A node does not use a folder of kernels that another user could fill."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.cluster.caches import make_own_caches


def test_a_missing_folder_is_made_for_the_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "vllm-7"
    for _ in range(2):
        make_own_caches({"VLLM_CACHE_ROOT": str(folder), "TRITON_CACHE_DIR": ""}, tmp_path)
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_elsewhere_is_not_touched(tmp_path: Path) -> None:
    make_own_caches({"VLLM_CACHE_ROOT": str(tmp_path / "scratch" / "vllm")}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match=rf"{name} is .*drwxrwxrwx"):
        make_own_caches({name: str(folder)}, tmp_path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir(mode=0o700)
    (tmp_path / "flashinfer-7").symlink_to(tmp_path / "planted")
    with pytest.raises(PermissionError, match="FLASHINFER_WORKSPACE_BASE"):
        make_own_caches({"FLASHINFER_WORKSPACE_BASE": str(tmp_path / "flashinfer-7")}, tmp_path)
