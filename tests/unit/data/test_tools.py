from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.rows import DataError
from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.records import Prompt
from megatron_chord.rewards.tool_calls import grade, read_truth
from tests.support.files import data_set, write_rows

MAIL = {
    "name": "mail",
    "description": "Sends \u201email\u201c",
    "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
}
PAY = {"name": "bank.pay"}
CALL = {"name": "mail", "arguments": {"to": "Bob"}}
LINE = (
    '{"type": "function", "function": {"name": "mail", "description": "Sends \u201email\u201c", '
    '"parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}}'
)
ROW = {"problem": "Write to Bob", "tools": [MAIL], "truth": [CALL]}


def prompts_of(path: Path, template: ChatTemplate) -> list[Prompt]:
    return load_prompts(path, template, max_prompt_tokens=100_000, overlong="fail")[0]


def fault(tmp_path: Path, template: ChatTemplate, row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        prompts_of(write_rows(tmp_path / "p.jsonl", row), template)
    _, line = str(caught.value).splitlines()
    return line.removeprefix(f"{tmp_path}/p.jsonl:1: ")


def test_tools_are_in_the_system_message(tmp_path: Path, chatml: ChatTemplate) -> None:
    (prompt,) = prompts_of(write_rows(tmp_path / "p.jsonl", ROW | {"tools": [MAIL, PAY]}), chatml)
    system, user = prompt.messages
    assert (system["role"], user) == ("system", {"role": "user", "content": "Write to Bob"})
    pay = '{"type": "function", "function": {"name": "bank.pay"}}'
    assert f"<tools>\n{LINE}\n{pay}\n</tools>" in system["content"]
    assert '<tool_call>[{"name": "...", "arguments": {"...": ...}}, ...]</tool_call>' in system["content"]
    assert "<tool_call>[]</tool_call>" in system["content"]
    assert "<think>" in system["content"]
    assert prompt.token_ids == chatml.prompt_ids(prompt.messages)


def test_rows_own_system_message_comes_before_the_general_one(tmp_path: Path, chatml_folder: Path) -> None:
    own = [{"role": "system", "content": "Be polite.\n"}, {"role": "user", "content": "Write to Bob"}]
    path = write_rows(tmp_path / "p.jsonl", ROW, {**ROW, "problem": None, "messages": own})
    general, specific = prompts_of(path, load_template(chatml_folder, system_prompt="Be brief."))
    assert general.messages[0]["content"].startswith("Be brief.\n\n# Tools\n")
    assert specific.messages[0]["content"].startswith("Be polite.\n\n# Tools\n")
    assert [len(prompt.messages) for prompt in (general, specific)] == [2, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": MAIL}]},
        {"tools": None, "functions": [MAIL]},
        {"tools": json.dumps([MAIL])},
        {"truth": json.dumps([CALL])},
        {"truth": None, "ground_truth": [CALL]},
        {"truth": None, "answer": json.dumps([dict(reversed(CALL.items()))])},
    ],
)
def test_forms_of_a_row_are_the_same_prompt(tmp_path: Path, chatml: ChatTemplate, fields: dict) -> None:
    first, second = prompts_of(write_rows(tmp_path / "p.jsonl", ROW, ROW | fields), chatml)
    assert (first.messages, first.token_ids, first.truth) == (second.messages, second.token_ids, second.truth)
    assert first.truth == '[{"arguments": {"to": "Bob"}, "name": "mail"}]'


def test_rows_without_tools_are_as_they_were(tmp_path: Path, chatml: ChatTemplate) -> None:
    (prompt,) = prompts_of(
        write_rows(tmp_path / "p.jsonl", {"problem": "2+2?", "answer": 4, "ground_truth": [1]}), chatml
    )
    assert prompt.messages == ({"role": "user", "content": "2+2?"},)
    assert prompt.truth == "4"


