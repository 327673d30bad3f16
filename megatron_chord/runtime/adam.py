"""AdamW and gradient clipping for machines without Transformer Engine and Apex.

The AdamW has the state layout of Transformer Engine's FusedAdam. The clipping does not wait for the device.

On such machines Megatron-Core uses ``torch.optim.AdamW``, but its distributed optimizer saves and loads that state
wrongly (megatron-core 0.16.1, distrib_optimizer.py:642, 825, 940): all parameters share one step count after a load, so
the bias correction of a resumed run is silently wrong. If the step count is in the parameter group, as in Transformer
Engine, the same code is correct. torch's fused kernel does the arithmetic, on the CPU and on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **others: bool,
    ) -> None:
        """``others`` are options of other Adams, such as ``amsgrad`` and 0.19.2's ``capturable``. They must be
        false."""
        on = [name for name, value in others.items() if value]
        if not bias_correction or on:
            raise ValueError(
                f"FusedAdam needs bias correction and supports no options of other Adam optimizers; given: {on}"
            )
        self._update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p.data)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p.data)
            self._update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # Filled on the device, because copying a number from the host would wait for the device.
                [torch.full((), float(group["step"]), device=params[0].device)] * len(params),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def l2_norm(_: int, __: Tensor, lists: Sequence[list[Tensor]], ___: bool) -> tuple[Tensor, None]:
    """[1]: the norm of all tensors of the list together. Megatron's function waits for the device for each tensor."""
    (tensors,) = lists
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).view(1), None


def scale(_: int, __: Tensor, lists: Sequence[list[Tensor]], factor: float) -> None:
    """Scale in place: clipping passes the same gradients as source and as target."""
    torch._foreach_mul_(lists[-1], factor)


def install_if_needed() -> None:
    """Make Megatron-Core use this module if neither Transformer Engine nor Apex is installed."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    clip_grads.l2_norm_impl = l2_norm
    clip_grads.multi_tensor_scale_impl = scale
    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
