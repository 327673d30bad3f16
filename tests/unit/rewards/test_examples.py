"""The examples of rewards run programs safely, and every file names a function that can be loaded."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from megatron_chord.config_io import load_config
from megatron_chord.records import Grade
from megatron_chord.rewards.graders import check_reward
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.pool import GraderPool
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import terms_of
from tests.support.ranks import ROOT

EXAMPLES = ROOT / "examples" / "rewards"
RIGHT = "def f(x): return x * x"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_names_a_function_that_can_be_loaded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = load_config(path).reward
    for term in terms_of(reward).values():
        for variable in term.variables:
            monkeypatch.setenv(variable, "http://127.0.0.1:1")
    check_reward(reward)


def grades_by(name: str, texts: list[str]) -> list[Grade]:
    reward = FunctionReward(
        path=EXAMPLES / "run_code.py", name=name, allow=("subprocess",), workers=2, timeout_s=60
    )
    with GraderPool(reward) as pool:
        return pool.grade_all([Response(text=text, fields={"tests": "assert f(2) == 4"}) for text in texts])


def test_sums_of_an_answer_are_worked_out() -> None:
    texts = ["Mon 59+8=67\nTue 67 - 7 = 60\n#### 60", "Mon 59+8=67\nTue 67-7=61", "#### 60"]
    assert grades_by("sums_are_right", texts) == [Grade(1.0), Grade(0.0), Grade(0.0)]


def test_programs_are_tested_and_contained(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    programs = {
        RIGHT: 1.0,
        "def f(x): return 5": 0.0,
        "import time\ntime.sleep(60)": 0.0,
        "x = bytearray(1 << 40)": 0.0,
        f"{RIGHT}\nwith open({str(canary)!r}, 'w') as file:\n    file.write('x')": 0.0,
        f"import os\nassert 'PATH' not in os.environ\n{RIGHT}": 1.0,
        f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n{RIGHT}": 1.0,
    }
    grades = grades_by("passes_tests", [f"So:\n```python\n{program}\n```" for program in programs])
    assert grades == [Grade(score) for score in programs.values()]
    assert not canary.exists() or canary.read_bytes() == b""
    assert grades_by("passes_tests", ["no program"]) == [Grade(0.0)]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL)


def test_the_function_of_the_page_grades(tmp_path: Path) -> None:
    (function,) = (block for block in blocks() if "def brevity" in block)
    path = tmp_path / "my_rewards.py"
    path.write_text(function)
    with GraderPool(FunctionReward(path=path, name="brevity", workers=1)) as pool:
        (grade,) = pool.grade_all([Response(text="so it is 4", truth="4", num_tokens=6)])
    assert grade == Grade(1 - 0.006)


def test_the_kind_of_the_page_is_a_kind() -> None:
    (kind,) = (block for block in blocks() if "RewardKind)" in block)
    module = types.ModuleType("contains")
    sys.modules[module.__name__] = module  # a dataclass looks up its module
    try:
        exec(compile(kind, "contains.py", "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    reward = module.ContainsReward(ignore_case=True, workers=3)
    assert reward.load()(module.ContainsReward.EXAMPLE) == 1.0
    assert reward.load()(Response(text="so YES", truth="yes")) == 1.0
    assert module.ContainsReward().load()(Response(text="so YES", truth="yes")) == 0.0
    assert reward.has_answer("x")
