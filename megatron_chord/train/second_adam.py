"""A second state of the run's Adam, for updates that have an optimizer of their own (``Update.is_extra``).

Both states belong to the same weights. The state that is not used is in host memory: moments (8 bytes for each
parameter that this rank's optimizer keeps) and step counts. Before an extra update the two states are exchanged, and
after it again. FP32 weights, weight decay, betas and gradient clipping are those of the run's optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"
_OTHERS = {_STEP, "master_param"}


class SecondAdam:
    """Made with a new optimizer: its own moments are 0 and its step count is 0."""

    def __init__(self, parts: Sequence[Any], *, lr: float) -> None:
        """``parts`` is Megatron's optimizers of single kinds of parameters. ``lr`` is the constant learning rate of the
        extra updates."""
        # An optimizer is None on ranks that have none of its parameters.
        self._inner = [part.optimizer for part in parts if part.optimizer is not None]
        self._lr = lr
        self._moments: dict[tuple[int, int, str], Tensor] = {}
        """Moments, by optimizer, parameter and name. A missing entry is 0."""
        self._steps: dict[tuple[int, int], int] = {}
        """Step counts, by optimizer and parameter group. A missing entry is 0."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, the run's optimizer has this state and this learning rate."""
        groups = [group for inner in self._inner for group in inner.param_groups]
        rates = [group["lr"] for group in groups]
        self._exchange()
        for group in groups:
            group["lr"] = self._lr
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for index, inner in enumerate(self._inner):
            for place, group in enumerate(inner.param_groups):
                key = index, place
                self._steps[key], group[_STEP] = group.get(_STEP, 0), self._steps.get(key, 0)
            params = [param for group in inner.param_groups for param in group["params"]]
            for number, param in enumerate(params):
                for name, value in inner.state.get(param, {}).items():
                    if name in _MOMENTS:
                        self._exchange_moment((index, number, name), value)
                    elif name not in _OTHERS:
                        raise RuntimeError(
                            f"the optimizer keeps {name!r} for each parameter; a second state supports only Adam's "
                            f"{' and '.join(_MOMENTS)}"
                        )

    def _exchange_moment(self, key: tuple[int, int, str], value: Tensor) -> None:
        here = value.detach().to("cpu", copy=True)
        there = self._moments.get(key)
        if there is None:
            value.zero_()
        else:
            value.copy_(there)
        self._moments[key] = here
