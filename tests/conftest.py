"""Tests run without a GPU unless ``-m gpu`` asks for it, and ``--dist loadfile`` gives them to workers file by file."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from importlib.util import find_spec
from typing import Any

import pytest

_SERVED = ("best", "evaluate", "lag", "methods", "rewards", "stages", "tails", "talk")
TOGETHER: dict[str, tuple[str, ...]] = {
    "slurm": ("tests/slurm/",),
    "server": tuple(f"tests/e2e/test_{name}.py" for name in _SERVED),
}
"""Files that share something slow to start run on one worker: Slurm, or the vLLM server of tests/e2e."""
LONGEST_FIRST = (
    "server",
    "tests/e2e/test_run.py",
    "slurm",
    "tests/rollout/test_families.py",
    "tests/e2e/test_frozen.py",
    "tests/e2e/test_paper_in_small.py",
    "tests/distributed/test_convert.py",
    "tests/distributed/test_split_invariance.py",
    "tests/rollout/test_sync.py",
    "tests/e2e/test_kills.py",
    "tests/rollout/test_server.py",
    "tests/distributed/test_checkpoint.py",
    "tests/distributed/test_families.py",
    "tests/e2e/test_repeatable.py",
    "tests/distributed/test_newest_megatron.py",
    "tests/e2e/test_bad_input.py",
)
"""The slowest files, and groups of ``TOGETHER``. They start first, so that no worker is left with a long file at the
end."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from the other tests. They would put several ranks on one device, or compute in TF32."""
    chosen: str = config.option.markexpr
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Let torch compute on one thread in this process. Workers together have a thread for each core then.

    With more threads than cores, OpenMP's threads wait for each other in busy loops. A loop over small products then
    takes 10 times as much CPU time. Processes that tests start choose their number of threads themselves.
    """
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Define pytest-timeout's setting where the plugin is missing. A GPU machine may have only pytest; tests then have
    no limit."""
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "Read by pytest-timeout, which is not installed.")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give a test that runs a second time its time limit. pytest-timeout ends its clock at the first failure."""
    if getattr(item, "execution_count", 1) > 1 and find_spec("pytest_timeout") is not None:
        from pytest_timeout import _get_item_settings

        item.ihook.pytest_timeout_set_timer(item=item, settings=_get_item_settings(item))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrGroup(LoadFileScheduling):
        def __init__(self, config: pytest.Config, log: Any) -> None:
            super().__init__(config, log)
            self.workqueue = _LongestFirst()

        def _split_scope(self, nodeid: str) -> str:
            groups = (group for group, files in TOGETHER.items() if nodeid.startswith(files))
            return next(groups, super()._split_scope(nodeid))

    return ByFileOrGroup(config, log)


class _LongestFirst(OrderedDict[str, Any]):
    """xdist's queue of files and groups. xdist takes the next one with ``popitem``."""

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
        name = min(self, key=lambda name: ranks.get(name, len(ranks)))
        return name, self.pop(name)
