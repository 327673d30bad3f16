from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.rows import DataError
from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.rewards.response import RowNeeds
from tests.support.files import write_rows


def prompts_within(path: Path, template: ChatTemplate, limit: int = 1000, overlong: str = "drop"):
    return load_prompts(path, template, max_prompt_tokens=limit, overlong=overlong)


def test_both_forms_of_a_question_are_the_same_prompt(tmp_path: Path, chatml: ChatTemplate) -> None:
    chat = [{"role": "user", "content": "2+2?"}]
    path = write_rows(
        tmp_path / "p.jsonl", {"question": "2+2?", "answer": 4}, {"messages": chat, "truth": "4", "id": "x"}
    )
    (first, second), report = prompts_within(path, chatml)
    assert first.token_ids == second.token_ids == chatml.prompt_ids(chat)
    assert (first.messages, first.truth, first.id) == (tuple(chat), "4", "p.jsonl:1")
    assert (second.messages, second.truth, second.id) == (tuple(chat), "4", "x")
    assert (report.num_rows, report.num_kept, report.num_overlong) == (2, 2, 0)


def test_system_prompt_is_among_the_messages(tmp_path: Path, chatml_folder: Path) -> None:
    template = load_template(chatml_folder, system_prompt="Be brief.")
    (prompt,), _ = prompts_within(write_rows(tmp_path / "p.jsonl", {"problem": "1?", "answer": 1}), template)
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert prompt.token_ids == template.prompt_ids(prompt.messages)


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write_rows(
        tmp_path / "p.jsonl",
        {"problem": "fine", "answer": "1"},
        {"problem": "no answer"},
        {"problem": "", "answer": "1"},
        {"problem": "injected <|im_end|>", "answer": "1"},
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "answer": "1",
        },
        {"problem": "x", "answer": "1", "id": "p.jsonl:1"},
    )
    with path.open("a") as file:
        file.write("{")
    with pytest.raises(DataError) as caught:
        prompts_within(path, chatml)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path}: 6 rows cannot be used"
    assert lines == [
        f"{path}:2: has none of `answer`, `truth`",
        f"{path}:3: `problem` is empty",
        f"{path}:4: message 0 (user) holds '<|im_end|>', which the tokenizer would read as a control token",
        f"{path}:5: messages[1] is the last message of a prompt, so it must be the user's or a tool's, got assistant's",
        f"{path}:6: `id` 'p.jsonl:1' is taken by {path}:1",
        f"{path}:7: broken JSON: Expecting property name enclosed in double quotes at column 2",
    ]


def test_overlong_prompts(tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write_rows(
        tmp_path / "p.jsonl", {"problem": "1", "answer": 1}, {"problem": "1 " * 99, "answer": 1}
    )
    short = len(chatml.prompt_ids([{"role": "user", "content": "1"}]))
    long = len(chatml.prompt_ids([{"role": "user", "content": "1 " * 99}]))
    kept, report = prompts_within(path, chatml, limit=short)
    assert [prompt.id for prompt in kept] == ["p.jsonl:1"]
    assert str(report) == f"{path}: 1 of 2 rows, 1 left out as over-long"
    with pytest.raises(DataError, match=rf"p\.jsonl:2: {long} prompt tokens, max_prompt_tokens is {short}"):
        prompts_within(path, chatml, limit=short, overlong="fail")
    with pytest.raises(DataError, match=rf"all 2 prompts have more than {short - 1} tokens"):
        prompts_within(path, chatml, limit=short - 1)


def test_gsm8k(math_data: Path, chatml: ChatTemplate) -> None:
    prompts, report = prompts_within(math_data / "gsm8k_test.jsonl", chatml, limit=4000)
    assert report.num_kept == report.num_rows == len(prompts) == 660
    assert prompts[0].id == "gsm8k-test-0"
    assert prompts[0].truth == "18"
    assert "ducks lay 16 eggs per day" in prompts[0].messages[0]["content"]


def test_a_reward_that_needs_no_truth_gets_rows_without_one(tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write_rows(
        tmp_path / "p.jsonl", {"problem": "write", "rubric": "short"}, {"problem": "1?", "answer": 1}
    )
    prompts, _ = load_prompts(
        path, chatml, max_prompt_tokens=99, overlong="drop", needs=lambda source: RowNeeds(truth=False)
    )
    assert [(prompt.truth, dict(prompt.fields)) for prompt in prompts] == [("", {}), ("1", {})]
    with pytest.raises(DataError, match=r"p\.jsonl:1: has none of `answer`, `truth`"):
        prompts_within(path, chatml)
    broken = write_rows(tmp_path / "q.jsonl", {"problem": "1?", "answer": [1]})
    with pytest.raises(DataError, match="`answer` must be a string or a number"):
        load_prompts(
            broken, chatml, max_prompt_tokens=99, overlong="drop", needs=lambda source: RowNeeds(truth=False)
        )


@pytest.mark.parametrize(
    "fields", [{}, {"problem": "prompt.0.content", "answer": "reward_model.ground_truth"}]
)
def test_a_prompt_keeps_its_row_as_the_file_has_it(
    tmp_path: Path, chatml: ChatTemplate, fields: dict[str, str]
) -> None:
    row = {
        "prompt": [{"role": "user", "content": "1?"}],
        "reward_model": {"ground_truth": "1", "style": "rule"},
        "level": 3,
    }
    path = write_rows(tmp_path / "p.jsonl", row)
    (prompt,), _ = load_prompts(
        path,
        chatml,
        max_prompt_tokens=99,
        overlong="drop",
        needs=lambda source: RowNeeds(fields=True),
        fields=fields,
    )
    assert prompt.fields == row
    assert prompt.truth == "1"
