"""Two states of one Adam are two Adams over the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from megatron_chord.runtime.adam import FusedAdam
from megatron_chord.train.second_adam import SecondAdam

SHAPES = [(3, 4), (5,)]
KINDS = ["own", "own", "extra", "own", "extra", "extra", "own"]
"""The updates in order. The second state is used before the first one has seen all of its updates."""


def weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def gradients(step: int) -> Iterator[torch.Tensor]:
    torch.manual_seed(100 + step)
    return (torch.randn(shape) for shape in SHAPES)


def adam(params: list[torch.nn.Parameter], lr: float) -> FusedAdam:
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}]
    return FusedAdam(groups, lr=lr)


def give(params: list[torch.nn.Parameter], step: int) -> None:
    for param, gradient in zip(params, gradients(step), strict=True):
        param.grad = gradient


@pytest.mark.parametrize("kinds", [KINDS, KINDS[2:]], ids=["own first", "extra first"])
def test_two_states_are_two_adams(kinds: list[str]) -> None:
    one = weights()
    optimizer = adam(one, 0.1)
    second = SecondAdam([SimpleNamespace(optimizer=optimizer), SimpleNamespace(optimizer=None)], lr=0.03)
    two = weights()
    others = {"own": adam(two, 0.1), "extra": adam(two, 0.03)}
    for step, kind in enumerate(kinds):
        give(one, step)
        give(two, step)
        others[kind].step()
        if kind == "own":
            optimizer.step()
        else:
            with second.active():
                optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), step
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_an_error_brings_the_own_state_back() -> None:
    params = weights()
    optimizer = adam(params, 0.1)
    second = SecondAdam([SimpleNamespace(optimizer=optimizer)], lr=0.03)
    give(params, 0)
    optimizer.step()
    before = [optimizer.state[param]["exp_avg"].clone() for param in params]

    def fail() -> None:
        with second.active():
            assert optimizer.state[params[0]]["exp_avg"].abs().max() == 0
            assert optimizer.param_groups[0]["step"] == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(optimizer.state[p]["exp_avg"], b) for p, b in zip(params, before, strict=True))
    assert optimizer.param_groups[0]["step"] == 1


def test_another_optimizer_is_refused() -> None:
    params = weights()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    give(params, 0)
    optimizer.step()
    second = SecondAdam([SimpleNamespace(optimizer=optimizer)], lr=0.03)
    with pytest.raises(RuntimeError, match="keeps 'momentum_buffer' for each parameter"), second.active():
        pass
