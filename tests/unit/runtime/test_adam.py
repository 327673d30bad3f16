"""Gradient clipping without Transformer Engine and Apex: norm and scaling are compared with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_chord.runtime.adam import FusedAdam, l2_norm, scale


def test_norm_of_several_tensors() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(7), torch.randn(3, 5), torch.zeros(1)]
    norm, per_tensor = l2_norm(0, torch.zeros(1), [tensors], False)
    everything = np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])
    assert norm.shape == (1,)
    assert norm.item() == pytest.approx(np.sqrt((everything**2).sum()), rel=1e-6)
    assert per_tensor is None


def test_scaling_is_in_place() -> None:
    gradients = [torch.tensor([2.0, -4.0]), torch.tensor([[1.0]])]
    scale(0, torch.zeros(1), [gradients, gradients], 0.25)
    assert [gradient.tolist() for gradient in gradients] == [[0.5, -1.0], [[0.25]]]


def test_switches_of_other_adams_may_be_off_but_not_on() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    FusedAdam(parameters, amsgrad=False, capturable=False)
    with pytest.raises(ValueError, match=r"given: \['capturable'\]"):
        FusedAdam(parameters, amsgrad=False, capturable=True)
