"""Functions from a user's file, in real worker processes."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.records import Grade
from megatron_chord.rewards import pool
from megatron_chord.rewards.graders import check_reward
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.pool import GraderPool, RewardRefused
from megatron_chord.rewards.response import Response
from tests.support.processes import is_alive

MODULE = """
import asyncio, math, os, socket, subprocess, sys, time
import helper

def score(response):
    return float(response.text == response.truth)

def seen(response):
    return {
        "messages": len(response.messages), "fields": response.fields["level"], "tokens": response.num_tokens,
        "cut": response.finish_reason == "length", "source": len(response.source), "helper": helper.VALUE,
    }

def returns(response):
    values = {
        "nan": math.nan, "text": "1", "none": None, "part": {"a": 1, "b": math.inf}, "empty": {}, "true": True,
        "no part": {"a": 1, "b": None}, "number": {1: 0.5}, "complex": 1j, "large": 10**400,
    }
    return values[response.text]

def exits(response):
    sys.exit(3)

async def exits_async(response):
    if response.text == "exit":
        sys.exit(3)
    return 1

def eats_memory(response):
    return float(len(bytes(1 << 30)) > 0) if response.text == "eat" else 1

async def eats_memory_async(response):
    return eats_memory(response)

def talks(response):
    print("x" * 300_000)
    print("x" * 300_000, file=sys.stderr)
    print('{"id": 1, "results": [{"score": 0.0, "parts": {}}]}', flush=True)
    if response.text == "die":
        print("the reason", file=sys.stderr, flush=True)
        os._exit(3)
    return 1

def raises(response):
    return score(response) / 0

def hangs(response):
    if response.text == "hang":
        while True:
            pass
    return 1

def dies(response):
    if response.text == "die":
        os._exit(3)
    return 1

async def sleeps(response):
    await asyncio.sleep(float(response.text))
    return 1

async def blocks(response):
    await asyncio.sleep(0)
    if response.text == "block":
        time.sleep(600)
    if response.text == "die":
        os._exit(3)
    await asyncio.sleep(0.3)
    return 1

def lists(responses):
    return [len(responses) + 0.1 * (response.text == "right") for response in responses]

async def lists_async(responses):
    await asyncio.sleep(0)
    return [len(responses)] * len(responses)

def one_wrong(responses):
    return [1, None, 0]

def too_few(responses):
    return [0] * (len(responses) - 1)

def connects(response):
    try:
        with socket.create_connection(("127.0.0.1", int(response.text)), timeout=5):
            return 1
    except OSError:
        return 0

def starts(response):
    return float(subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True, check=True).stdout)

def writes(response):
    with open(response.text, "w") as file:
        file.write("x" * (2 << 20))
    return 1

def leaves_a_child(response):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(response.text, "w") as file:
        file.write(str(child.pid))
    time.sleep(600)

def variables(response):
    return {"given": len(os.environ.get("JUDGE_KEY", "")), "kept": "OTHER_KEY" in os.environ}

number = 3
def needs_two(response, truth): return 0
def needs_none(): return 0
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "helper.py").write_text("VALUE = 7\n")
    file = folder / "my_rewards.py"
    file.write_text(MODULE)
    return file


def grades_by(path: Path, name: str, texts: Sequence[str], **settings: Any) -> list[Grade]:
    settings = {"workers": 1, "timeout_s": 20.0, **settings}
    with GraderPool(FunctionReward(path=path, name=name, **settings)) as graders:
        return graders.grade_all([Response(text=text, truth="right") for text in texts])


def only_error(path: Path, name: str, text: str, **settings: Any) -> str:
    (grade,) = grades_by(path, name, [text], **settings)
    assert grade.score is None
    assert grade.error is not None
    return grade.error


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(MODULE.splitlines(), start=1) if line == text)