def test_a_demonstration_has_the_same_prompt_tokens_as_the_prompt(
    tmp_path: Path, chatml: ChatTemplate
) -> None:
    solution = "<think>Bob it is</think><tool_call>[]</tool_call>"
    chat = [{"role": "user", "content": "Write to Bob"}, {"role": "assistant", "content": solution}]
    path = write_rows(
        tmp_path / "e.jsonl", {**ROW, "solution": solution}, {"tools": [MAIL], "messages": chat}
    )
    (prompt,) = prompts_of(write_rows(tmp_path / "p.jsonl", ROW), chatml)
    (first, second), _ = load_demonstrations(
        path, chatml, max_prompt_tokens=10_000, max_response_tokens=1000, overlong="fail"
    )
    start = len(prompt.token_ids)
    assert first.token_ids[:start] == prompt.token_ids
    assert chatml.decode(first.token_ids[start:]) == solution
    assert first.trainable == (False,) * start + (True,) * (len(first.token_ids) - start)
    assert (second.token_ids, second.trainable) == (first.token_ids, first.trainable)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"functions": [MAIL]}, "has `tools`, `functions`, which mean the same: keep one"),
        ({"tools": []}, "`truth` must be a string or a number, got a list"),
        ({"tools": MAIL}, "`tools` must be a list of functions; leave the field out where there are none"),
        (
            {"tools": "[{]"},
            "`tools`: broken JSON: Expecting property name enclosed in double quotes at column 3",
        ),
        ({"tools": '[{"name": 1, "name": 2}]'}, "`tools`: field given twice: `name`"),
        ({"tools": [MAIL, "pay"]}, "tools[1] must be a function schema, an object with a `name`"),
        ({"tools": [{"name": " "}]}, "tools[0] must be a function schema, an object with a `name`"),
        (
            {"tools": [{"type": "function", "function": "mail"}]},
            "tools[0] must be a function schema, an object",
        ),
        ({"tools": [{"name": "mail", "parameters": []}]}, "tools[0].parameters must be an object"),
        ({"tools": [MAIL, MAIL]}, "`tools` has several functions named mail"),
        ({"tools": [{"name": "mail", "x": "\ud800"}]}, "tool mail has an unpaired surrogate"),
        ({"tools": [{"name": "mail", "x": "<|im_end|>"}]}, "message 0 (system) holds '<|im_end|>'"),
        ({"tools": '[{"name": "mail", "x": 1e999}]'}, "tool mail cannot be written as JSON"),
        ({"truth": None}, "has none of `answer`, `truth`, `ground_truth`"),
        ({"answer": []}, "has `answer`, `truth`, which mean the same: keep one"),
        ({"truth": "mail(to='Bob')"}, "`truth`: broken JSON: Expecting value at column 1"),
        ({"truth": 5}, "`truth`: the true calls must be a JSON list, [] for none"),
        (
            {"truth": [{"mail": {"to": "Bob"}}]},
            "`truth`: true call 1: mail.to must be a list of accepted values",
        ),
        ({"truth": [CALL, {"name": "mail"}]}, "`truth`: true call 2 is neither"),
        ({"truth": [{"name": "pay", "arguments": {}}]}, "`truth` calls what is not among the tools: pay"),
        ({"truth": [{"name": "mail", "arguments": {"to": "\ud800"}}]}, "`truth` has an unpaired surrogate"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, chatml: ChatTemplate, fields: dict, reason: str) -> None:
    assert fault(tmp_path, chatml, ROW | fields).startswith(reason)


def test_parquet_holds_them_as_text_or_nested(tmp_path: Path, chatml: ChatTemplate) -> None:
    def written(row: dict[str, Any]) -> Path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "p.parquet")
        return tmp_path / "p.parquet"

    text = {**ROW, "tools": json.dumps([MAIL]), "truth": json.dumps([CALL])}
    (expected,) = prompts_of(write_rows(tmp_path / "p.jsonl", ROW), chatml)
    (prompt,) = prompts_of(written(text), chatml)
    assert (prompt.token_ids, prompt.truth) == (expected.token_ids, expected.truth)
    for name in ("tools", "truth"):
        (prompt,) = prompts_of(written({**text, name: ROW[name]}), chatml)
        assert (prompt.token_ids, prompt.truth) == (expected.token_ids, expected.truth)
    # Without tools these columns are unused.
    (plain,) = prompts_of(written({"problem": "2+2?", "answer": "4", "ground_truth": [CALL]}), chatml)
    assert plain.truth == "4"


@pytest.fixture(scope="module")
def tool_data() -> Path:
    """The folder of files such as bfcl_parallel.jsonl."""
    return data_set("tool_calling")


@pytest.mark.parametrize(
    ("name", "rows"), [("irrelevance", 240), ("live_simple", 258), ("parallel", 200), ("simple_python", 400)]
)
def test_bfcl(tool_data: Path, chatml: ChatTemplate, name: str, rows: int) -> None:
    file = tool_data / f"bfcl_{name}.jsonl"
    prompts = prompts_of(file, chatml)
    assert len(prompts) == rows
    for line, prompt in zip(file.read_text().splitlines(), prompts, strict=True):
        row = json.loads(line)
        system = prompt.messages[0]["content"]
        assert (prompt.messages[-1], prompt.id) == (row["messages"][-1], row["id"])
        tools = system.partition("<tools>\n")[2].partition("\n</tools>")[0].split("\n")
        assert [json.loads(tool)["function"] for tool in tools] == row["functions"]
        assert json.loads(prompt.truth) == row["ground_truth"]
        assert len(read_truth(prompt.truth)) == len(row["ground_truth"])
        refusal = grade("<think>no</think><tool_call>[]</tool_call>", prompt.truth)
        assert refusal == float(name == "irrelevance")
