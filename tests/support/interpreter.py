"""Triton without a GPU, for tests: its kernels in its interpreter, on CPU tensors, or compiled and not run.

``make test`` puts Triton beside the environment, not into it: vLLM, torch and Transformer Engine look for Triton, and
what these do without a GPU is to be tested without it, as users have it. Only the processes started here find it.
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
    """``run_ranks`` with Triton; without ``interpret`` its kernels are compiled, which needs no GPU until they run."""
    if find_spec("triton") is None and not FOLDER.is_dir():
        pytest.skip(f"Triton is neither installed nor in {FOLDER}, where `make test` puts it")
    found = {"TRITON_INTERPRET": str(int(interpret))}
    if FOLDER.is_dir():
        found["PYTHONPATH"] = f"{FOLDER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with mock.patch.dict(os.environ, found):
        return run_ranks(function, ranks, *args)
