"""Transformer Engine's Python code on a machine without CUDA. Its compiled parts exist only as empty modules.

Specs, recipes, layers' parameters and their names are Python code, so they are real. Nothing can compute. A program
must call ``load`` before anything imports Transformer Engine or Megatron-Core.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

ABSENT = (
    "transformer_engine_torch",
    "triton",
    "triton.language",
    "triton.language.core",
    "triton.language.standard",
    "transformer_engine.pytorch.onnx_extensions",
)
"""Compiled parts, and the export to ONNX, which needs other distributions."""


class _Absent:
    """A placeholder for everything of a compiled part that the Python code names, decorates or annotates with."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Absent()
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else _Absent()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__


class _AbsentModule(types.ModuleType):
    __version__ = "3.5.0"  # Triton's version: Transformer Engine compares it
    __getattr__ = _Absent.__getattr__
    __path__ = ()


def load() -> None:
    """Import Transformer Engine from the folder on ``sys.path`` that has its plain distribution."""
    importlib.import_module("torch._inductor.compile_fx")  # it looks for triton, which must then be absent
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own build imports it this way, without the core library
    for name in ABSENT:
        sys.modules[name] = _AbsentModule(name)
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    package.pytorch = importlib.import_module("transformer_engine.pytorch")  # type: ignore[attr-defined]
    spec.loader.exec_module(package)
    from transformer_engine.pytorch import cpp_extensions

    cpp_extensions.get_cudnn_version = lambda: 91002


@contextlib.contextmanager
def as_if_on_hopper() -> Iterator[None]:
    """Let torch report a Hopper GPU. Without it layers cannot be built, although their parameters may be on any
    device."""
    import torch

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: types.SimpleNamespace(major=9, minor=0),
        "get_device_capability": lambda device=None: (9, 0),
        "Stream": lambda *_, **__: None,
    }
    before = {name: getattr(torch.cuda, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        yield
    finally:
        for name, answer in before.items():
            setattr(torch.cuda, name, answer)
