"""Which published models can train in FP8 over which tensor axis, how packed batches are padded, and what is set.

Sizes come from the published config.json files. The expected verdicts were worked out by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config import ModelConfig, ParallelConfig
from megatron_chord.config_io import dump_config
from megatron_chord.data.packing import make_layout
from megatron_chord.model.build import check_overrides, check_shape, transformer_config
from megatron_chord.model.fp8 import check_fp8, matrix_sizes, optimizer_settings, transformer_settings
from megatron_chord.precision import PRESETS, Precision, preset
from tests.support.published import shape_of
from tests.support.tiny import save_model, tiny_run

DENSE = (
    "qwen2.5-7b",
    "llama-3.1-8b",
    "qwen3-8b",
    "qwen2.5-32b",
    "qwen3-32b",
    "llama-3.1-70b",
    "qwen2.5-72b",
)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("name", DENSE)
def test_blocks_of_128_by_model_and_tensor_axis(name: str, tensor: int) -> None:
    shape = shape_of(name)
    impossible = {("qwen2.5-72b", 2): "14784", ("qwen2.5-72b", 4): "7392", ("qwen2.5-72b", 8): "3696"}
    parallel = ParallelConfig(tensor=tensor)
    if (name, tensor) == ("qwen2.5-7b", 8):
        with pytest.raises(ValueError, match="28 attention heads / tensor 8"):
            check_shape(shape, parallel)
        assert dict(matrix_sizes(shape, parallel))["MLP width 18944 / tensor 8"] == 2368
        return
    check_shape(shape, parallel)
    check_fp8(shape, parallel, "fp8_tensorwise")
    for precision in ("bf16", "fp8_rollout", None):
        check_fp8(shape, parallel, precision)
    if (name, tensor) not in impossible:
        check_fp8(shape, parallel, "fp8_e2e")
        return
    with pytest.raises(ValueError, match="precision fp8_e2e") as refused:
        check_fp8(shape, parallel, "fp8_e2e")
    assert f"MLP width 29568 / tensor {tensor} = {impossible[name, tensor]}." in str(refused.value)
    for alternative in ("fp8_tensorwise", "parallel.tensor 1", "fp8_rollout"):
        assert alternative in str(refused.value)


def test_experts_are_not_cut() -> None:
    shape = shape_of("qwen3-30b-a3b")
    parallel = ParallelConfig(tensor=4, expert=4, sequence_parallel=True)
    assert dict(matrix_sizes(shape, parallel)) == {
        "hidden size 2048": 2048,
        "queries, keys and values of 32 heads / tensor 4": (8 + 2) * 128,
        "attention output of 32 heads / tensor 4": 1024,
        "expert width 768": 768,
    }
    check_fp8(shape, parallel, "fp8_e2e")


def test_shapes_that_are_not_even_multiples_of_16() -> None:
    shape = replace(shape_of("llama-3.1-8b"), ffn_size=11000)  # 8 x 1375
    for precision in ("fp8_e2e", "fp8_tensorwise"):
        with pytest.raises(ValueError, match="MLP width 11000 = 11000") as refused:
            check_fp8(shape, ParallelConfig(), precision)
        assert str(refused.value).endswith("Possible instead: precision fp8_rollout, or none (BF16 training)")


@pytest.mark.parametrize(
    ("precision", "axes", "expected"),
    [
        # worked examples of NeMo-RL for its own rule
        ("fp8_e2e", {"tensor": 4, "context": 2, "sequence_parallel": True}, 2048),
        ("fp8_e2e", {"tensor": 4, "context": 1, "sequence_parallel": True}, 512),
        # 128 x 1, 128 x 1 (no sequence parallelism), 128 x 2 x 2, 16 x 1, 16 x (2 x 2) x 4
        ("fp8_e2e", {}, 128),
        ("fp8_e2e", {"tensor": 4}, 128),
        ("fp8_e2e", {"context": 2}, 512),
        ("fp8_tensorwise", {}, 16),
        ("fp8_tensorwise", {"tensor": 4, "context": 2, "sequence_parallel": True}, 256),
        # stages and data ranks have no effect
        ("fp8_e2e", {"pipeline": 4, "data": 8, "tensor": 4, "sequence_parallel": True}, 512),
        # without FP8 in the trainer: what sequence and context parallelism need
        ("fp8_rollout", {"tensor": 4, "context": 2, "sequence_parallel": True}, 8),
        ("bf16", {}, 1),
        (None, {"tensor": 4, "sequence_parallel": True}, 4),
    ],
)
def test_packed_length(precision: Precision | None, axes: dict[str, Any], expected: int) -> None:
    one = {"data": 1, "tensor": 1, "pipeline": 1, "context": 1, "sequence_parallel": False, "virtual": False}
    layout = make_layout(**one | axes, fp8=preset(precision).training)
    assert layout.batch_multiple == expected
    assert layout.sequence_multiple == (2 * axes["context"] if axes.get("context", 1) > 1 else 1)


def test_what_megatron_is_told() -> None:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    expected = {"fp8_e2e": ("e4m3", "blockwise", False), "fp8_tensorwise": ("hybrid", "tensorwise", True)}
    for precision, (number_format, recipe, first_last) in expected.items():
        training = PRESETS[precision].training
        config = TransformerConfig(
            num_layers=2, hidden_size=128, num_attention_heads=2, **transformer_settings(training)
        )
        assert (config.fp8, config.fp8_recipe, config.first_last_layers_bf16) == (
            number_format,
            recipe,
            first_last,
        )
        assert not config.fp8_param
        optimizer = OptimizerConfig(optimizer="adam", **optimizer_settings(training))
        assert optimizer.fp8_recipe == recipe
        assert not optimizer.use_precision_aware_optimizer
    assert transformer_settings(None) == optimizer_settings(None) == {}


def test_fp8_is_never_silently_ignored(tmp_path: Path) -> None:
    shape = shape_of("qwen2.5-7b")
    model = ModelConfig(path=tmp_path)
    with pytest.raises(ValueError, match="needs a CUDA device and Transformer Engine"):
        transformer_config(shape, model, ParallelConfig(), PRESETS["fp8_e2e"].training)
    for name, value in {"fp8": "e4m3", "fp8_recipe": "delayed", "fp8_param": True}.items():
        with pytest.raises(ValueError, match=f"{name} cannot be set: precision sets it"):
            check_overrides({name: value}, shape)


def test_transformer_engine_reads_the_environment_when_it_is_imported() -> None:
    code = """
