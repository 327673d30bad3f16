"""Real worker processes grade text that loops, uses too much memory or contains code, and lost workers are replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from megatron_chord.records import Grade
from megatron_chord.rewards.kinds.exact import ExactReward
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.pool import GraderPool
from tests.support.files import data_set, rows_of
from tests.support.grading import grades_of
from tests.support.processes import is_alive

LOOPS = r"\boxed{2x=9^{9^{9^9}}}"
EATS_MEMORY = (r"\boxed{(1+x)^{1000000}=x}", "x^2+2y=3")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(MathReward(workers=2, timeout_s=20, memory_mb=300)) as pool:
        yield pool


@pytest.fixture(scope="module")
def hasty() -> Iterator[GraderPool]:
    with GraderPool(MathReward(workers=2, timeout_s=2, memory_mb=2000)) as pool:
        yield pool


def wait_until_dead(pids: list[int], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers are still alive"
        time.sleep(0.05)


def test_grades_come_back_in_order(pool: GraderPool) -> None:
    items = [(f"\\boxed{{{i}}}", str(i if i % 3 else i + 1)) for i in range(60)]
    assert grades_of(pool, items) == [Grade(1.0 if i % 3 else 0.0) for i in range(60)]
    assert grades_of(pool, []) == []


def test_odd_text(pool: GraderPool) -> None:
    texts = ["\ud800 18", "18\x00", "\n" * 1000 + "18", "\u2028####\u00a018", "x" * 3_000_000 + " 18"]
    assert grades_of(pool, [(text, "18") for text in texts]) == [Grade(1.0)] * 5


def test_truth_that_cannot_be_read_is_an_error_not_a_score(pool: GraderPool) -> None:
    assert grades_of(pool, [("\\boxed{1}", "")]) == [Grade(None, "ValueError: the truth is empty")]


def cpu_seconds(pid: int) -> float:
    """Processor time of the process's main thread."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def test_late_gradings_are_killed_side_by_side(hasty: GraderPool) -> None:
    """Both workers have computed for a while when the first of them is killed."""
    first = hasty.worker_pids()
    assert len(first) == 2
    begun = latest = {pid: cpu_seconds(pid) for pid in first}
    found: list[list[Grade]] = []
    thread = threading.Thread(target=lambda: found.append(grades_of(hasty, [(LOOPS, "18")] * 4)))
    thread.start()
    with contextlib.suppress(OSError):  # a worker has ended
        while all(is_alive(pid) for pid in first):
            latest = {pid: cpu_seconds(pid) for pid in first}
            time.sleep(0.02)
    thread.join()
    assert min(latest[pid] - begun[pid] for pid in first) > 0.05
    assert found == [[Grade(None, "killed after 2 s")] * 4]
    wait_until_dead(first)
    assert grades_of(hasty, [("\\boxed{18}", "18")] * 4) == [Grade(1.0)] * 4  # the replacements did this


def test_an_answer_is_graded_again_when_its_grader_was_stopped(hasty: GraderPool) -> None:
    """A stop from outside says nothing about the text, so the answer is graded again. The second text is larger than a
    socket's buffer."""
    grades_of(hasty, [("18", "18")] * 4)
    stopped = hasty.worker_pids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert grades_of(hasty, [("18", "18"), ("x" * 1_000_000 + " 18", "18")]) == [Grade(1.0)] * 2
    wait_until_dead(stopped)


def test_memory_that_math_verify_swallows_is_an_error_not_a_zero(pool: GraderPool) -> None:
    assert grades_of(pool, [EATS_MEMORY, ("18", "18")]) == [
        Grade(None, "the grader ran out of memory"),
        Grade(1.0),
    ]


def test_killed_workers_are_replaced_and_their_grading_repeated(pool: GraderPool) -> None:
    grades_of(pool, [("18", "18")] * 4)
    killed = pool.worker_pids()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert grades_of(pool, [("18", "18")] * 10) == [Grade(1.0)] * 10
    assert not set(killed) & set(pool.worker_pids())


