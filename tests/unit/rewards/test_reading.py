from __future__ import annotations

import signal

import pytest

from megatron_chord.rewards import reading
from megatron_chord.rewards.reading import readings

MATH = [
    ("15", "number", "15"),
    ("1,000", "number", "1000"),
    ("so it is \\boxed{3}", "number", "3"),
    ("\\frac{1}{2}", "number", "1/2"),
    ("50\\%", "number", "50 %"),
    ("x = 3", "number", "3"),
    ("x+1", "expression", "x + 1"),
    ("1, 2, 3", "several", "1 | 2 | 3"),
    ("x>3", "intervals", "3 to \\infty"),
    ("C) 15", "option", "C 15"),
    ("Paris", "words", "paris"),
    ("\\emptyset", "expression", "the empty set"),
    ("seven of them!?", "unreadable", "nothing is read from it"),
]


def test_math_truths_are_told_apart_by_what_the_grader_makes_of_them() -> None:
    found = list(readings([truth for truth, _, _ in MATH], "math", "####"))
    assert [(truth, read.kind, read.text) for (truth, _, _), read in zip(MATH, found, strict=True)] == MATH


def test_a_truth_that_takes_too_long_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = readings(["1", "\\frac{1}{2}", "2"], "math", "####")
    assert next(found).text == "1"
    child = found.gi_yieldfrom.gi_frame.f_locals["child"]._process  # type: ignore[attr-defined]
    child.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "TIMEOUT_S", 0.1)
        late = next(found)
    assert (late.kind, late.text) == ("unreadable", "not read within 0.1 s")
    assert child.poll() is not None
    assert next(found).text == "2"


def test_exact_truths() -> None:
    found = list(readings(["$1,000.", "#### 7", "Paris"], "exact", "####"))
    assert [(read.kind, read.text) for read in found] == [
        ("number", "1000"),
        ("number", "7"),
        ("text", "Paris"),
    ]


def test_tool_truths() -> None:
    calls = '[{"name": "f", "arguments": {"a": 1}}]'
    found = list(readings([calls, "[]", "f(a=1)"], "tool_calls", "####"))
    assert [read.kind for read in found] == ["calls", "calls", "unreadable"]
    assert [read.text for read in found[:2]] == ["f", "no call"]
