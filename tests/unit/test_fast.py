"""`make test-fast` names tests that exist, and lists the tests that it leaves out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import fast

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("test", [*fast.LAYOUTS.values()])
def test_a_named_test_exists(test: str) -> None:
    path, _, name = test.partition("::")
    function, _, case = name.partition("[")
    text = (ROOT / path).read_text()
    assert re.search(rf"^def {function}\(", text, re.MULTILINE), f"{path} has no {function}"
    for part in case.rstrip("]").split("-"):
        assert re.search(rf"\b{part}\b", text), f"{path} has no case {part}"


def test_every_test_file_is_run_or_reported() -> None:
    reported = {f"{folder}/{name}" for folder, names in fast.left_out().items() for name in names}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert {path for path in files if not path.startswith("tests/unit/")} == reported
    for path in reported:
        assert Path(path).name in fast.describe()


def test_a_slow_unit_test_is_reported() -> None:
    marked = [
        path for path in (ROOT / "tests" / "unit").rglob("test_*.py") if "mark.slow\n" in path.read_text()
    ]
    assert {test.partition("::")[0] for test in fast.slow_units()} == {
        path.relative_to(ROOT).as_posix() for path in marked
    }
    assert all(f"left out: {test}\n" in fast.describe() for test in fast.slow_units())


def test_make_runs_this_list_after_the_linters() -> None:
    rule = re.search(r"^test-fast: (.*)\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule is not None
    assert rule.groups() == ("lint", "$(BIN)/python -m tests.fast")
