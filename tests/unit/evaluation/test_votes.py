"""Equal answers get the same vote, and a response without an answer has no vote."""

from __future__ import annotations

from megatron_chord.config_suite import BenchmarkConfig
from megatron_chord.evaluation.answers import Answer
from megatron_chord.evaluation.evaluate import _votes
from megatron_chord.evaluation.sampling import SuiteGraders
from megatron_chord.evaluation.votes import stated_answer, to_compare, votes_of
from megatron_chord.rewards.kinds.exact import ExactReward
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward


def test_what_a_response_states() -> None:
    math, exact, calls = MathReward(), ExactReward(), ToolCallsReward()
    assert stated_answer("so \\boxed{1/2}, no: \\boxed{0.5}", math) == "0.5"
    assert stated_answer("it is 5", math) is None
    assert stated_answer("#### 12 \nx", exact) == "12"
    assert stated_answer("nothing", exact) is None
    one = '<tool_call>[{"name": "f", "arguments": {"b": 1, "a": 2}}]</tool_call>'
    other = '<tool_call> [{"arguments": {"a": 2, "b": 1}, "name": "f"}] </tool_call>'
    assert stated_answer(one, calls) == stated_answer(other, calls)
    assert stated_answer(one, calls) == '[{"arguments": {"a": 2, "b": 1}, "name": "f"}]'
    assert stated_answer(one, ToolCallsReward(think="required")) is None


def test_equal_wrong_answers_are_one_class_and_right_ones_another() -> None:
    scores = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    stated = ["1/2", "7", "0.5", "1/2", "7.0", None, "3"]
    # Spellings of wrong answers: 1/2 (answer 0), 0.5 (answer 2), 3 (answer 6).
    assert to_compare(scores, stated) == [(2, 0), (6, 0), (6, 2)]
    votes = votes_of(scores, stated, equal=[(2, 0)])
    assert votes[1] == votes[4] == 0
    assert votes[0] == votes[2] == votes[3]
    assert votes[5] is None
    assert len({votes[0], votes[6], 0}) == 3


def test_two_classes_merge_when_an_answer_equals_both() -> None:
    votes = votes_of([0.0, 0.0, 0.0], ["a", "b", "c"], equal=[(1, 0), (2, 1)])
    assert votes[0] == votes[1] == votes[2] != 0


def test_a_reward_for_named_sources_compares_answers_too() -> None:
    """The reward grades only prompts with this benchmark's name, so the comparison must pass the name on."""
    benchmark = BenchmarkConfig(
        name="mine", file="x", metrics=("maj@3",), reward=ExactReward(workers=1, sources=("mine",))
    )
    answers = [
        Answer(
            key=str(sample),
            problem="p",
            sample=sample,
            response=f"#### {text}",
            tokens=2,
            finish_reason="stop",
            score=0.0,
            error=None,
            graded_by="",
        )
        for sample, text in enumerate(["1,000", "$1000", "6"])
    ]
    with SuiteGraders() as graders:
        first, second, third = _votes(benchmark, {"p": answers}, graders)["p"]
    assert first == second != third