def test_a_number(path: Path) -> None:
    assert grades_by(path, "score", ["right", "wrong"]) == [Grade(1.0), Grade(0.0)]
    assert grades_by(path, "returns", ["true"]) == [Grade(1.0)]


def test_the_function_sees_the_whole_response_and_its_parts_add_up(path: Path) -> None:
    response = Response(
        text="t",
        messages=({"role": "user", "content": "?"},),
        fields={"level": 5, "when": Path("x")},
        finish_reason="length",
        num_tokens=11,
        source="math",
    )
    with GraderPool(FunctionReward(path=path, name="seen", workers=1)) as graders:
        (grade,) = graders.grade_all([response])
    parts = {"messages": 1.0, "fields": 5.0, "tokens": 11.0, "cut": 1.0, "source": 4.0, "helper": 7.0}
    assert grade == Grade(29.0, None, parts)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nan", "the grader returned nan, expected a finite number"),
        ("text", "the grader returned '1' (str), expected a finite number"),
        ("none", "the grader returned None (NoneType), expected a finite number"),
        ("part", "the grader returned inf for `b`, expected a finite number"),
        ("no part", "the grader returned None (NoneType) for `b`, expected a finite number"),
        ("empty", "the grader returned {}, expected a mapping of names to numbers"),
        ("number", "the grader returned {1: 0.5}, expected a mapping of names to numbers"),
        ("complex", "the grader returned 1j (complex), expected a finite number"),
        (
            "large",
            "the grader returned a value of type int that is no number: OverflowError: int too large to convert to "
            "float",
        ),
        ("other", f"KeyError: 'other' (my_rewards.py:{line_of('    return values[response.text]')})"),
    ],
)
def test_what_is_no_number_is_an_error_and_never_0(path: Path, text: str, error: str) -> None:
    assert only_error(path, "returns", text) == error


def test_an_exception_is_told_by_its_last_line_and_place(path: Path) -> None:
    place = line_of("    return score(response) / 0")
    assert (
        only_error(path, "raises", "x")
        == f"ZeroDivisionError: float division by zero (my_rewards.py:{place})"
    )


def test_a_call_that_hangs_is_killed_and_the_next_ones_are_graded(path: Path) -> None:
    assert grades_by(path, "hangs", ["a", "hang", "b"], timeout_s=1) == [
        Grade(1.0),
        Grade(None, "killed after 1 s"),
        Grade(1.0),
    ]


def test_a_process_that_ends_is_an_error_of_its_response_alone(path: Path) -> None:
    first, dead, last = grades_by(path, "dies", ["a", "die", "b"])
    assert (first, last) == (Grade(1.0), Grade(1.0))
    assert dead.error == "the grader process died (exit status 3)"


def test_a_call_that_exits_is_an_error_with_its_place(path: Path) -> None:
    assert only_error(path, "exits", "x") == f"SystemExit: 3 (my_rewards.py:{line_of('    sys.exit(3)')})"
    place = line_of("        sys.exit(3)")
    assert grades_by(path, "exits_async", ["a", "exit", "b"]) == [
        Grade(1.0),
        Grade(None, f"SystemExit: 3 (my_rewards.py:{place})"),
        Grade(1.0),
    ]


@pytest.mark.parametrize("name", ["eats_memory", "eats_memory_async"])
def test_a_call_that_needs_more_than_its_memory_is_an_error(path: Path, name: str) -> None:
    first, eaten, last = grades_by(path, name, ["a", "eat", "b"], memory_mb=1024)
    assert (first, last) == (Grade(1.0), Grade(1.0))
    assert eaten.score is None
    assert str(eaten.error).startswith("MemoryError")
    assert grades_by(path, name, ["eat"], memory_mb=4096) == [Grade(1.0)]


