"""Answers on disk: kept, found again by what was asked, and whole after a kill."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_chord.evaluation.answers import Answer, AnswerFile, key_of
from megatron_chord.rollout.client import GenerateRequest

REQUEST = GenerateRequest(
    prompt_ids=(1, 2), num_samples=1, seed=5, temperature=1.0, max_tokens=8, stop_token_ids=(9,), top_p=0.9
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


def test_a_key_holds_all_that_an_answer_depends_on() -> None:
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
    assert len(keys) == 9
    assert key_of("a", "bf16", dataclasses.replace(REQUEST)) == key_of("a", "bf16", REQUEST)


def test_answers_are_found_again_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "x.jsonl"
    with AnswerFile(path) as file:
        file.add([answer("k"), answer("l")])
        file.add([answer("k", 0.0)])
    with AnswerFile(path) as file:
        assert file.by_key == {"k": answer("k", 0.0), "l": answer("l")}


def test_a_line_that_was_cut_off_is_no_answer_and_spoils_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with AnswerFile(path) as file:
        file.add([answer("k"), answer("l")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with AnswerFile(path) as file:
        assert set(file.by_key) == {"k"}
        file.add([answer("l")])
    assert path.read_bytes() == whole
