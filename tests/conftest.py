"""How tests are dealt out to pytest's workers by ``--dist loadfile``."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

TOGETHER = ("tests/e2e/", "tests/slurm/")
"""Folders whose files share what is dear to start: a vLLM server, a Slurm."""


class _ByFileOrFolder(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in TOGETHER if nodeid.startswith(folder)), super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return _ByFileOrFolder(config, log) if config.getvalue("dist") == "loadfile" else None