def test_what_a_function_prints_is_no_result_and_fills_no_file(path: Path) -> None:
    """It prints 0.3 MB on stderr in each of 15 calls."""
    with GraderPool(FunctionReward(path=path, name="talks", workers=1, timeout_s=60)) as graders:
        assert graders.grade_all([Response(text="a")] * 15) == [Grade(1.0)] * 15
        (worker,) = graders._running
        assert os.fstat(worker._stderr.fileno()).st_size < 2_000_000
    error = only_error(path, "talks", "die")
    assert error.startswith("the grader process died (exit status 3): ")
    assert error.endswith("\nthe reason")
    assert len(error) < 600


def test_async_calls_run_side_by_side_up_to_the_bound(path: Path) -> None:
    start = time.monotonic()
    assert grades_by(path, "sleeps", ["0.5"] * 16) == [Grade(1.0)] * 16
    assert time.monotonic() - start < 0.5 * 16
    start = time.monotonic()
    assert grades_by(path, "sleeps", ["0.5"] * 4, concurrency=2) == [Grade(1.0)] * 4
    assert time.monotonic() - start >= 1.0


def test_a_late_async_call_ends_alone(path: Path) -> None:
    assert grades_by(path, "sleeps", ["0", "60", "1"], timeout_s=3) == [
        Grade(1.0),
        Grade(None, "took longer than 3 s"),
        Grade(1.0),
    ]


@pytest.mark.parametrize(("text", "error"), [("block", "killed after 1 s"), ("die", "exit status 3")])
def test_an_async_call_that_takes_its_worker_along_is_the_only_error(
    path: Path, text: str, error: str
) -> None:
    grades = grades_by(path, "blocks", ["a", "b", text, "c"], timeout_s=1)
    assert [grade.score for grade in grades] == [1.0, 1.0, None, 1.0]
    assert error in str(grades[2].error)


def test_lists(path: Path) -> None:
    assert grades_by(path, "lists", ["right", "x", "x", "x", "right"], batch_size=3) == [
        Grade(3.1),
        Grade(3.0),
        Grade(3.0),
        Grade(2.0),
        Grade(2.1),
    ]
    spread = grades_by(path, "lists", ["x"] * 4, batch_size=32, workers=2)
    assert spread == [Grade(2.0)] * 4, "no worker is idle while another has a long list"
    assert grades_by(path, "lists_async", ["x"] * 4, batch_size=2) == [Grade(2.0)] * 4
    error = "the grader returned None (NoneType), expected a finite number"
    assert grades_by(path, "one_wrong", ["x"] * 3, batch_size=3) == [
        Grade(1.0),
        Grade(None, error),
        Grade(0.0),
    ]
    error = "the grader must return a list of 2 results, got 1 of them"
    assert grades_by(path, "too_few", ["x"] * 2, batch_size=2) == [Grade(None, error)] * 2


