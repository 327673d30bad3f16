"""Triton without a GPU, for tests: kernels run in its interpreter on CPU tensors, or are compiled and not run.

``make test`` puts Triton beside the environment, not into it. vLLM, torch and Transformer Engine look for Triton, and
tests must see what these do without it, as on a user's machine. Only processes that are started here find Triton.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.ranks import run_ranks

FOLDER = Path(sys.prefix) / "triton"


def run_with_triton(
    function: Callable[..., Any], *args: Any, ranks: int = 1, interpret: bool = True
) -> list[Any]:
    """Run ``run_ranks`` with Triton. Without ``interpret`` kernels are compiled, which needs no GPU until they run."""
    if find_spec("triton") is None and not FOLDER.is_dir():
        pytest.skip(f"Triton is neither installed nor in {FOLDER}, where `make test` puts it")
    found = {"TRITON_INTERPRET": str(int(interpret))}
    if FOLDER.is_dir():
        found["PYTHONPATH"] = f"{FOLDER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with mock.patch.dict(os.environ, found):
        if interpret:
            return run_ranks(_interpreted, ranks, function, *args)
        return run_ranks(function, ranks, *args)


def _interpreted(function: Callable[..., Any], *args: Any) -> Any:
    accept_numpy_2_4()
    return function(*args)


def accept_numpy_2_4() -> None:
    """Let Triton's interpreter before 3.7 accept a kernel's argument as a bound of ``range`` under NumPy 2.4.

    The interpreter keeps an argument as an array of one number and calls ``int`` on that array (``_patch_lang_tensor``
    in triton/runtime/interpreter.py). NumPy 2.4 refuses this for arrays with a dimension. Triton 3.7 squeezes the
    array.
    """
    from triton.runtime import interpreter

    patch: Any = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:
        return

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)  # Triton undoes this patch when the kernel ends
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched  # type: ignore[assignment]
