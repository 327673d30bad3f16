"""The sizes, dtypes and limits with which ``benchmarks/step.py`` and ``benchmarks/logprob_head.py`` judge a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.head_memory import head_limit
from benchmarks.samples import make_samples
from benchmarks.shapes import SHAPES, model_config
from benchmarks.shared import qwen2_config, save_model
from megatron_chord.costs.parameters import model_count
from megatron_chord.families.table import FAMILIES

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("name", "published"), [("7b", 7_615_616_512), ("70b", 70_553_706_496)])
def test_shapes_have_the_published_numbers_of_parameters(name: str, published: int) -> None:
    """The model cards of Qwen2.5-7B and Llama-3-70B have these numbers, from the index files of their weights."""
    assert model_count(FAMILIES[SHAPES[name]["model_type"]](model_config(name))) == published


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "F32"), ("bf16", "BF16")])
def test_weights_are_on_disk_in_the_dtype_that_was_asked_for(tmp_path: Path, dtype: str, stored: str) -> None:
    save_model(tmp_path, qwen2_config(hidden=64, layers=1, vocab=100), dtype)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {stored}  # noqa: SIM118


def test_the_head_may_take_its_gradients_and_a_tile_but_no_logits() -> None:
    """For 7B on a GPU, the gradients of [152064 + 8192, 3584] in BF16 and FP32 are 3.45 GB, and one tile is 0.27 GB."""
    sizes = {"tokens": 8192, "vocab": 152_064, "hidden": 3584, "itemsize": 2, "tile_bytes": 2**28}
    limit = head_limit(**sizes)
    assert limit == pytest.approx(1.1 * (160_256 * 3584 * 6 + 2**28) + 0.5e9)
    logits = 2 * 8192 * 152_064 * 4
    assert limit < 160_256 * 3584 * 2 + logits, "a head that makes all logits is told from one that does not"
    assert head_limit(**sizes | {"itemsize": 4}) < limit, "FP32 needs no second copy"


@pytest.mark.slow
def test_a_head_of_another_size_keeps_its_limit() -> None:
    """The weight's gradient [20000, 2048] in FP32 and BF16 is 0.25 of the 0.8 GB."""
    command = [sys.executable, str(ROOT / "benchmarks/logprob_head.py"), "--peers", "--naive-tokens", "0"]
    sizes = ["--tokens", "8", "--vocab", "20000", "--hidden", "2048", "--dtype", "bf16"]
    done = subprocess.run(
        [*command, *sizes], capture_output=True, text=True, timeout=300, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: extra peak below 0.78 GB" in done.stdout


@pytest.mark.slow
def test_a_step_says_its_tflops(tmp_path: Path) -> None:
    """A layer of hidden size 64 has 64 x 192 + 64 x 64 + 3 x 64 x 256 weights, and the head has 500 x 64."""
    save_model(tmp_path, qwen2_config(hidden=64, layers=1, vocab=500))
    sizes = ["--hidden", "64", "--layers", "1", "--vocab", "500", "--rollouts", "3", "--demonstrations", "1"]
    command = [sys.executable, str(ROOT / "benchmarks/step.py"), "--child", "ours", "--model", str(tmp_path)]
    done = subprocess.run(
        [*command, "--updates", "1", *sizes],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    lengths = [len(sample.token_ids) for sample in make_samples(rollouts=3, demonstrations=1, vocab=500)]
    weights = 64 * 192 + 64 * 64 + 3 * 64 * 256 + 500 * 64
    flops = 6 * weights * sum(lengths) + 6 * 64 * sum(length**2 for length in lengths)
    assert found["tflops_per_gpu"] * found["elapsed"] == pytest.approx(flops / 1e12)
    assert "mfu" not in found, "no GPU is known here"
