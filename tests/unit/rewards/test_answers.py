from __future__ import annotations

import time

import pytest

from megatron_chord.rewards.answers import last_boxed, marked_answer


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed {3}", "3"),
        (r"}}} \boxed{4} }", "4"),
        (r"{ \boxed{5}", "5"),
        (r"\\boxed{6}", "6"),
        (r"\boxed{}", ""),
        (r"\boxed{1\}", None),
        ("\\boxed{1\\", None),
        (r"\boxed 5", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_box_comes_before_marker() -> None:
    assert marked_answer(r"#### 1 \boxed{2} #### 3", "####") == "2"
    assert marked_answer("#### 1\n####  3 \nx", "####") == "3 "
    assert marked_answer("so it is 3", "####") is None


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 100_000, "\\boxed" * 100_000 + " " * 1_000_000, "{" * 1_000_000]
)
def test_time_is_linear(text: str) -> None:
    start = time.monotonic()
    assert last_boxed(text) is None
    assert time.monotonic() - start < 10  # a quadratic reader would take hours
