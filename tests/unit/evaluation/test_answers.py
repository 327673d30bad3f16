"""Answers on disk are kept, are found again by their request, and are complete after a kill."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from megatron_chord.config_suite import BenchmarkConfig
from megatron_chord.evaluation import answers
from megatron_chord.evaluation.answers import Answer, AnswerFile, grading_of, key_of
from megatron_chord.evaluation.sampling import SuiteGraders
from megatron_chord.rewards.kinds.exact import ExactReward
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.table import RewardConfig, SumReward
from megatron_chord.rollout.replies import GenerateRequest

REQUEST = GenerateRequest(
    prompt_ids=(1, 2), num_rollouts=1, seed=5, temperature=1.0, max_tokens=8, stop_token_ids=(9,), top_p=0.9
)


def answer(key: str, score: float | None = 1.0) -> Answer:
    return Answer(
        key=key,
        problem="p",
        sample=0,
        response="√2\n",
        tokens=3,
        finish_reason="stop",
        score=score,
        error=None,
        graded_by="g",
    )


def test_a_key_contains_everything_that_changes_an_answer() -> None:
    changed = [
        dataclasses.replace(REQUEST, **change)
        for change in (
            {"prompt_ids": (1, 2, 3)},
            {"seed": 6},
            {"temperature": 0.9},
            {"max_tokens": 9},
            {"stop_token_ids": (9, 8)},
            {"top_p": 1.0},
        )
    ]
    keys = {key_of("a", "bf16", request) for request in (REQUEST, *changed)}
    keys |= {key_of("b", "bf16", REQUEST), key_of("a", "fp32", REQUEST)}
    assert len(keys) == 1 + len(changed) + 2
    assert key_of("a", "bf16", dataclasses.replace(REQUEST)) == key_of("a", "bf16", REQUEST)


def test_answers_are_found_again_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "x.jsonl"
    with AnswerFile(path) as file:
        file.add([answer("k"), answer("l")])
        file.add([answer("k", 0.0)])
    with AnswerFile(path) as file:
        assert file.by_key == {"k": answer("k", 0.0), "l": answer("l")}


def test_an_incomplete_line_is_ignored_and_later_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with AnswerFile(path) as file:
        file.add([answer("k"), answer("l")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with AnswerFile(path) as file:
        assert set(file.by_key) == {"k"}
        file.add([answer("l")])
    assert path.read_bytes() == whole


def test_a_grade_is_reused_only_with_the_code_that_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mark(reward: RewardConfig) -> str:
        return grading_of(BenchmarkConfig(name="b", file="x", reward=reward))

    path, helper, deep = tmp_path / "my.py", tmp_path / "helper.py", tmp_path / "deep" / "inside.py"
    deep.parent.mkdir()
    (tmp_path / "other.py").write_text("")
    path.write_text("from helper import half\n\ndef score(response):\n    return half\n")
    helper.write_text("import deep.inside\nhalf = 0.5\n")
    deep.write_text("")
    function = FunctionReward(path=path, name="score")
    rewards: list[RewardConfig] = [function, SumReward(terms=(ExactReward(), function))]
    exact = mark(ExactReward())
    marks = [mark(reward) for reward in rewards]
    (tmp_path / "other.py").write_text("# it is not imported")
    for reward in rewards:
        assert mark(reward) == marks[rewards.index(reward)]
    assert mark(dataclasses.replace(function, workers=7)) == marks[0]
    for file in (path, helper, deep):
        file.write_text(file.read_text() + "# edited\n")
        changed = [mark(reward) for reward in rewards]
        assert all(one != other for one, other in zip(changed, marks, strict=True))
        marks = changed
    assert mark(ExactReward()) == exact

    # The package's own graders.
    shutil.copytree(answers._REWARDS, tmp_path / "rewards")
    monkeypatch.setattr(answers, "_REWARDS", tmp_path / "rewards")
    assert mark(ExactReward()) == exact
    (tmp_path / "rewards" / "kinds" / "exact.py").write_text("# another version")
    assert mark(ExactReward()) != exact
    assert mark(function) == marks[0]


def test_a_change_of_the_reward_file_after_the_import_does_not_change_the_grades_key(tmp_path: Path) -> None:
    """The grader processes have imported it by then."""
    path = tmp_path / "my.py"
    path.write_text("def score(response):\n    return 1.0\n")
    benchmark = BenchmarkConfig(name="b", file="x", reward=FunctionReward(path=path, name="score"))
    with SuiteGraders() as graders:
        mark = graders.mark(benchmark)
        path.write_text("def score(response):\n    return 0.0\n")
        assert graders.mark(benchmark) == mark != grading_of(benchmark)
