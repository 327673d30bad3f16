"""Transformer Engine's layer spec builds the same model as Megatron's local spec: only the modules differ.

Transformer Engine's Python code is real. Its kernels are missing, so nothing is computed here; ``tests/gpu`` does that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.doctor import requirements
from tests.distributed import te_specs
from tests.support.ranks import run_ranks
from tests.support.tiny import FAMILIES, save_model

MOE = tuple(name for name in FAMILIES if "moe" in name or name == "mixtral" or "deepseek" in name)
LINEAR = {
    "linear_qkv": "TELayerNormColumnParallelLinear",
    "linear_proj": "TERowParallelLinear",
    "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
    "mlp.linear_fc2": "TERowParallelLinear",
    "core_attention": "TEDotProductAttention",
    "experts": "TEGroupedMLP",
    "experts.linear_fc1": "TEColumnParallelGroupedLinear",
    "experts.linear_fc2": "TERowParallelGroupedLinear",
    "router": "TopKRouter",
    "output_layer": "ColumnParallelLinear",
}
"""The modules of a layer that compute, by the end of their names. With Transformer Engine they can compute in FP8."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install Transformer Engine's plain distribution (0.7 MB) in a folder of its own, so that Megatron finds it only
    here."""
    folder = tmp_path_factory.mktemp("engine")
    need = next(need for need in requirements() if need.name == "transformer-engine")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        str(need),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except subprocess.SubprocessError as error:
        pytest.skip(f"pip cannot install {need}: {getattr(error, 'stderr', '') or error}")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_model(name, root / name, layers=2) for name in FAMILIES}


@pytest.fixture(autouse=True)
def found(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{engine}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.parametrize(
    ("precision", "recipe"),
    [
        (None, None),
        # the scales are FP32, not powers of 2
        ("fp8_e2e", ("Float8BlockScaling", "E4M3", False)),
        ("fp8_tensorwise", ("Float8CurrentScaling", "HYBRID", False)),
    ],
)
def test_every_family(folders: dict[str, Path], precision: Any, recipe: Any) -> None:
    (described,) = run_ranks(te_specs.models, 1, folders, {}, precision)
    for name, by_spec in described.items():
        assert_the_same_model(name, by_spec)
        assert by_spec["te"]["recipe"] == recipe, name


def test_cut_over_a_tensor_axis(folders: dict[str, Path]) -> None:
    layout = {"tensor": 2, "sequence_parallel": True}
    for described in run_ranks(te_specs.models, 2, folders, layout, "fp8_tensorwise"):
        for name, by_spec in described.items():
            assert_the_same_model(name, by_spec)
            assert by_spec["te"]["cut"], name


def test_a_checkpoint_of_local_layers_is_loaded_and_extra_states_do_not_execute(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Transformer Engine's modules unpickle extra states without a check. A load past ours shows that the test can
    fail."""
    chosen = {name: folders[name] for name in ("qwen2", "mixtral")}
    (results,) = run_ranks(te_specs.load_checkpoints, 1, chosen, tmp_path)
    for name, found in results.items():
        assert found["wrong"] == [], name
        assert found["missing"], "a checkpoint of local layers lacks some extra states"
        assert found["pickles"] >= 8, name  # four modules in each of two layers
        assert (found["after our load"], found["after theirs"]) == (False, True), name


def assert_the_same_model(name: str, by_spec: dict[str, Any]) -> None:
    engine, local = by_spec["te"], by_spec["local"]
    for what in ("weights", "cut", "saved"):
        assert engine[what] == local[what], (name, what)
    for ending, kind in LINEAR.items():
        of_kind = {found for path, found in engine["modules"].items() if f".{path}".endswith(f".{ending}")}
        wanted = ending in ("linear_proj", "core_attention", "output_layer") or (
            name in MOE if "experts" in ending or ending == "router" else None
        )
        assert of_kind <= {kind}, (name, ending)
        assert of_kind or not wanted, (name, ending)
    assert engine["adds in a fixed order"] == (name in MOE), name
    assert not local["adds in a fixed order"], f"{name}: its kernels are Transformer Engine's"
    assert engine["packing"], name
    for passed, unknown in engine["packing"]:
        # Otherwise the host waits in every layer until the device has compared lengths.
        assert "pad_between_seqs" in passed, name
        assert not unknown, name
    # A checkpoint also holds what Transformer Engine's modules save beside their weights.
    linear = {
        path for path, kind in engine["modules"].items() if kind.endswith("ParallelLinear") and "TE" in kind
    }
    assert linear
    saved = engine["state"] | {
        key.replace("decoder.layers.", "decoder.layers.{}.") for key in engine["state"]
    }
    missing = {
        path for path in linear if not saved & {f"{path}._extra_state", f"{_any_layer(path)}._extra_state"}
    }
    assert not missing, name


def _any_layer(path: str) -> str:
    """Replace a layer's number by a common name. Megatron saves equal parts of all layers under one name."""
    return re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.{}.", path)
