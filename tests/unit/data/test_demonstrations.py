from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.observed import Observed
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.rendering import Renderer
from megatron_chord.data.rows import DataError
from megatron_chord.data.templates import ChatTemplate
from tests.support.files import rows_of, write_rows
from tests.unit.data.conftest import CHATML

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def demonstrations_within(
    path: Path, template: ChatTemplate, *, prompt: int = 4000, response: int = 4000, overlong: str = "drop"
):
    return load_demonstrations(
        path, template, max_prompt_tokens=prompt, max_response_tokens=response, overlong=overlong
    )


def test_all_forms_of_a_demonstration_give_the_same_tokens(tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write_rows(
        tmp_path / "e.jsonl",
        {"problem": "2+2?", "solution": "4", "answer": "4"},
        {"prompt": "2+2?", "response": "4"},
        {"messages": [USER, ANSWER], "id": 9},
    )
    demonstrations, report = demonstrations_within(path, chatml)
    assert {(demonstration.token_ids, demonstration.trainable) for demonstration in demonstrations} == {
        chatml.demonstration([USER, ANSWER])
    }
    assert [demonstration.id for demonstration in demonstrations] == ["e.jsonl:1", "e.jsonl:2", "9"]
    assert report.num_kept == 3


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write_rows(
        tmp_path / "e.jsonl",
        {"problem": "2+2?", "solution": "4"},
        {"problem": "2+2?"},
        {"problem": "2+2?", "solution": "4", "response": "4"},
        {"problem": "2+2?", "solution": " "},
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        {"messages": [ANSWER, USER]},
    )
    with pytest.raises(DataError) as caught:
        demonstrations_within(path, chatml)
    assert str(caught.value).splitlines()[1:] == [
        f"{path}:2: has none of `solution`, `response`",
        f"{path}:3: has `solution`, `response`, which mean the same: keep one",
        f"{path}:4: `solution` is empty",
        f"{path}:5: messages[0] is the last message of a demonstration, so it must be the assistant's, got user's",
        f"{path}:6: messages[1].content is empty",
        f"{path}:7: messages[0] is from assistant, expected user "
        "(system only first, then user and assistant in turn)",
    ]


def test_row_without_a_trainable_token_is_named(tmp_path: Path, chatml: ChatTemplate) -> None:
    class Untrained(ChatTemplate):
        def demonstration(self, messages, **how):
            token_ids, trainable = super().demonstration(messages, **how)
            return token_ids, tuple(False for _ in trainable)

    template = Untrained(**{name: getattr(chatml, name) for name in chatml.__dataclass_fields__})
    path = write_rows(tmp_path / "e.jsonl", {"problem": "2+2?", "solution": "4"})
    with pytest.raises(DataError, match=r"e\.jsonl:1: no token of the demonstration is trainable"):
        demonstrations_within(path, template)


def test_template_without_stop_token_is_a_fault_of_every_row(tmp_path: Path, chatml: ChatTemplate) -> None:
    template = replace(chatml, renderer=Renderer(CHATML.replace("<|im_end|>", ""), {}, "FILE"))
    path = write_rows(tmp_path / "e.jsonl", *[{"problem": "2+2?", "solution": "4"}] * 3)
    with pytest.raises(DataError, match="3 rows cannot be used") as caught:
        demonstrations_within(path, template)
    assert str(caught.value).count("without a stop token") == 3


def test_overlong_demonstrations(tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write_rows(
        tmp_path / "e.jsonl",
        {"problem": "2+2?", "solution": "4"},
        {"problem": "2+2?", "solution": "4 " * 50},
        {"problem": "2+2? " * 50, "solution": "4"},
    )
    num_prompt = len(chatml.prompt_ids([USER]))
    num_response = 2  # "4" and the stop token
    kept, report = demonstrations_within(path, chatml, prompt=num_prompt, response=num_response)
    assert [demonstration.id for demonstration in kept] == ["e.jsonl:1"]
    assert (report.num_rows, report.num_overlong) == (3, 2)
    with pytest.raises(DataError, match="2 rows cannot be used") as caught:
        demonstrations_within(path, chatml, prompt=num_prompt, response=num_response, overlong="fail")
    assert f"{path}:2: {num_prompt} prompt and " in str(caught.value)
    with pytest.raises(DataError, match="all 3 demonstrations have more than"):
        demonstrations_within(path, chatml, response=1)


def test_gsm8k_is_read_as_prompts_and_as_demonstrations(math_data: Path, chatml: ChatTemplate) -> None:
    file = math_data / "gsm8k_test.jsonl"
    demonstrations, _ = demonstrations_within(file, chatml)
    prompts, _ = load_prompts(file, chatml, max_prompt_tokens=4000, overlong="drop")
    assert len(demonstrations) == len(prompts) == 660
    rows = rows_of(file)
    for row, prompt, demonstration in zip(rows, prompts, demonstrations, strict=True):
        start = len(prompt.token_ids)
        assert demonstration.token_ids[:start] == prompt.token_ids
        assert demonstration.trainable == (False,) * start + (True,) * (len(demonstration.token_ids) - start)
        assert chatml.decode(demonstration.token_ids[start:]) == row["solution"]
        assert demonstration.token_ids[-1] in chatml.stop_token_ids


def test_every_row_is_observed_and_so_is_one_that_is_too_long(tmp_path: Path, chatml: ChatTemplate) -> None:
    long = {"role": "assistant", "content": "4 " * 90}
    path = write_rows(tmp_path / "d.jsonl", {"messages": [USER, ANSWER]}, {"messages": [USER, long]})
    seen: list[Observed] = []
    kept, _ = load_demonstrations(
        path,
        chatml,
        max_prompt_tokens=50,
        max_response_tokens=50,
        overlong="drop",
        observe=seen.append,
    )
    assert [(row.place, row.is_overlong) for row in seen] == [("d.jsonl:1", False), ("d.jsonl:2", True)]
    assert seen[1].messages == (USER, long)
    (demonstration,) = kept
    assert (seen[0].token_ids, seen[0].trainable) == (demonstration.token_ids, demonstration.trainable)


def test_every_prompt_is_observed_with_its_truth(tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write_rows(
        tmp_path / "p.jsonl", {"problem": "2+2?", "answer": 4}, {"problem": "2" * 90, "answer": 4}
    )
    seen: list[Observed] = []
    (prompt,), _ = load_prompts(path, chatml, max_prompt_tokens=50, overlong="drop", observe=seen.append)
    assert [(row.truth, row.is_overlong, row.trainable) for row in seen] == [
        ("4", False, ()),
        ("4", True, ()),
    ]
    assert seen[0].token_ids == prompt.token_ids
