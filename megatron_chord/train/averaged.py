"""A moving average of the policy's weights, for a teacher that changes more slowly than the policy.

    average <- (1 - rate) average + rate weights        after every update that changes the weights

(the teacher of SDPO, arXiv 2601.20802, and SDFT, 2601.19897). The average begins with the weights of the run's start.
It has the FP32 weights that this rank's optimizer keeps, so the data-parallel ranks share it like the optimizer's
state. It is in host memory (4 bytes for each of these parameters). Within ``active`` the model computes with it.
Afterwards the model has its own weights again, bit for bit, because both are cast from FP32 in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class AveragedWeights:
    """Made with a new optimizer: the average is its weights."""

    def __init__(self, parts: Sequence[Any], chunks: Sequence[Any], *, rate: float) -> None:
        """``parts`` is Megatron's distributed optimizers of single kinds of parameters. ``chunks`` is this rank's model
        in Megatron's DistributedDataParallel. ``rate`` is the weights' share in the new average, in (0, 1]."""
        self._parts = list(parts)
        self._chunks = list(chunks)
        self._rate = rate
        self._average: list[Tensor] = []
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Start the average again with the present weights."""
        self._average = [param.detach().to("cpu", copy=True) for param in self._params()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights. No collective."""
        for average, param in zip(self._average, self._params(), strict=True):
            average.copy_(average.to(param.device).lerp_(param.detach(), self._rate))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, the model has the averaged weights. If an error occurs in it, the model keeps the
        averaged weights, because gathering its own weights would wait for ranks without an error.

        Collectives: the gather of all weights, at the beginning and at the end. All ranks must enter it.
        """
        with self.exchanged():
            self._spread()
            yield
        self._spread()

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within the context, the optimizer's FP32 weights are the average. The model keeps its weights. No
        collective."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, param in zip(self._average, self._params(), strict=True):
            own = param.detach().to("cpu", copy=True)
            param.copy_(average)
            average.copy_(own)

    @torch.no_grad()
    def _spread(self) -> None:
        """Copy the optimizer's FP32 weights to the model, as a step of Megatron's optimizer does."""
        for part in self._parts:
            part._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync()

    def _params(self) -> Iterator[Tensor]:
        for part in self._parts:
            if part.optimizer is not None:  # None on ranks that have none of its parameters
                for group in part.optimizer.param_groups:
                    yield from group["params"]
