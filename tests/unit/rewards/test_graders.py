"""Several rewards at once: their grades, their weights, and the result if one of them fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.records import Grade, GradedRollouts, Prompt, Rollout
from megatron_chord.rewards.graders import Graders, check_reward, combined
from megatron_chord.rewards.kinds.base import OverlongConfig
from megatron_chord.rewards.kinds.exact import ExactReward
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward
from megatron_chord.rewards.pool import RewardRefused
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import RewardConfig, SumReward, check_sources, terms_of
from megatron_chord.sampling.context import reward_of
from megatron_chord.sampling.rounds import part_means

MODULE = """
def brief(response):
    if "!" in response.text:
        raise ValueError("shouting")
    return {"short": 1.0 if response.num_tokens < 5 else 0.0, "calm": 0.5}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "my.py"
    path.write_text(MODULE)
    return path


def test_terms_grade_side_by_side_and_one_failure_is_no_data(path: Path) -> None:
    reward = SumReward(
        terms=(
            ExactReward(workers=1, sources=("sums",)),
            FunctionReward(workers=1, path=path, name="brief", weight=0.2),
            ExactReward(workers=1, sources=("words",), answer_marker="answer:"),
        )
    )
    with Graders(reward) as graders:
        grades = graders.grade_all(
            [
                Response(text="#### 4", truth="4", num_tokens=3, source="sums"),
                Response(text="#### 5!", truth="4", num_tokens=3, source="sums"),
                Response(text="answer: yes", truth="yes", num_tokens=9, source="words"),
            ]
        )
        assert graders.grade_all([]) == []
    assert grades == [
        Grade(1.0, None, {"exact": 1.0, "brief": 1.5, "brief.short": 1.0, "brief.calm": 0.5}),
        Grade(None, "brief: ValueError: shouting (my.py:4)"),
        Grade(0.5, None, {"brief": 0.5, "brief.short": 0.0, "brief.calm": 0.5, "exact_2": 1.0}),
    ]


def test_one_term_is_graded_as_without_a_list(path: Path) -> None:
    for reward in (FunctionReward(workers=1, path=path, name="brief"), None):
        reward = reward or SumReward(terms=(FunctionReward(workers=1, path=path, name="brief"),))
        with Graders(reward) as graders:
            (grade,) = graders.grade_all([Response(text="x", num_tokens=1)])
        assert grade == Grade(1.5, None, {"short": 1.0, "calm": 0.5})


def test_graders_are_closed_when_a_later_term_is_refused(path: Path) -> None:
    reward = SumReward(terms=(ExactReward(workers=1), FunctionReward(path=path, name="none")))
    with pytest.raises(RewardRefused, match="there is no `none`"):
        Graders(reward)
    with pytest.raises(RewardRefused, match="there is no `none`"):
        check_reward(reward)


def total(
    reward: RewardConfig, grade: Grade, text: str = "", *, length: int = 1, truncated: bool = False
) -> float:
    return reward_of(grade, text, length=length, truncated=truncated, reward=reward, limit=100)


def test_the_weighted_sum_by_hand(path: Path) -> None:
    brief = FunctionReward(path=path, name="brief", weight=0.2)
    reward = SumReward(
        terms=(MathReward(weight=2, format="chord"), brief, ToolCallsReward(weight=0)),
        overlong=OverlongConfig(cache=50, penalty=0.5),
    )
    grade = Grade(
        0.0, None, {"math": 0.0, "brief": 1.5, "brief.short": 1.0, "brief.calm": 0.5, "tool_calls": 1.0}
    )
    # Wrong and without <think>: 2 x -0.1, 0.2 x 1.5 and 0 x 1.
    assert total(reward, grade) == pytest.approx(-0.2 + 0.3)
    # Cut off before an answer: 2 x -1, and 25 of the 50 last tokens cost half of 0.5.
    assert total(reward, grade, length=75, truncated=True) == pytest.approx(-2 + 0.3 - 0.25)
    # The answer is stated where the mathematics reward looks for it, so it is only wrong.
    assert total(reward, grade, "\\boxed{1}", truncated=True) == pytest.approx(-0.2 + 0.3)
    of_other_source = Grade(1.5, None, {"brief": 1.5})
    assert total(reward, of_other_source) == pytest.approx(0.3)


def test_a_single_reward_has_a_weight_a_form_and_a_length_too(path: Path) -> None:
    function = FunctionReward(
        path=path, name="brief", weight=0.5, format="chord", overlong=OverlongConfig(cache=10)
    )
    assert total(function, Grade(0.8, None, {"short": 0.8})) == pytest.approx(0.4)
    assert total(function, Grade(0.0), "<think></think>") == 0
    # Only the function knows what an answer is, so a cut-off response counts as one without an answer.
    assert total(function, Grade(0.0), "#### 1", truncated=True, length=100) == pytest.approx(-0.5 - 1)


def test_means_of_terms_are_over_those_that_have_them() -> None:
    rollout = Rollout(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", weight_version=0)
    grades = (
        Grade(1.0, None, {"math": 1.0, "judge": 0.25}),
        Grade(None, "judge: broken"),
        Grade(0.0, None, {"math": 0.0}),
    )
    item = GradedRollouts(
        prompt=Prompt(id="1", messages=(), truth="", token_ids=(1,)),
        rollouts=(rollout,) * 3,
        texts=("",) * 3,
        grades=grades,
        rewards=(1.05, None, 0.0),
    )
    assert part_means([item]) == {"reward_terms": {"judge": 0.25, "math": 0.5}}
    assert part_means([]) == {}


def test_every_source_has_a_reward_and_every_name_a_source() -> None:
    reward = SumReward(terms=(MathReward(sources=("math",)), ToolCallsReward(sources=("tools", "bfcl"))))
    check_sources(reward, ["math", "tools", "bfcl"])
    with pytest.raises(ValueError, match=r"reward\.sources: nothing grades the prompts of essays"):
        check_sources(reward, ["math", "tools", "bfcl", "essays"])
    with pytest.raises(ValueError, match="no data source is called bfcl, tools; the data sources are: math"):
        check_sources(reward, ["math"])
    check_sources(SumReward(terms=(*reward.terms, ExactReward())), ["math", "tools", "bfcl", "essays"])


def test_names_of_terms_are_unique(path: Path) -> None:
    function = FunctionReward(path=path, name="brief")
    reward = SumReward(terms=(MathReward(), function, MathReward(weight=2), function))
    assert list(terms_of(reward)) == ["math", "brief", "math_2", "brief_2"]
    assert terms_of(reward)["math_2"].weight == 2


def test_no_term_takes_the_name_of_another(path: Path) -> None:
    """A label that looks like a numbered name keeps it. A term that needs a number takes the next free one."""

    def names(*labels: str) -> list[str]:
        terms = tuple(
            MathReward() if label == "math" else FunctionReward(path=path, name=label) for label in labels
        )
        found = terms_of(SumReward(terms=terms))
        assert tuple(found.values()) == terms
        return list(found)

    assert names("length_2", "length") == ["length_2", "length"]
    assert names("math", "math", "math_2") == ["math", "math_3", "math_2"]
    assert names("math_2", "math", "math") == ["math_2", "math", "math_3"]
    assert names("math", "math", "math", "math_2_2", "math_2") == [
        "math",
        "math_3",
        "math_4",
        "math_2_2",
        "math_2",
    ]


def test_what_no_term_grades_has_failed() -> None:
    for of_many in (False, True):
        assert combined({}, of_many=of_many) == Grade(None, "no reward grades prompts of this data source")
