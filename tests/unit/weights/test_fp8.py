"""Block-quantised FP8 weights agree with hand arithmetic."""

from __future__ import annotations

import pytest
import torch

from megatron_chord.weights.fp8 import quantise


def test_a_block_by_hand() -> None:
    # The largest magnitude 896 = 2 x 448 gives a scale of 2. 448, 3 and 0.5 become 224, 1.5 and 0.25, which E4M3 has
    # exactly.
    weight = torch.zeros(3, 4)
    weight[0, 0], weight[1, 2], weight[2, 3], weight[0, 1] = -896.0, 448.0, 3.0, 0.5
    numbers, scales = quantise(weight)
    assert numbers.dtype == torch.float8_e4m3fn
    assert scales.tolist() == [[2.0]]
    assert numbers.float()[0, 0] == -448
    assert torch.equal(numbers.float() * 2, weight)


def test_every_block_has_its_own_scale_also_at_the_edges() -> None:
    weight = torch.zeros(130, 260, dtype=torch.bfloat16)
    weight[:128, 128:256], weight[128:, 256:] = 448.0, 44.75
    numbers, scales = quantise(weight)
    assert numbers.shape == (130, 260)
    assert scales.dtype == torch.float32
    assert scales.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, pytest.approx(44.75 / 448)]]
    assert numbers.float()[127, 128] == 448
    assert numbers.float()[129, 259] == 448
    assert numbers.float()[0, 0] == 0


def test_numbers_that_are_not_finite_are_refused() -> None:
    weight = torch.ones(4, 4)
    weight[2, 2] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight)
