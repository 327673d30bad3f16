"""`megatron-chord data` works as a user starts it, on a machine without Megatron-Core, vLLM or a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.task import cli_environment, make_task

BARE = (
    "import sys; sys.modules |= {'megatron': None, 'vllm': None}; "
    "from megatron_chord.cli import main; sys.exit(main())"
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def data(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE, "data", *arguments],
        env=cli_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_data_is_shown_without_megatron_and_without_colours(task: Path) -> None:
    result = data(str(task), "--examples", "1", "data.max_response_tokens=7")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert "\x1b" not in text
    assert "prompts: 16 of 16 rows" in text
    assert "demonstrations: 5 of 16 rows" in text  # "#### from i = 5 on, "#### 2i+1" is a byte longer
    assert "11 over it (data.max_response_tokens)" in text
    assert "5 of 5 problems of demonstrations are also in prompts" in text
    assert (
        "[~<|im_start|>user\n~]0 + 1 =[~<|im_end|>\n<|im_start|>assistant\n~]{+#### 1+}{~<|im_end|>~}" in text
    )
    assert not (task.parent / "out").exists()


def test_the_page_is_written_whole_and_refused_before_the_data_is_read(task: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.html"
    result = data(str(task), "--html", str(file))
    assert result.returncode == 0, result.stderr
    assert file.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [file]
    refused = data(str(task), "--html", str(tmp_path / "none" / "data.html"))
    assert refused.returncode == 2
    assert "none is no folder" in refused.stderr


def test_scores_of_a_policy_use_the_token_weight_of_the_run(task: Path, tmp_path: Path) -> None:
    policy, file = str(task.parent / "policy"), tmp_path / "data.html"
    result = data(str(task), "--policy", policy, "--policy-rows", "2", "--html", str(file), "--examples", "1")
    assert result.returncode == 0, result.stderr
    assert "2 demonstrations, " in result.stdout
    assert "weight: method.token_weight phi\n" in result.stdout
    assert 'id="lens"' in file.read_text()


def test_bad_data_is_refused_as_it_is_at_a_run_s_start(task: Path, tmp_path: Path) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text(json.dumps({"problem": "1+1?"}) + "\n")
    result = data(str(task), f"data.prompts={rows}")
    assert result.returncode == 2
    assert "bad.jsonl:1: has none of `answer`, `truth`" in result.stderr