def test_network_only_where_it_is_allowed(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        # It catches the exception and returns 0. That is still not a wrong answer.
        error = only_error(path, "connects", port)
        assert error == "the grader tried socket.getaddrinfo; reward.allow has no network"
        assert grades_by(path, "connects", [port], allow=("network",)) == [Grade(1.0)]
        assert only_error(path, "starts", "x", allow=("network",)).startswith(
            "PermissionError: a grader tried subp"
        )


def test_other_programs_only_where_they_are_allowed(path: Path) -> None:
    assert "tried subprocess.Popen; reward.allow has no subprocess" in only_error(path, "starts", "x")
    assert grades_by(path, "starts", ["x"], allow=("subprocess",)) == [Grade(5.0)]


def test_files_are_written_only_where_it_is_allowed(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "x"
    assert "tried open; reward.allow has no files" in only_error(path, "writes", str(file))
    assert not file.exists()
    assert grades_by(path, "writes", [str(file)], allow=("files",)) == [Grade(1.0)]


def test_what_a_killed_worker_has_started_is_killed_too(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    settings: dict[str, Any] = {"allow": ("subprocess", "files"), "timeout_s": 2}
    assert only_error(path, "leaves_a_child", str(file), **settings) == "killed after 2 s"
    pid, deadline = int(file.read_text()), time.monotonic() + 15
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_only_named_variables_reach_the_function(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "four")
    monkeypatch.setenv("OTHER_KEY", "hunter2")
    (grade,) = grades_by(path, "variables", ["x"], environment=("JUDGE_KEY",))
    assert grade.parts == {"given": 4.0, "kept": 0.0}
    with pytest.raises(RewardRefused, match=r"reward\.environment: NO_SUCH_KEY is not set"):
        GraderPool(FunctionReward(path=path, name="score", environment=("JUDGE_KEY", "NO_SUCH_KEY")))


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("nothing", {}, "reward.name: there is no `nothing` in {path}"),
        ("number", {}, "reward.name: `number` in {path} is not a function, but 3"),
        (
            "needs_two",
            {},
            "must take one argument, the response; its signature is needs_two(response, truth)",
        ),
        (
            "needs_none",
            {"batch_size": 4},
            "must take one argument, a list of responses; its signature is needs_none()",
        ),
        (
            "score",
            {"concurrency": 2},
            "reward.concurrency is only for `async` functions, and `score` in {path} is not one",
        ),
    ],
)
def test_a_function_that_will_not_do_is_refused(
    path: Path, name: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RewardRefused) as caught:
        check_reward(FunctionReward(path=path, name=name, **settings))
    assert reason.format(path=path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "reward.path: {path} does not exist"),
        (
            "import no_such_module\n",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_module' (r.py:1)",
        ),
        ("\ndef score(:\n", "cannot be imported: SyntaxError: invalid syntax (r.py:2)"),
        ("raise RuntimeError('one\\ntwo')\n", "cannot be imported: RuntimeError: one (r.py:1)"),
        ("raise RuntimeError\n", "cannot be imported: RuntimeError (r.py:1)"),
        ("raise SystemExit(1)\n", "cannot be imported: SystemExit: 1 (r.py:1)"),
    ],
)
def test_a_file_that_will_not_do_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    path = tmp_path / "r.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RewardRefused) as caught:
        check_reward(FunctionReward(path=path, name="score"))
    assert reason.format(path=path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import os\nos._exit(3)\n", "the grader process died (exit status 3)"),
        ("import time\ntime.sleep(1000)\n", "no reply after 5 s"),
    ],
    ids=["ends its process", "never ends"],
)
def test_a_file_whose_import_takes_the_worker_along_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr(pool, "_START_TIMEOUT_S", 5.0 if "sleep" in text else 60.0)
    path = tmp_path / "r.py"
    path.write_text(text)
    with pytest.raises(RewardRefused) as caught:
        check_reward(FunctionReward(path=path, name="score"))
    assert str(caught.value) == f"reward.path: a grader process did not start: {reason}"


def test_settings_that_mean_nothing() -> None:
    for settings, reason in (
        ({"name": "my score"}, "reward.name must be the name of a function, got 'my score'"),
        ({"name": "score", "batch_size": 0}, "reward.batch_size must be > 0"),
        ({"name": "score", "environment": ("A=1",)}, "got 'A=1'"),
    ):
        with pytest.raises(ValueError, match=reason):
            FunctionReward(path=Path("x.py"), **settings)  # type: ignore[arg-type]


def test_a_cut_off_response_has_no_answer() -> None:
    assert not FunctionReward(path=Path("x.py"), name="score").has_answer("#### 5")


def test_killed_workers_of_an_async_function_are_replaced(path: Path) -> None:
    with GraderPool(FunctionReward(path=path, name="sleeps", workers=1)) as graders:
        killer = threading.Timer(0.5, lambda: [os.kill(pid, signal.SIGKILL) for pid in graders.worker_pids()])
        killer.start()
        assert graders.grade_all([Response(text="1")] * 3) == [Grade(1.0)] * 3
        killer.join()
