"""BF16 tensors that are pushed to quantised layers are quantised again in place, and a missing tensor is an error."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.rollout import quantised
from tests.support.ranks import run_ranks

E4M3_MAX = 448.0


def dequantised(held: dict[str, Tensor]) -> Tensor:
    """Return FP32 weights [512, 200] from E4M3 numbers and the scale of each 128 x 128 block."""
    weight, scale = held["gate_up.weight"], held["gate_up.weight_scale_inv"]
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)
    return weight * scale[rows][:, columns]


def test_pushed_weights_are_quantised_in_place(tmp_path: Path) -> None:
    (results,) = run_ranks(quantised.push, 1, tmp_path)
    for name, version in {"start": 0, "version 1": 1, "version 2": 2}.items():
        types = {parameter: kind for parameter, (kind, _) in results[name].items()}
        held = {parameter: torch.from_numpy(values) for parameter, (_, values) in results[name].items()}
        sent = quantised.weights_of(version)
        assert types["gate_up.weight"] == "torch.float8_e4m3fn"
        assert types["gate_up.weight_scale_inv"] == "torch.float32"
        assert held["gate_up.weight_scale_inv"].shape == (4, 2)
        assert torch.equal(held["norm.weight"], sent["norm.weight"].float())
        exact = torch.cat([sent["gate.weight"], sent["up.weight"]]).float()
        largest = exact[:128, :128].abs().max()
        torch.testing.assert_close(held["gate_up.weight_scale_inv"][0, 0], largest / E4M3_MAX)
        # E4M3 has 3 bits of mantissa: half a step is 1/16 of the value, or of the smallest normal number times the
        # scale
        error = (dequantised(held) - exact).abs()
        assert (error <= exact.abs() / 16 * 1.01 + largest / E4M3_MAX * 2**-9).all()
    assert results["same memory"], "CUDA graphs keep pointing at it"
    assert results["unknown"] == [], "vLLM knows every name that a precision sets"
    assert "started with --quantization fp8_per_block" in results["other quantization"]
    assert "expects None" in results["other quantization"]
    assert "gate_up (51200 of 102400 elements)" in results["incomplete"]
