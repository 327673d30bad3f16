"""All adaptations that Megatron-Core needs on a machine without CUDA, each with its reason.

``runtime.parallel.start`` calls ``install()`` before any code of Megatron-Core runs. Importing this module changes
nothing. Only inside ``megatron.core`` the global name ``torch`` is replaced by a stand-in. Its factory functions put
"cuda" tensors on the CPU, and its ``torch.cuda`` behaves as on a machine without a GPU. Outside of ``megatron.core``
only a few methods that need CUDA (``Tensor.cuda`` and so on) are changed.

Line numbers below are of megatron-core 0.16.1. 0.19.2 needs the same adaptations, except ``te_general_gemm``, which it
defines.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

_PACKAGE = "megatron.core"
_CPU = torch.device("cpu")
_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
]
_installed = False


def install() -> None:
    """Adapt Megatron-Core in this process; repeated calls have no effect. Raises RuntimeError if CUDA is available."""
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("runtime.cpu.install() called on a machine with CUDA")
    import_without_compiling()
    _replace_torch_in_megatron()
    _patch_tensor_methods()
    _patch_random_state()
    _patch_missing_transformer_engine_names()
    _patch_moe_split_lists()
    _installed = True


def import_without_compiling() -> None:
    """Import Megatron-Core with ``torch.compile`` switched off.

    Its ``jit_fuser`` decorator compiles at import (seconds for every process) and again at first use. On a CPU the
    fused functions are not faster.
    """
    compile_ = torch.compile
    torch.compile = lambda fn=None, **_: fn if fn is not None else (lambda f: f)  # type: ignore[assignment]
    try:
        import megatron.core.jit

        megatron.core.jit.disable_jit_fuser()
        with warnings.catch_warnings():
            # Do not warn that Transformer Engine and Apex are missing: here they always are.
            warnings.simplefilter("ignore", UserWarning)
            import megatron.core.distributed
            import megatron.core.models.gpt
            import megatron.core.optimizer
            import megatron.core.pipeline_parallel
    finally:
        torch.compile = compile_


# ---------------------------------------------------------------------------------------------------------------
# The stand-in for the name `torch`


class _Stream:
    """A stream on which all work is already complete."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _StandIn(types.ModuleType):
    """A module with a few names of its own. All other names come from the real module."""

    def __init__(self, real: types.ModuleType, own: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__["_real"] = real
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _on_cpu(device: Any) -> Any:
    """The device for a tensor requested on ``device``: "cuda", a cuda device or an index become the CPU."""
    is_cuda = (
        (isinstance(device, str) and device.startswith("cuda"))
        or (isinstance(device, torch.device) and device.type == "cuda")
        or (isinstance(device, int) and not isinstance(device, bool))
    )
    return _CPU if is_cuda else device


def _factory(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return on_cpu


def _stand_ins() -> _StandIn:
    def nothing(*_: Any, **__: Any) -> None: ...
    def zero(*_: Any, **__: Any) -> int:
        return 0

    stream = _Stream()
    cuda: dict[str, Any] = {
        # param_and_grad_buffer.py:800, p2p_communication.py:190, mappings.py:141, rotary_pos_embedding.py:162, ...
        "current_device": lambda: _CPU,
        # p2p_communication.py:242, filesystem_async.py:230
        "synchronize": nothing,
        "set_device": nothing,
        "empty_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_reserved": zero,
        # tensor_parallel/random.py:250: the tracker then forks the CPU generator's states
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed) and None,
        # moe/token_dispatcher.py:445
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
    }
    own: dict[str, Any] = {name: _factory(getattr(torch, name)) for name in _FACTORIES}
    own["cuda"] = _StandIn(torch.cuda, cuda)
    return _StandIn(torch, own)


class _ReplaceOnImport(importlib.abc.MetaPathFinder):
    """Sets the stand-in also in modules of Megatron-Core that are imported later."""

    def __init__(self, stand_in: _StandIn) -> None:
        self.stand_in = stand_in

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_PACKAGE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_replace(module: types.ModuleType) -> None:
            execute(module)
            _give(module, self.stand_in)

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


def _give(module: types.ModuleType, stand_in: _StandIn) -> None:
    if vars(module).get("torch") is torch:
        vars(module)["torch"] = stand_in


def _replace_torch_in_megatron() -> None:
    stand_in = _stand_ins()
    sys.meta_path.insert(0, _ReplaceOnImport(stand_in))
    for name, module in list(sys.modules.items()):
        if name.startswith(_PACKAGE):
            _give(module, stand_in)


# ---------------------------------------------------------------------------------------------------------------
# Adaptations outside of the stand-in


def _patch_tensor_methods() -> None:
    """Replace methods of tensors that Megatron calls and that fail in a CPU build."""

    def same(self: Any, *_: Any, **__: Any) -> Any:
        return self

    torch.Tensor.cuda = same  # type: ignore[method-assign]  # distrib_optimizer.py:1089
    torch.nn.Module.cuda = same  # type: ignore[method-assign]
    torch.Tensor.pin_memory = same  # type: ignore[method-assign]  # rope_utils.py:62
    torch.Tensor.record_stream = lambda self, *_: None  # type: ignore[method-assign, assignment]

    # optimizer.py:671 and clip_grads.py:167 recognise parameters by the name of their CUDA tensor type.
    names = {
        torch.float32: "torch.cuda.FloatTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
        torch.float16: "torch.cuda.HalfTensor",
    }
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and self.dtype in names and _called_from("megatron.core.optimizer"):
            return names[self.dtype]
        return original(self, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _called_from(package: str, depth: int = 4) -> bool:
    frame = sys._getframe(2)
    for _ in range(depth):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith(package):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _patch_random_state() -> None:
    """Make the random-state tracker use the CPU generator's state instead of CUDA's."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # Otherwise it would warn at every fork that "CPU RNG state changed within GPU RNG context".
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _patch_missing_transformer_engine_names() -> None:
    """Define names that Megatron-Core uses although their import from Transformer Engine failed (NameError)."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # moe_utils.py:1192
        moe_utils.te_general_gemm = None
    if not hasattr(random, "FP8GlobalStateManager"):  # random.py:589
        no_fp8 = types.SimpleNamespace(is_fp8_enabled=lambda: False, get_fp8_recipe=lambda: None)
        random.FP8GlobalStateManager = no_fp8
        random.activation_recompute_forward = lambda *_, **__: contextlib.nullcontext()
        random.fp8_autocast = lambda *_, **__: contextlib.nullcontext()


def _patch_moe_split_lists() -> None:
    """Convert split sizes to numpy also on a CPU: moe_utils.py:1093 does so only for CUDA tensors, but gloo's
    all-to-all needs it, too."""
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu

    def to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = to_numpy
