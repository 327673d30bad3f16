"""Where tests run: without a GPU unless ``-m gpu`` asks for it, and dealt out to workers by ``--dist loadfile``."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest

TOGETHER = ("tests/e2e/", "tests/slurm/")
"""Folders whose files share what is dear to start: a vLLM server, a Slurm."""


def pytest_configure(config: pytest.Config) -> None:
    """On a GPU the other tests would put several ranks on one device, or compute in TF32."""
    chosen: str = config.option.markexpr
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    """A GPU machine may have pytest alone: then tests run without pytest-timeout's limit, one after another."""
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "Read by pytest-timeout, which is not installed.")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrFolder(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next(
                (folder for folder in TOGETHER if nodeid.startswith(folder)), super()._split_scope(nodeid)
            )

    return ByFileOrFolder(config, log)
