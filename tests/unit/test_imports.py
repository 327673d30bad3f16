"""Imports lead to the same layer or a lower one (docs/design.md), and each third-party library is imported only where
allowed.

The test reads the source, so an import inside a function or under TYPE_CHECKING also counts.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_chord

PACKAGE = "megatron_chord"
LAYERS = (
    (
        "config",
        "config_checks",
        "config_io",
        "config_methods",
        "config_nodes",
        "config_suite",
        "files",
        "hub",
        "importing",
        "json_files",
        "judgement",
        "network",
        "peers",
        "precision",
        "process_table",
        "processes",
        "records",
        "rewards",
        "routes",
        "schedules",
        "settings_tree",
        "te_build",
        "timing",
    ),
    ("losses", "data", "families", "weights", "costs"),
    ("runtime", "model", "rollout", "sampling"),
    ("methods",),
    ("convert", "evaluation", "train", "plan", "report"),
    ("api", "cli", "cluster", "doctor", "preview", "settings", "__main__"),
)
LAYER = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MEGATRON = ("runtime", "model", "convert", "train")
"""The parts that may import Megatron-Core. ``weights`` gets its models as plain torch modules."""
NO_TORCH = (
    "config",
    "config_checks",
    "config_io",
    "config_methods",
    "config_nodes",
    "config_suite",
    "files",
    "hub",
    "importing",
    "json_files",
    "judgement",
    "network",
    "precision",
    "process_table",
    "processes",
    "records",
    "report",
    "rewards",
    "routes",
    "schedules",
    "settings_tree",
    "doctor",
    "settings",
    "te_build",
    "costs",
    "plan",
)
IN_VLLM = (
    "rollout.vllm_entry",
    "rollout.vllm_plugin",
    "rollout.vllm_engine",
    "rollout.vllm_routes",
    "rollout.route_store",
)
"""Modules that run inside vLLM's processes. vLLM finds the engine by name: importing it would load vLLM in the
trainer."""
IN_TRITON = ("losses.logit_kernels_triton",)
"""The kernels. They are imported only where there is a GPU."""


def violations(root: Path) -> list[str]:
    """Return all violations in the package folder ``root``, as ``file:line: what``."""
    return [
        f"{file.relative_to(root)}:{line}: {breach}"
        for file in sorted(root.rglob("*.py"))
        for line, target in _imports(file, root)
        if (breach := _breach(_module(file, root), target))
    ]


def _module(file: Path, root: Path) -> str:
    """losses/policy.py becomes losses.policy. The package's own __init__.py becomes the empty string."""
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def _imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every module that the file imports, or may import by ``from``."""
    package = [PACKAGE, *file.relative_to(root).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _breach(module: str, target: str) -> str | None:
    part = module.partition(".")[0]
    if part and part not in LAYER:
        return f"{part} has no layer: give it one here and in docs/design.md"
    library, _, rest = target.partition(".")
    if library == PACKAGE:
        return _breach_inside(module, rest)
    allowed = {
        "torch": part not in NO_TORCH,
        "megatron": part in MEGATRON,
        "vllm": module in IN_VLLM,
        "triton": module in IN_TRITON,
    }
    return None if allowed.get(library, True) else f"{module or PACKAGE} must not import {library}"


def _breach_inside(module: str, target: str) -> str | None:
    part, other = module.partition(".")[0], target.partition(".")[0]
    if not part:
        return None if other == "api" else f"{PACKAGE}/__init__.py must import nothing but api"
    if other not in LAYER:
        return f"{other} has no layer: give it one here and in docs/design.md"
    if LAYER[other] > LAYER[part]:
        return f"{module} is below {target} and must not import it"
    if target.startswith("rollout.vllm_engine"):
        return f"{module} must not import {target}, which loads vllm"
    return None


def test_imports_point_down_or_sideways() -> None:
    assert violations(Path(megatron_chord.__file__).parent) == []


GOOD = {
    "__init__.py": "",
    "config.py": "from dataclasses import dataclass",
    "records.py": "import numpy as np",
    "losses/__init__.py": "",
    "losses/policy.py": "import torch\nfrom megatron_chord.losses import objective\nfrom megatron_chord import config",
    "losses/objective.py": "from . import policy\nfrom ..records import Y",
    "model/build.py": "from megatron.core import parallel_state\nfrom megatron_chord.runtime import parallel",
    "rollout/server.py": "from megatron_chord.rollout.vllm_plugin import BACKEND",
    "rollout/vllm_engine.py": "from vllm.distributed import base",
    "rollout/vllm_plugin.py": "def register():\n    from vllm.distributed import factory",
    "train/loop.py": "import megatron_chord.rollout.client\nfrom megatron_chord.model.build import build",
    "cli.py": "from megatron_chord.train import loop",
}
BAD = [
    ("config.py", "import torch", "config must not import torch"),
    ("records.py", "def f():\n    from torch import Tensor", "records must not import torch"),
    ("losses/policy.py", "from megatron.core import mpu", "losses.policy must not import megatron"),
    ("data/packing.py", "import vllm", "data.packing must not import vllm"),
    ("losses/logprobs.py", "import triton.language as tl", "losses.logprobs must not import triton"),
    ("weights/load.py", "import megatron.core.models", "weights.load must not import megatron"),
    ("rollout/client.py", "from vllm import LLM", "rollout.client must not import vllm"),
    ("rollout/sync.py", "from megatron.core import mpu", "rollout.sync must not import megatron"),
    ("rollout/sync.py", "from . import vllm_engine", "rollout.sync must not import rollout.vllm_engine"),
    ("losses/policy.py", "from megatron_chord.model import build", "losses.policy is below model.build"),
    ("model/build.py", "from ..train.loop import run", "model.build is below train.loop.run"),
    ("train/__init__.py", "from megatron_chord import cli", "train is below cli"),
    ("config.py", "if TYPE_CHECKING:\n    import megatron_chord.losses.mu", "config is below losses.mu"),
    ("train/loop.py", "from megatron_chord.plugins import x", "plugins has no layer"),
    ("plugins/x.py", "import json", "plugins has no layer"),
    ("__init__.py", "from megatron_chord.config import RunConfig", "__init__.py must import nothing but api"),
]


def _plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_the_check_accepts_allowed_imports(tmp_path: Path) -> None:
    assert violations(_plant(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("file", "text", "breach"), BAD)
def test_the_check_reports_forbidden_imports(tmp_path: Path, file: str, text: str, breach: str) -> None:
    (found,) = violations(_plant(tmp_path, GOOD | {file: text}))
    assert found.startswith(f"{file}:{text.count(chr(10)) + 1}: ")
    assert breach in found


def test_the_package_alone_loads_none_of_its_modules() -> None:
    code = f"import sys, {PACKAGE}; print([name for name in sys.modules if name.startswith('{PACKAGE}.')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", LAYERS[0])
def test_settings_and_records_import_no_large_library(module: str) -> None:
    code = (
        f"import sys, {PACKAGE}.{module};"
        "print(sorted({'torch', 'vllm', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