def test_grading_whose_workers_keep_dying_is_an_error(pool: GraderPool) -> None:
    stop = threading.Event()

    def assassin() -> None:
        while not stop.wait(0.02):
            for pid in pool.worker_pids():
                os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=assassin)
    thread.start()
    try:
        (grade,) = grades_of(pool, [EATS_MEMORY])
    finally:
        stop.set()
        thread.join()
    assert grade.score is None
    assert grade.error is not None
    assert "died (exit status -9)" in grade.error
    assert grades_of(pool, [("18", "18")]) == [Grade(1.0)]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{__import__('os').system('touch canary')}",
        r"\boxed{\text{__import__('os').system('touch canary')}}",
        r"\boxed{$$(lambda: __import__('os').system('touch canary'))()$$}",
        "#### __import__('os').system('touch canary')",
        "#### $exec(\"open('canary', 'w')\")$",
        "answer: 1 + __import__('os').system('touch canary')",
        r"\boxed{\operatorname{eval}(\text{open('canary','w')})}",
        r"\boxed{1}'); __import__('os').system('touch canary'); ('",
    ],
)
def test_text_is_not_executed(
    pool: GraderPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (grade,) = grades_of(pool, [(text, "2")])
    assert grade.score in (0.0, None)
    for folder in (tmp_path, *(Path(f"/proc/{pid}/cwd").resolve() for pid in pool.worker_pids())):
        assert not (folder / "canary").exists()


def test_pool_works_from_threads_that_come_and_go() -> None:
    # The kernel's parent-death signal refers to the thread that started the child.
    made: list[GraderPool] = []
    maker = threading.Thread(
        target=lambda: made.append(GraderPool(ExactReward(workers=1, timeout_s=20, memory_mb=300)))
    )
    maker.start()
    maker.join()
    with made[0] as pool:
        pids = pool.worker_pids()
        grades: list[Grade] = []
        user = threading.Thread(target=lambda: grades.extend(grades_of(pool, [("#### 1", "1")] * 3)))
        user.start()
        user.join(60)
        assert grades == [Grade(1.0)] * 3
        assert pool.worker_pids() == pids
    wait_until_dead(pids)


def test_workers_share_no_secret_and_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    with GraderPool(MathReward(workers=1, timeout_s=20, memory_mb=300, answer_marker="Answer:")) as pool:
        (pid,) = pool.worker_pids()
        assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        assert grades_of(pool, [("Answer: 3\nnot 5", "3")]) == [Grade(1.0)]


def test_signals_for_the_run_do_not_end_a_worker(pool: GraderPool) -> None:
    grades_of(pool, [("18", "18")] * 4)
    pids = pool.worker_pids()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in pids:
            os.kill(pid, number)
    assert grades_of(pool, [("18", "18")] * 4) == [Grade(1.0)] * 4
    assert pool.worker_pids() == pids


def test_pool_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)did not start.*grader process"):
        GraderPool(MathReward(workers=1, timeout_s=5, memory_mb=20))


def test_close_ends_a_grading_under_way() -> None:
    pool = GraderPool(MathReward(workers=1, timeout_s=60, memory_mb=2000))
    pids = pool.worker_pids()
    closer = threading.Timer(0.5, pool.close)
    closer.start()
    with pytest.raises(RuntimeError, match="closed"):
        grades_of(pool, [(LOOPS, "18")] * 3)
    closer.join()
    wait_until_dead(pids)
    assert pool.worker_pids() == []
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        grades_of(pool, [("18", "18")])


PARENT = f"""
import threading
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.pool import GraderPool
from megatron_chord.rewards.response import Response
pool = GraderPool(MathReward(workers=2, timeout_s=600))
threading.Thread(target=pool.grade_all, args=([Response(text={LOOPS!r}, truth="18")],), daemon=True).start()
print(*pool.worker_pids(), flush=True)
input()
"""


@pytest.mark.parametrize("how", ["kill -9", "exit"])
def test_workers_die_with_their_parent(how: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_alive(pid) for pid in pids)
        time.sleep(0.3)  # one of them is in the loop now
        if how == "exit":
            parent.stdin.write("\n")
            parent.stdin.flush()
        else:
            parent.kill()
        parent.wait(240)
        wait_until_dead(pids)


def test_math500_truths_grade_as_themselves(pool: GraderPool) -> None:
    truths = [row["answer"] for row in rows_of(data_set("math") / "math500.jsonl")[::8]]
    right = grades_of(pool, [(f"so \\boxed{{{truth}}}.", truth) for truth in truths])
    assert right == [Grade(1.0)] * len(truths)
    others = grades_of(
        pool,
        [(f"\\boxed{{{truths[i - 1]}}}", truth) for i, truth in enumerate(truths) if truths[i - 1] != truth],
    )
    assert [grade for grade in others if grade.score is None] == []  # the sandbox does not slow others down
    assert sum(grade.score or 0 for grade in others) <= 2


def test_a_wait_for_a_grade_can_be_ended() -> None:
    """It is asked about every second. The first time is before the wait."""

    class StopAskedFor(Exception):
        pass

    asked = iter(range(9))

    def check() -> None:
        if next(asked) == 1:
            raise StopAskedFor

    with GraderPool(ExactReward(workers=1)) as pool, pytest.raises(StopAskedFor):
        pool.wait([Future()], check=check)


def test_each_grading_is_told_of() -> None:
    told: list[int] = []
    with GraderPool(ExactReward(workers=1), on_grade=lambda: told.append(1)) as pool:
        grades_of(pool, [("#### 18", "18")] * 5)
    assert len(told) == 5
