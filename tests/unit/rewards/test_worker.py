"""The actions that a worker forbids. Each case runs in its own process, because an audit hook cannot be removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SETUP = """
import os, socket, subprocess, sys
sys.path.insert(0, {root!r})
import sympy
import sympy.parsing.sympy_parser as parser
from megatron_chord.rewards import worker
from megatron_chord.rewards.kinds.exact import ExactReward
watch = worker.Watch()
parser.eval_expr = worker._only_numbers(parser.eval_expr, watch)
sys.addaudithook(watch.audit)

def grade():
    {attempt}
    return 0.0

def swallowing(response):
    try:
        return grade()
    except Exception:
        return 0.0

request = {{"id": 1, "responses": [{{"text": ""}}]}}
(result,) = worker.Grading(ExactReward(), swallowing, watch).answer(request)["results"]
print(result.get("error"))
"""


def error_of(attempt: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(root=str(ROOT), attempt=attempt)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert list(folder.iterdir()) == []
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        ("os.system('touch canary')", "the grader tried os.system"),
        ("subprocess.run(['touch', 'canary'])", "the grader tried subprocess.Popen"),
        ("open('canary', 'w')", "the grader tried open"),
        ("os.mkdir('canary')", "the grader tried os.mkdir"),
        ("os.fork() or os._exit(0)", "the grader tried os.fork"),
        ("socket.create_connection(('127.0.0.1', 9))", "the grader tried socket.getaddrinfo"),
        ('sympy.sympify(\'open("canary", "w")\')', "the grader tried to evaluate"),
        ("sympy.sympify('x+1')", "the grader tried to evaluate"),
        ("bytearray(1 << 60)", "the grader ran out of memory"),
        ("grade()", "the grader ran out of stack"),
    ],
)
def test_forbidden_acts_are_errors_also_when_the_grader_swallows_them(
    attempt: str, error: str, tmp_path: Path
) -> None:
    assert error_of(attempt, tmp_path).startswith(error)


def test_numbers_and_reading_are_allowed(tmp_path: Path) -> None:
    attempt = "assert [sympy.Number('12'), sympy.Number('1.5')] == [12, 1.5] and open('/dev/null')"
    assert error_of(attempt, tmp_path) == "None"


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    assert error_of("return float('nan')", tmp_path) == "the grader returned nan, expected a finite number"
