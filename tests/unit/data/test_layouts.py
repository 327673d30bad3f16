"""Every public layout in the roles that make sense for it: the right question, truth and answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.layouts import LAYOUTS, Role
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.rows import DataError
from megatron_chord.data.templates import ChatTemplate
from tests.support.files import write_rows

SYSTEM = {"role": "system", "content": "Reason step by step."}
ASKED = {"role": "user", "content": "6*7?"}
ANSWER = "6*7=42, so \\boxed{42}."
ANSWERED = {"role": "assistant", "content": ANSWER}

CASES: dict[str, tuple[dict[str, Any], tuple[dict[str, str], ...], str | None, str | None]] = {
    "LUFFY": (
        {
            "prompt": [SYSTEM, ASKED],
            "target": [ANSWERED],
            "reward_model": {"ground_truth": "42", "style": "rule"},
        },
        (SYSTEM, ASKED),
        "42",
        ANSWER,
    ),
    "verl RL": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [SYSTEM, ASKED],
            "reward_model": {"ground_truth": "42", "style": "rule"},
            "extra_info": {"index": 0},
        },
        (SYSTEM, ASKED),
        "42",
        None,
    ),
    "verl RL from NumPy": (
        {"prompt": [ASKED], "reward_model": {"ground_truth": ["42"], "style": "rule"}},
        (ASKED,),
        "42",
        None,
    ),
    "verl RL as JSON text": (
        {"prompt": [ASKED], "reward_model": '{"ground_truth": "42", "style": "rule"}'},
        (ASKED,),
        "42",
        None,
    ),
    "verl SFT": ({"extra_info": {"question": "6*7?", "answer": ANSWER}}, (ASKED,), None, ANSWER),
    "verl SFT messages": ({"messages": [SYSTEM, ASKED, ANSWERED]}, (SYSTEM, ASKED), None, ANSWER),
    "TRL chat": ({"prompt": [ASKED], "completion": [ANSWERED]}, (ASKED,), None, ANSWER),
    "TRL text": ({"prompt": "6*7?", "completion": ANSWER}, (ASKED,), None, ANSWER),
    "TRL GRPO": ({"prompt": [SYSTEM, ASKED], "solution": "42"}, (SYSTEM, ASKED), "42", "42"),
    "ms-swift GRPO": ({"messages": [ASKED], "solution": ANSWER}, (ASKED,), "42", None),
    "ShareGPT": (
        {
            "system": SYSTEM["content"],
            "conversations": [{"from": "human", "value": "6*7?"}, {"from": "gpt", "value": ANSWER}],
        },
        (SYSTEM, ASKED),
        None,
        ANSWER,
    ),
    "OpenR1-Math": (
        {
            "problem": "6*7?",
            "answer": "42",
            "solution": "a person's",
            "generations": ["6*7=41", ANSWER],
            "correctness_math_verify": [False, True],
            "messages": [ASKED, ANSWERED],
        },
        (ASKED,),
        "42",
        ANSWER,
    ),
    "GSM8K": (
        {"question": "6*7?", "answer": "6*7=<<6*7=42>>42\n#### 1,042"},
        (ASKED,),
        "1042",
        "6*7=<<6*7=42>>42\n#### 1,042",
    ),
    "MATH": ({"problem": "6*7?", "solution": ANSWER, "level": "Level 1"}, (ASKED,), "42", ANSWER),
    "NuminaMath": (
        {"problem": "6*7?", "solution": ANSWER, "messages": [ASKED, ANSWERED]},
        (ASKED,),
        "42",
        ANSWER,
    ),
    "Alpaca": (
        {"instruction": "Multiply.", "input": "6*7?", "output": ANSWER},
        ({"role": "user", "content": "Multiply.\n\n6*7?"},),
        None,
        ANSWER,
    ),
    "NeMo-RL": ({"problem": "6*7?", "expected_answer": "42"}, (ASKED,), "42", None),
    "slime": ({"prompt": [ASKED], "label": "42"}, (ASKED,), "42", None),
    "chat prompts": ({"prompt": [SYSTEM, ASKED], "answer": 42}, (SYSTEM, ASKED), "42", None),
    "own": ({"problem": "6*7?", "answer": "42", "solution": ANSWER}, (ASKED,), "42", ANSWER),
}
"""By layout: a row, its question, its truth (None: unfit as a prompt), its answer (None: unfit as a demonstration)."""


def write(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".jsonl":
        return write_rows(path, *rows)
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def load(role: Role, path: Path, template: ChatTemplate) -> tuple[Any, str]:
    if role == "prompts":
        (row,), report = load_prompts(path, template, max_prompt_tokens=500, overlong="fail")
    else:
        (row,), report = load_demonstrations(
            path, template, max_prompt_tokens=500, max_response_tokens=500, overlong="fail"
        )
    return row, str(report)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", CASES)
def test_question_truth_and_answer(name: str, suffix: str, tmp_path: Path, chatml: ChatTemplate) -> None:
    row, question, truth, answer = CASES[name]
    path = write(tmp_path / f"rows{suffix}", row)
    if truth is None:
        with pytest.raises(DataError):
            load("prompts", path, chatml)
    else:
        prompt, _ = load("prompts", path, chatml)
        assert prompt.messages == question
        assert prompt.truth == truth
    if answer is None:
        with pytest.raises(DataError):
            load("demonstrations", path, chatml)
    else:
        demonstration, _ = load("demonstrations", path, chatml)
        expected = chatml.demonstration([*question, {"role": "assistant", "content": answer}])
        assert (demonstration.token_ids, demonstration.trainable) == expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_has_a_case_that_names_it(layout: Any, tmp_path: Path, chatml: ChatTemplate) -> None:
    reports = []
    for row, _, truth, answer in CASES.values():
        path = write(tmp_path / "rows.jsonl", row)
        reports += [load("prompts", path, chatml)[1]] if truth is not None else []
        reports += [load("demonstrations", path, chatml)[1]] if answer is not None else []
    assert any(f"read as {layout.name} rows" in report for report in reports)


def test_fields_that_change_the_problem_are_named_when_not_used(tmp_path: Path, chatml: ChatTemplate) -> None:
    for suffix in (".jsonl", ".parquet"):
        path = write(
            tmp_path / f"rows{suffix}", {"problem": "6*7?", "answer": "42", "context": "c", "input": "i"}
        )
        assert load("prompts", path, chatml)[1].endswith("; not used: context, input")


@pytest.mark.parametrize("written", ["1e22", "0.0000001", "142.0", "3", "-7.50"])
def test_a_number_is_the_truth_as_it_is_written(written: str, tmp_path: Path, chatml: ChatTemplate) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"problem": "6*7?", "answer": {written}}}\n')
    assert load("prompts", path, chatml)[0].truth == written


@pytest.mark.parametrize(
    ("role", "row", "reason"),
    [
        ("prompts", {"problem": "6*7?", "solution": "42"}, r"no \\boxed"),
        ("prompts", {"prompt": [ASKED], "reward_model": {"ground_truth": ["1", "2"]}}, "lists 2 truths"),
        ("prompts", {"prompt": [ASKED], "reward_model": "rule"}, "a text that is not JSON"),
        (
            "demonstrations",
            {"problem": "6*7?", "generations": ["41"], "correctness_math_verify": [False]},
            "none of its `generations` is marked as correct",
        ),
        (
            "demonstrations",
            {"conversations": [{"from": "bot", "value": "x"}]},
            r"conversations\[0\] must have",
        ),
        ("demonstrations", {"prompt": 3, "completion": "x"}, "`prompt` must be a text or a list"),
    ],
)
def test_a_row_that_its_layout_cannot_read_says_why(
    role: Role, row: dict[str, Any], reason: str, tmp_path: Path, chatml: ChatTemplate
) -> None:
    with pytest.raises(DataError, match=reason):
        load(role, write(tmp_path / "rows.jsonl", row), chatml)


def test_a_mapping_says_where_a_row_has_what_is_read(tmp_path: Path, chatml: ChatTemplate) -> None:
    row = {"turns": [{"value": "6*7?"}, {"value": ANSWER}], "meta": '{"gold": {"text": "42"}}', "note": "n"}
    path = write(tmp_path / "rows.jsonl", row)
    (prompt,), report = load_prompts(
        path,
        chatml,
        max_prompt_tokens=500,
        overlong="fail",
        fields={"problem": "turns.0.value", "answer": "meta.gold.text"},
    )
    assert (prompt.messages, prompt.truth) == ((ASKED,), "42")
    assert str(report).endswith("; not used: note")
    (demonstration,), _ = load_demonstrations(
        path,
        chatml,
        max_prompt_tokens=500,
        max_response_tokens=500,
        overlong="fail",
        fields={"problem": "turns.0.value", "solution": "turns.1.value"},
    )
    assert (demonstration.token_ids, demonstration.trainable) == chatml.demonstration([ASKED, ANSWERED])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"problem": "turns.2.value"}, "`turns.2.value`: `turns` has no `2`"),
        ({"problem": "turn"}, "`turn`: the row has no `turn`"),
        ({"problem": "note.x"}, "`note.x`: `note` is a text that is not JSON"),
        ({"truht": "note"}, "the fields of prompts name truht; known fields: answer, "),
    ],
)
def test_a_mapping_that_leads_nowhere_says_how_far_it_leads(
    fields: dict[str, str], reason: str, tmp_path: Path, chatml: ChatTemplate
) -> None:
    path = write(tmp_path / "rows.jsonl", {"turns": [], "note": "n"})
    with pytest.raises(DataError, match=reason):
        load_prompts(path, chatml, max_prompt_tokens=500, overlong="fail", fields=fields)


def test_a_few_faulty_rows_may_be_left_out(tmp_path: Path, chatml: ChatTemplate) -> None:
    good = {"problem": "6*7?", "answer": "42"}
    path = write(tmp_path / "rows.jsonl", *[good] * 9, {"problem": "6*7?"})
    limits: dict[str, Any] = {"max_prompt_tokens": 500, "overlong": "fail"}
    prompts, report = load_prompts(path, chatml, max_dropped=0.1, **limits)
    assert (len(prompts), report.num_rows, report.num_kept) == (9, 10, 9)
    assert f"1 left out as faulty (the first: {path}:10: has none of" in str(report)
    with pytest.raises(
        DataError, match=r"1 row cannot be used.*\n.*:10: .*; data.max_dropped allows 0.09 of all rows"
    ):
        load_prompts(path, chatml, max_dropped=0.09, **limits)


@pytest.mark.parametrize(
    ("role", "row", "reason"),
    [
        (
            "prompts",
            {"prompt": [ASKED], "label": "42", "solution": "43"},
            r"read as slime \(prompt, label\) rows or as TRL GRPO \(prompt, solution\) rows, with different results. "
            r"Choose in data.prompts: `fields: \{messages: prompt, answer: label\}` or "
            r"`fields: \{messages: prompt, answer: solution\}`",
        ),
        (
            "prompts",
            {"problem": "6*7?", "answer": "42", "expected_answer": "43"},
            r"`fields: \{problem: problem, answer: expected_answer\}` or "
            r"`fields: \{problem: problem, answer: answer\}`",
        ),
        (
            "demonstrations",
            {"prompt": "6*7?", "completion": "42", "extra_info": {"question": "6*7?", "answer": "43"}},
            r"`fields: \{problem: extra_info.question, solution: extra_info.answer\}` or "
            r"`fields: \{problem: prompt, solution: completion\}`",
        ),
        (
            "prompts",
            {"question": "6*7?", "answer": "So\n#### 42", "problem": "6*7?", "expected_answer": "43"},
            r"a file without the column expected_answer, problem for GSM8K .* rows or `fields: ",
        ),
    ],
)
def test_two_readings_of_a_row_are_refused_with_the_line_that_chooses(
    role: Role, row: dict[str, Any], reason: str, tmp_path: Path, chatml: ChatTemplate
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        load(role, write(tmp_path / "rows.jsonl", row, row), chatml)
    assert "1 row cannot be used" in str(caught.value), "the first row is enough"


def test_two_readings_that_agree_are_one(tmp_path: Path, chatml: ChatTemplate) -> None:
    row = {"prompt": [ASKED], "label": "42", "solution": "42"}
    prompt, report = load("prompts", write(tmp_path / "rows.jsonl", row), chatml)
    assert prompt.truth == "42"
    assert "read as slime" in report


def test_the_chosen_mapping_reads_turns_of_from_and_value(tmp_path: Path, chatml: ChatTemplate) -> None:
    turns = [{"from": "human", "value": "6*7?"}, {"from": "gpt", "value": ANSWER}]
    path = write(
        tmp_path / "rows.jsonl", {"conversations": turns, "messages": [ASKED, {**ANSWERED, "content": "43"}]}
    )
    with pytest.raises(
        DataError, match=r"`fields: \{messages: conversations\}` or `fields: \{messages: messages\}`"
    ):
        load("demonstrations", path, chatml)
    (row,), _ = load_demonstrations(
        path,
        chatml,
        max_prompt_tokens=500,
        max_response_tokens=500,
        overlong="fail",
        fields={"messages": "conversations"},
    )
    assert (row.token_ids, row.trainable) == chatml.demonstration([ASKED, ANSWERED])


def test_an_empty_system_message_is_none(tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": [{"role": "system", "content": ""}, ASKED, ANSWERED]})
    demonstration, _ = load("demonstrations", path, chatml)
    assert (demonstration.token_ids, demonstration.trainable) == chatml.demonstration([ASKED, ANSWERED])