import os, sys, types
from megatron_chord.model.fp8 import set_environment
set_environment("fp8_tensorwise")
assert "NVTE_FP8_BLOCK_SCALING_FP32_SCALES" not in os.environ
set_environment("fp8_e2e")
assert os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == "1"
assert "megatron.core" not in sys.modules
sys.modules["transformer_engine"] = types.ModuleType("transformer_engine")
set_environment("fp8_e2e")  # as it should be
os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "0"
try:
    set_environment("fp8_e2e")
except RuntimeError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NVTE_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "set NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1" in done.stdout


START = {
    "command": "from megatron_chord.cli import main; main(['train', sys.argv[1]])",
    "loop": """
from megatron_chord.config_io import load_config
from megatron_chord.train.loop import train
train(load_config(Path(sys.argv[1])))
""",
}
"""The two places at which a rank checks its settings."""


@pytest.mark.parametrize("start", START)
def test_a_run_with_overrides_sets_the_environment_before_its_checks(start: str, tmp_path: Path) -> None:
    """The check of overrides imports Megatron-Core, which imports Transformer Engine. Here this ends the process."""
    stub = tmp_path / "path" / "transformer_engine"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(
        "import os, sys\nsys.exit('scales: ' + os.environ.get('NVTE_FP8_BLOCK_SCALING_FP32_SCALES', 'not set'))\n"
    )
    run = tiny_run(save_model("qwen2", tmp_path / "model"))
    model = replace(run.model, dtype="bf16", megatron_overrides={"attention_backend": "fused"})
    settings = tmp_path / "run.yaml"
    settings.write_text(dump_config(replace(run, model=model, precision="fp8_e2e")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom pathlib import Path\n{START[start]}", str(settings)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(stub.parent), *sys.path])},
    )
    assert done.stderr.endswith("scales: 1\n"), done.stderr


def test_attention_backend_by_name(tmp_path: Path) -> None:
    shape = shape_of("qwen2.5-7b")
    config = transformer_config(
        shape, ModelConfig(path=tmp_path, megatron_overrides={"attention_backend": "fused"}), ParallelConfig()
    )
    assert config.attention_backend.name == "fused"
    unknown = ModelConfig(path=tmp_path, megatron_overrides={"attention_backend": "fast"})
    with pytest.raises(
        ValueError, match="attention_backend 'fast' is none of flash, fused, unfused, local, auto"
    ):
        transformer_config(shape, unknown, ParallelConfig())
