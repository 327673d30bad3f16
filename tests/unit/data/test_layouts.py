"""Every public layout gives the right question, truth and answer, as prompts and as demonstrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.layouts import LAYOUTS, Reading, Role, ways_of
from megatron_chord.data.messages import chat_messages
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.rows import DataError, Row
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
    "verl GSM8K": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [SYSTEM, ASKED],
            "ability": "math",
            "reward_model": {"ground_truth": "42", "style": "rule"},
            "extra_info": {"split": "train", "index": 0, "question": "6*7", "answer": ANSWER},
        },
        (SYSTEM, ASKED),
        "42",
        ANSWER,
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
    "DeepMath": (
        {
            "question": "6*7?",
            "final_answer": "42",
            "difficulty": 1.0,
            "r1_solution_1": ANSWER,
            "r1_solution_2": "x",
        },
        (ASKED,),
        "42",
        ANSWER,
    ),
    "NuminaMath-1.5": (
        {
            "problem": "6*7?",
            "solution": ANSWER,
            "answer": "42",
            "question_type": "math-word-problem",
            "problem_is_valid": "Yes",
            "solution_is_valid": "Yes",
            "synthetic": False,
        },
        (ASKED,),
        "42",
        ANSWER,
    ),
    "DAPO-Math-17k": (
        {
            "data_source": "math_dapo",
            "prompt": [ASKED],
            "ability": "MATH",
            "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a7b"},
        },
        (ASKED,),
        "42",
        None,
    ),
    "Skywork-OR1": (
        {"prompt": [ASKED], "reward_model": {"ground_truth": '["42"]', "style": "rule"}},
        (ASKED,),
        "42",
        None,
    ),
    "Big-Math": (
        {"problem": "6*7?", "answer": "42", "source": "cn_k12", "domain": ["x"], "llama8b_solve_rate": 0.5},
        (ASKED,),
        "42",
        None,
    ),
    "MATH-500": (
        {"problem": "6*7?", "solution": ANSWER, "answer": "42", "subject": "Algebra", "unique_id": "u"},
        (ASKED,),
        "42",
        ANSWER,
    ),
    "OlympiadBench": (
        {"context": "Let x be 6.", "question": "6*7?", "solution": ["w"], "final_answer": ["$42$"]},
        ({"role": "user", "content": "Let x be 6.\n\n6*7?"},),
        "$42$",
        None,
    ),
    "AIME": (
        {"ID": "2024-I-1", "Problem": "6*7?", "Solution": ANSWER, "Answer": 42},
        (ASKED,),
        "42",
        ANSWER,
    ),
    "open-instruct": (
        {
            "messages": [ASKED, ANSWERED],
            "ground_truth": ["42"],
            "dataset": ["math"],
            "tools": ["search"],
        },
        (ASKED,),
        "42",
        None,
    ),
    "NeMo-RL input": ({"input": "6*7?", "output": "42"}, (ASKED,), "42", "42"),
    "NeMo-RL chat": (
        {"messages": [ASKED, {"role": "assistant", "content": "42"}], "task_name": "math"},
        (ASKED,),
        "42",
        "42",
    ),
    "OpenRLHF": ({"input": "6*7?", "label": "42"}, (ASKED,), "42", None),
    "ms-swift": (
        {"system": SYSTEM["content"], "query": "6*7?", "response": ANSWER, "history": []},
        (SYSTEM, ASKED),
        None,
        ANSWER,
    ),
    "prime-rl": (
        {"messages": None, "prompt": "6*7?", "completion": [ANSWERED], "tools": "[]"},
        (ASKED,),
        None,
        ANSWER,
    ),
    "a system column": (
        {"system": SYSTEM["content"], "problem": "6*7?", "answer": "42", "solution": ANSWER},
        (SYSTEM, ASKED),
        "42",
        ANSWER,
    ),
    "own": ({"problem": "6*7?", "answer": "42", "solution": ANSWER}, (ASKED,), "42", ANSWER),
}
"""For each layout: a row, its question, its truth (None: not usable as a prompt), and its answer (None: not usable as a
demonstration)."""


WEATHER = {"name": "w.get", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
PYTHON_LIKE = {"name": "w.get", "parameters": {"type": "dict", "properties": {"city": {"type": "str"}}}}
CALL = {"name": "w.get", "arguments": {"city": "Bern"}}
BERN = {"role": "user", "content": "Bern?"}

TOOL_CASES: dict[str, tuple[dict[str, Any], tuple[dict[str, str], ...], Any]] = {
    "Trinity ToolACE": (
        {
            "raw_system": "You call functions.\n",
            "tools": json.dumps([PYTHON_LIKE]),
            "conversations": [{"from": "human", "value": "Bern?"}],
            "answer": json.dumps([CALL]),
        },
        ({"role": "system", "content": "You call functions."}, BERN),
        [CALL],
    ),
    "BFCL": (
        {
            "id": "simple_0",
            "question": [[BERN]],
            "function": [PYTHON_LIKE],
            "ground_truth": [{"w.get": {"city": ["Bern", ""]}}],
        },
        (BERN,),
        [{"w.get": {"city": ["Bern", ""]}}],
    ),
    "xLAM": (
        {
            "id": 7,
            "query": "Bern?",
            "tools": json.dumps([{"name": "w.get", "parameters": {"city": {"type": "str, optional"}}}]),
            "answers": json.dumps([CALL]),
        },
        (BERN,),
        [CALL],
    ),
    "OpenAI": (
        {
            "messages": [BERN],
            "tools": [{"type": "function", "function": WEATHER, "strict": True}],
            "answer": [
                {"id": "1", "type": "function", "function": {**CALL, "arguments": '{"city": "Bern"}'}}
            ],
        },
        (BERN,),
        [CALL],
    ),
    "one call, arguments as text": (
        {
            "messages": [BERN],
            "tools": [WEATHER],
            "answer": {"name": "w.get", "arguments": '{"city": "Bern"}'},
        },
        (BERN,),
        [CALL],
    ),
    "parameters for arguments": (
        {
            "problem": "Bern?",
            "functions": [WEATHER],
            "truth": [{"name": "w.get", "parameters": {"city": "Bern"}}],
        },
        (BERN,),
        [CALL],
    ),
    "a list of JSON texts": (
        {"problem": "Bern?", "tools": [json.dumps(WEATHER)], "answer": json.dumps([CALL])},
        (BERN,),
        [CALL],
    ),
}
"""Rows for tool use: a row, its question without the functions, and its true calls. The function is always WEATHER."""


def write_by_suffix(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".jsonl":
        return write_rows(path, *rows)
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def load_row(role: Role, path: Path, template: ChatTemplate) -> tuple[Any, str]:
    if role == "prompts":
        (row,), report = load_prompts(path, template, max_prompt_tokens=5000, overlong="fail")
    else:
        (row,), report = load_demonstrations(
            path, template, max_prompt_tokens=5000, max_response_tokens=500, overlong="fail"
        )
    return row, str(report)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", CASES)
def test_question_truth_and_answer(name: str, suffix: str, tmp_path: Path, chatml: ChatTemplate) -> None:
    row, question, truth, answer = CASES[name]
    path = write_by_suffix(tmp_path / f"rows{suffix}", row)
    if truth is None:
        with pytest.raises(DataError):
            load_row("prompts", path, chatml)
    else:
        prompt, _ = load_row("prompts", path, chatml)
        assert prompt.messages == question
        assert prompt.truth == truth
    if answer is None:
        with pytest.raises(DataError):
            load_row("demonstrations", path, chatml)
    else:
        demonstration, _ = load_row("demonstrations", path, chatml)
        expected = chatml.demonstration([*question, {"role": "assistant", "content": answer}])
        assert (demonstration.token_ids, demonstration.trainable) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", TOOL_CASES)
def test_functions_and_true_calls(name: str, suffix: str, tmp_path: Path, chatml: ChatTemplate) -> None:
    row, question, truth = TOOL_CASES[name]
    prompt, _ = load_row("prompts", write_by_suffix(tmp_path / f"rows{suffix}", row), chatml)
    own = {"messages": list(question), "tools": [WEATHER], "answer": truth}
    if name == "xLAM":
        own["tools"] = [{**WEATHER, "parameters": {**WEATHER["parameters"], "required": []}}]
    expected, _ = load_row("prompts", write_by_suffix(tmp_path / "own.jsonl", own), chatml)
    assert (prompt.messages, prompt.truth) == (expected.messages, expected.truth)
    assert json.loads(prompt.truth) == truth


def test_null_keys_that_arrow_fills_in_never_reach_a_prompt(tmp_path: Path, chatml: ChatTemplate) -> None:
    sums = {"name": "sum", "parameters": {"type": "object", "properties": {"n": {"type": "number"}}}}
    row = {
        "messages": [BERN],
        "tools": [WEATHER, sums],
        "answer": [CALL, {"name": "sum", "arguments": {"n": 2}}],
    }
    prompt, report = load_row("prompts", write_by_suffix(tmp_path / "rows.parquet", row), chatml)
    expected, _ = load_row("prompts", write_by_suffix(tmp_path / "rows.jsonl", row), chatml)
    assert (prompt.messages, prompt.truth) == (expected.messages, expected.truth)
    assert report.endswith("; keys that are null inside nested columns were left out")


@pytest.mark.parametrize("empty", [[], "[]", "", None])
def test_no_functions_are_no_functions(empty: Any, tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write_by_suffix(tmp_path / "rows.jsonl", {"messages": [ASKED], "tools": empty, "answer": "42"})
    assert load_row("prompts", path, chatml)[0].messages == (ASKED,)


def test_functions_that_a_system_message_shows_are_not_shown_twice(
    tmp_path: Path, chatml: ChatTemplate
) -> None:
    turns = [
        {"from": "system", "value": "Call <tools>[...]</tools>."},
        {"from": "human", "value": "Bern?"},
        {"from": "gpt", "value": "<tool_call>\n{}\n</tool_call>"},
    ]
    path = write_by_suffix(tmp_path / "rows.jsonl", {"conversations": turns, "tools": json.dumps([WEATHER])})
    row, _ = load_row("demonstrations", path, chatml)
    assert (
        row.token_ids
        == chatml.demonstration(
            [
                {"role": role, "content": turn["value"]}
                for role, turn in zip(("system", "user", "assistant"), turns, strict=True)
            ]
        )[0]
    )


@pytest.mark.parametrize("names", [("function_call", "observation"), ("tool_call", "tool_response")])
def test_turns_of_calls_and_results_are_no_text(names: tuple[str, str]) -> None:
    turns = [
        {"from": "human", "value": "Bern?"},
        {"from": names[0], "value": json.dumps(CALL)},
        {"from": names[1], "value": "18 C"},
        {"from": "gpt", "value": ANSWER},
    ]
    row = {"conversations": turns, "tools": json.dumps([WEATHER])}
    own = Reading("demonstrations").own_row(Row("f:1", 1, row))
    assert own.fields["tools"] == [WEATHER]
    assert chat_messages(own) == (
        BERN,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "18 C"},
        ANSWERED,
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "options": ["x", "y"], "answer": "B"}, "tools/prepare.py mmlu_pro"),
        ({"Question": "q", "Correct Answer": "d", "Incorrect Answer 1": "a"}, "tools/prepare.py gpqa"),
        ({"question": [[BERN]], "involved_classes": ["X"], "path": []}, "BFCL's multi-turn"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data"),
        (
            {"id": "x", "question": [[BERN]], "function": [WEATHER]},
            r"possible_answer/ \(tools/prepare.py bfcl",
        ),
        ({"id": "x", "question": [[BERN], [BERN]], "function": [WEATHER], "ground_truth": []}, "has 2 turns"),
        ({"problem": "Show x.", "answer": "proof", "problem_is_valid": "Yes"}, "`answer` is 'proof'"),
        ({"system": "a", "messages": [SYSTEM, ASKED], "answer": "1"}, "another system message"),
        ({"prompt": [ASKED], "reward_model": {"ground_truth": '["1", "2"]'}}, "lists 2 truths"),
    ],
)
def test_rows_that_only_look_usable_say_what_to_do(
    row: dict[str, Any], reason: str, tmp_path: Path, chatml: ChatTemplate
) -> None:
    with pytest.raises(DataError, match=reason):
        load_row("prompts", write_by_suffix(tmp_path / "rows.jsonl", row), chatml)


def test_every_layout_has_a_case_that_is_read_so(tmp_path: Path, chatml: ChatTemplate) -> None:
    rows = [(row, truth, answer) for row, _, truth, answer in CASES.values()]
    rows += [(row, truth, None) for row, _, truth in TOOL_CASES.values()]
    names = set()
    for row, truth, answer in rows:
        fields = {name: value for name, value in row.items() if value is not None}
        names |= {ways_of(fields, "prompts")[0].name} if truth is not None else set()
        names |= {ways_of(fields, "demonstrations")[0].name} if answer is not None else set()
    assert {layout.name for layout in LAYOUTS} <= names
    path = write_by_suffix(tmp_path / "rows.jsonl", CASES["LUFFY"][0])
    assert load_row("prompts", path, chatml)[1].endswith(
        "read as LUFFY (prompt, target, reward_model.ground_truth) rows"
    )


def test_fields_that_change_the_problem_are_named_when_not_used(tmp_path: Path, chatml: ChatTemplate) -> None:
    for suffix in (".jsonl", ".parquet"):
        path = write_by_suffix(
            tmp_path / f"rows{suffix}", {"problem": "6*7?", "answer": "42", "context": "c", "input": "i"}
        )
        assert load_row("prompts", path, chatml)[1].endswith("; not used: context, input")


@pytest.mark.parametrize("written", ["1e22", "0.0000001", "142.0", "3", "-7.50"])
def test_a_number_is_the_truth_as_it_is_written(written: str, tmp_path: Path, chatml: ChatTemplate) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"problem": "6*7?", "answer": {written}}}\n')
    assert load_row("prompts", path, chatml)[0].truth == written


@pytest.mark.parametrize("written", ["1e22", "0.0000001", "142.0"])
@pytest.mark.parametrize("fields", [None, {"messages": "prompt", "answer": "reward_model.ground_truth"}])
def test_a_number_inside_json_text_is_the_truth_as_it_is_written(
    written: str, fields: dict[str, str] | None, tmp_path: Path, chatml: ChatTemplate
) -> None:
    path = write_by_suffix(
        tmp_path / "rows.jsonl", {"prompt": [ASKED], "reward_model": f'{{"ground_truth": {written}}}'}
    )
    (prompt,), _ = load_prompts(path, chatml, max_prompt_tokens=500, overlong="fail", fields=fields)
    assert prompt.truth == written


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
            {"conversations": [{"from": "bard", "value": "x"}]},
            r"conversations\[0\] must have",
        ),
        ("demonstrations", {"prompt": 3, "completion": "x"}, "`prompt` must be a text or a list"),
        (
            "demonstrations",
            {"problem": "6*7?", "answer": "42", "problem_is_valid": "Yes"},
            r"rows\.jsonl:1: read as NuminaMath-1.5 .* rows: field missing or null: `solution`",
        ),
        (
            "demonstrations",
            {"Problem": "6*7?", "Answer": "42"},
            r"rows\.jsonl:1: read as AIME .* rows: field missing or null: `Solution`",
        ),
        (
            "prompts",
            {"question": "6*7?", "final_answer": ["42"], "context": ["c"]},
            r"rows\.jsonl:1: cannot be read as OlympiadBench .*`context` is a list, ",
        ),
        ("demonstrations", {"problem": "6*7?", "generations": 3}, "`generations` must be a list .*got int"),
        ("demonstrations", {"problem": "6*7?", "generations": "42"}, "`generations` must be a list"),
        (
            "demonstrations",
            {"problem": "6*7?", "generations": ["42"], "correctness_math_verify": 1},
            "`correctness_math_verify` is int",
        ),
        ("demonstrations", {"query": "6*7?", "response": "42", "history": 7}, "`history` is int"),
        (
            "prompts",
            {"messages": 7, "ground_truth": "42", "dataset": "d"},
            r"rows\.jsonl:1: cannot be read as open-instruct .*`messages` is int",
        ),
    ],
)
def test_a_row_that_its_layout_cannot_read_says_why(
    role: Role, row: dict[str, Any], reason: str, tmp_path: Path, chatml: ChatTemplate
) -> None:
    with pytest.raises(DataError, match=reason):
        load_row(role, write_by_suffix(tmp_path / "rows.jsonl", row), chatml)


def test_a_mapping_says_where_a_row_has_what_is_read(tmp_path: Path, chatml: ChatTemplate) -> None:
    row = {"turns": [{"value": "6*7?"}, {"value": ANSWER}], "meta": '{"gold": {"text": "42"}}', "note": "n"}
    path = write_by_suffix(tmp_path / "rows.jsonl", row)
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


@pytest.mark.parametrize("asked", [[SYSTEM, ASKED], ASKED["content"]])
@pytest.mark.parametrize("answered", [[ANSWERED], ANSWER])
def test_a_mapped_demonstration_is_made_of_chats_and_texts(
    asked: Any, answered: Any, tmp_path: Path, chatml: ChatTemplate
) -> None:
    path = write_by_suffix(tmp_path / "rows.jsonl", {"asked": asked, "info": {"target": answered}})
    question = "messages" if isinstance(asked, list) else "problem"
    (row,), _ = load_demonstrations(
        path,
        chatml,
        max_prompt_tokens=500,
        max_response_tokens=500,
        overlong="fail",
        fields={question: "asked", "response": "info.target"},
    )
    messages = asked if isinstance(asked, list) else [ASKED]
    assert (row.token_ids, row.trainable) == chatml.demonstration([*messages, ANSWERED])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"problem": "turns.2.value"}, "`turns.2.value`: `turns` has no `2`"),
        ({"problem": "turn"}, "`turn`: the row has no `turn`"),
        ({"problem": "note.x"}, "`note.x`: `note` is a text that is not JSON"),
        ({"truht": "note"}, "the fields of prompts name truht .did you mean truth..; known fields: answer, "),
    ],
)
def test_a_mapping_that_leads_nowhere_says_how_far_it_leads(
    fields: dict[str, str], reason: str, tmp_path: Path, chatml: ChatTemplate
) -> None:
    path = write_by_suffix(tmp_path / "rows.jsonl", {"turns": [], "note": "n"})
    with pytest.raises(DataError, match=reason):
        load_prompts(path, chatml, max_prompt_tokens=500, overlong="fail", fields=fields)


def test_a_few_faulty_rows_may_be_left_out(tmp_path: Path, chatml: ChatTemplate) -> None:
    good = {"problem": "6*7?", "answer": "42"}
    path = write_by_suffix(tmp_path / "rows.jsonl", *[good] * 9, {"problem": "6*7?"})
    limits: dict[str, Any] = {"max_prompt_tokens": 2000, "overlong": "fail"}
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
        load_row(role, write_by_suffix(tmp_path / "rows.jsonl", row, row), chatml)
    assert "1 row cannot be used" in str(caught.value), "the first row is enough"


def test_two_readings_that_agree_are_one(tmp_path: Path, chatml: ChatTemplate) -> None:
    row = {"prompt": [ASKED], "label": "42", "solution": "42"}
    prompt, report = load_row("prompts", write_by_suffix(tmp_path / "rows.jsonl", row), chatml)
    assert prompt.truth == "42"
    assert "read as slime" in report


def test_the_chosen_mapping_reads_turns_of_from_and_value(tmp_path: Path, chatml: ChatTemplate) -> None:
    turns = [{"from": "human", "value": "6*7?"}, {"from": "gpt", "value": ANSWER}]
    path = write_by_suffix(
        tmp_path / "rows.jsonl", {"conversations": turns, "messages": [ASKED, {**ANSWERED, "content": "43"}]}
    )
    with pytest.raises(
        DataError, match=r"`fields: \{messages: conversations\}` or `fields: \{messages: messages\}`"
    ):
        load_row("demonstrations", path, chatml)
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
    path = write_by_suffix(
        tmp_path / "rows.jsonl", {"messages": [{"role": "system", "content": ""}, ASKED, ANSWERED]}
    )
    demonstration, _ = load_row("demonstrations", path, chatml)
    assert (demonstration.token_ids, demonstration.trainable) == chatml.demonstration([ASKED, ANSWERED])


@pytest.mark.parametrize(
    ("asked", "mapping"),
    [
        ("6*7?", {"problem": "asked", "solution": "reply"}),
        ([ASKED, ANSWERED], {"messages": "asked"}),
        ([{"from": "human", "value": "6*7?"}, {"from": "gpt", "value": ANSWER}], {"messages": "asked"}),
    ],
)
def test_a_mapped_system_text_and_functions_are_shown(
    asked: Any, mapping: dict[str, str], tmp_path: Path, chatml: ChatTemplate
) -> None:
    def read(row: dict[str, Any], fields: dict[str, str]) -> tuple[Any, Any]:
        path = write_by_suffix(tmp_path / "rows.jsonl", row)
        limits: dict[str, Any] = {"max_prompt_tokens": 2000, "max_response_tokens": 500, "overlong": "fail"}
        (found,), _ = load_demonstrations(path, chatml, **limits, fields=fields)
        return found.token_ids, found.trainable

    def expected(**more: Any) -> tuple[Any, Any]:
        return read({"messages": [SYSTEM, ASKED, ANSWERED], **more}, {})

    row = {"rule": SYSTEM["content"], "asked": asked, "reply": ANSWER}
    assert read(row, {**mapping, "system": "rule"}) == expected()
    given = {**row, "known": {"list": json.dumps([WEATHER])}}
    shown = read(given, {**mapping, "system": "rule", "tools": "known.list"})
    assert shown == expected(tools=[WEATHER]) != expected()
