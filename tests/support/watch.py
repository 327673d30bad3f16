"""Watch an update's calls: which calls wait for the device, what is copied to it, and what is sent over which group.

torch's meta device replaces a GPU (``stand_in_for_a_gpu``). Its tensors have shapes and no numbers. An operation that
mixes it with the CPU raises. So does an operation that needs its numbers on the host, which would wait for a real GPU.
``Watch`` answers the latter with zeros and notes who asked.
"""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_chord.config import ParallelConfig
from megatron_chord.runtime import cpu
from megatron_chord.runtime import parallel as runtime

META = torch.device("meta")


def stand_in_for_a_gpu(parallel: ParallelConfig) -> runtime.ParallelGroups:
    """Build real groups over gloo with a device that computes nothing. Use it in a process of its own: it restores
    nothing."""
    cpu._CPU = META
    groups = runtime.start(parallel, seed=0)
    torch.Tensor.cuda = lambda self, *_, **__: self.to(META)  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, *_: self._apply(lambda t: t.to(META))  # type: ignore[method-assign, assignment]
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: META  # type: ignore[assignment, return-value]
    return replace(groups, device=META)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One call of a collective or of a message, on this rank."""

    kind: str
    """The name of torch's ``c10d`` operator."""
    group: str
    numel: int
    """The number of elements of all input tensors of the call."""
    on_device: bool


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """The number of waits, by the source file that asked for numbers of the device."""
        self.uploads: Counter[str] = Counter()
        """The number of copies from host memory to the device, by source file."""
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.is_meta for tensor in tensors)
        if func.namespace == "c10d":
            self._note(func, args, on_device)
            return _answered(func, args) if on_device else func(*args, **kwargs or {})
        if on_device and func is torch.ops.aten._local_scalar_dense.default:
            self.waits[_asker()] += 1
            return False if args[0].dtype == torch.bool else 1
        if (
            on_device
            and func is torch.ops.aten._to_copy.default
            and (kwargs or {}).get("device") not in (None, META)
        ):
            self.waits[_asker()] += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs or {})
        if tensors and not on_device and any(t.is_meta for t in tree_leaves(result) if isinstance(t, Tensor)):
            self.uploads[_asker()] += 1
        return result

    def _note(self, func: Any, args: Any, on_device: bool) -> None:
        schema = func._schema
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
        inputs = next(given[name] for name in _INPUTS if name in given)
        self.sent.append(
            Sent(
                kind=schema.name.removeprefix("c10d::").strip("_"),
                group=dist.ProcessGroup.unbox(given["process_group"]).group_name,
                numel=sum(leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)),
                on_device=on_device,
            )
        )


_INPUTS = ("input_tensors", "inputs", "input_tensor", "input", "tensors", "tensor")
"""The names that torch's ``c10d`` operators give to what a rank sends. For a receive, it is where the data goes."""


def _answered(func: Any, args: Any) -> Any:
    from torch._C._distributed_c10d import FakeWork

    done = FakeWork().boxed()
    return done if len(func._schema.returns) == 1 else (args[0], done)


def _asker() -> str:
    """Return the innermost file of the project or of Megatron on the stack. The path begins at its package."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("megatron_chord/", "megatron/core/"):
            if package in frame.filename:
                return package + frame.filename.rsplit(package, 1)[1]
    return "elsewhere"
