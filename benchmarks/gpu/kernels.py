"""Group the time of a profile by the names of kernels (on a CPU also of torch's operations)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

GROUPS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_scatter"),
    ("attention", r"flash|fmha|fused_attn|scaled_dot_product|cudnn_generated.*sdpa|_sdpa_"),
    ("head's sweeps", r"^_reduce$|^_differentiate$|logsumexp|log_softmax"),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas|aten::(mm|addmm|bmm|matmul|linear)$"),
    ("optimizer", r"adam|multi_tensor|lerp|addcdiv|addcmul|foreach"),
    ("quantisation", r"quantize|cast_transpose|fp8|amax"),
    ("norms", r"norm"),
    ("activations", r"silu|swiglu|gelu|sigmoid"),
    ("copies", r"memcpy|memset|copy|aten::(zero_|fill_|cat)|fillfunctor|catarray"),
    ("elementwise", r"elementwise|vectorized|aten::(add|mul|sub|div|exp|neg|where)"),
)
"""The groups. The first one whose pattern is in the name counts."""
OTHER = "other"


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def grouped(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the seconds of each group that took any, the longest first."""
    found: dict[str, float] = {}
    for name, seconds in events:
        group = group_of(name)
        found[group] = found.get(group, 0.0) + seconds
    return dict(sorted(((g, s) for g, s in found.items() if s > 0), key=lambda pair: -pair[1]))


def own_times(profile: Any) -> list[tuple[str, float]]:
    """Return names and seconds of a ``torch.profiler.profile``: of kernels on the device, or of operations on a CPU.

    An operation on the host has its kernels' times, too. So with CUDA only what ran on the device counts: kernels,
    without the named ranges around them.
    """
    from torch.autograd import DeviceType

    events = profile.key_averages()
    on_device = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if on_device:
        return [(event.key, event.self_device_time_total / 1e6) for event in on_device]
    return [(event.key, event.self_cpu_time_total / 1e6) for event in events]
