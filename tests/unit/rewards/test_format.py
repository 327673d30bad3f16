from __future__ import annotations

import pytest

from megatron_chord.rewards.format import FormatRule, shape_reward, well_formed

GOOD, BAD = "<think>a</think> \\boxed{1}", "\\boxed{1}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>b", True),
        ("x <think></think>", True),
        ("<think>a", False),
        ("a</think>b", False),
        ("</think><think>", False),
        ("<think><think>a</think>", False),
        ("<think>a</think><think>b</think>", False),
        ("<think>a</think></think>", False),
        ("< think>a</think>", False),
        ("", False),
    ],
)
def test_well_formed(text: str, expected: bool) -> None:
    assert well_formed(text) == expected


@pytest.mark.parametrize(
    ("rule", "right_good", "right_bad", "wrong_good", "wrong_bad", "cut_off"),
    [
        ("none", 1.0, 1.0, 0.0, 0.0, 0.0),
        ("chord", 1.0, 1.0, 0.0, -0.1, -1.0),
        ("trinity", 1.0, 0.9, 0.0, -0.1, -0.1),
    ],
)
def test_published_rewards(
    rule: FormatRule, right_good: float, right_bad: float, wrong_good: float, wrong_bad: float, cut_off: float
) -> None:
    def reward(score: float, text: str, truncated: bool = False, answered: bool = True) -> float:
        return shape_reward(score, text=text, truncated=truncated, answered=answered, rule=rule)

    assert [reward(1.0, GOOD), reward(1.0, BAD)] == [right_good, right_bad]
    assert [reward(0.0, GOOD), reward(0.0, BAD)] == [wrong_good, wrong_bad]
    assert reward(0.0, "<think>hm", truncated=True, answered=False) == cut_off
    # Only both together are the worst case. A full stop without an answer, or an answer before the cut, is not.
    assert reward(0.0, GOOD, answered=False) == wrong_good
    assert reward(0.0, GOOD, truncated=True) == wrong_good
    assert reward(1.0, GOOD, truncated=True) == right_good


def test_number_hit_in_passing_is_no_answer() -> None:
    text = "<think>first 9 + 9 = 18"
    assert shape_reward(1.0, text=text, truncated=True, answered=False, rule="chord") == -1.0
    assert shape_reward(1.0, text=text, truncated=True, answered=False, rule="none") == 1.0
