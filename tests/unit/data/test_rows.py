"""Every kind of faulty row is reported with its line and its reason, and one error lists all of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from megatron_chord.data import rows
from megatron_chord.data.messages import question_messages
from megatron_chord.data.rows import (
    DataError,
    LoadReport,
    Row,
    RowError,
    parse_rows,
    read_rows,
    row_id,
    text_field,
    truth_field,
)


def faults(path: Path, parse=lambda row: row) -> list[str]:
    """The lines of the error after the first, without the path."""
    with pytest.raises(DataError) as caught:
        parse_rows(path, parse)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{path}: ")
    return [line.removeprefix(f"{path}:") for line in lines]


def row_of(**fields: object) -> Row:
    return Row("dir/file.jsonl:1", 1, fields, file="file.jsonl")


def test_bom_crlf_blank_lines_and_line_separators_are_no_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"problem": "a"}\r\n\r\n' + '{"problem": "b\u2028c"}\n'.encode() + b'{"problem": "d"}'
    )
    read = read_rows(path)
    assert [row.fields["problem"] for row in read] == ["a", "b\u2028c", "d"]
    assert [row.position for row in read] == [f"{path}:1", f"{path}:3", f"{path}:4"]


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"problem": "fine"}',
        b'{"problem": "cut',
        b"[1, 2]",
        b'"text"',
        b'{"answer": 1, "problem": "x", "answer": 2}',
        b'{"answer": NaN}',
        b'{"problem": "\xff"}',
        b'{"answer": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"null",
        b'{"problem": "fine"} {"problem": "two on a line"}',
    ]
    path.write_bytes(b"\n".join(lines))
    found = faults(path)
    assert [line.split(":")[0] for line in found] == [str(n) for n in range(2, 12)]
    assert found[0] == "2: broken JSON: Unterminated string starting at at column 13"
    assert found[1] == "3: expected a JSON object, got a list"
    assert found[2] == "4: expected a JSON object, got a string"
    assert found[3] == "5: field given twice: `answer`"
    assert found[4] == "6: NaN is not JSON"
    assert found[5] == "7: not UTF-8 at byte 14 of the line"
    assert found[6].startswith("8: broken JSON: Exceeds the limit")
    assert found[7] == "9: JSON nested too deeply"
    assert found[8] == "10: expected a JSON object, got null"
    assert found[9] == "11: broken JSON: Extra data at column 21"


def test_no_more_than_twenty_faults_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"{number}": 1, "{number}": 2}}\n' for number in range(50)))
    found = faults(path)
    assert len(found) == 21
    assert found[-1] == "... and 30 more"


def test_a_fault_of_many_rows_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("1\n" + "nonsense\n" * 50 + "1\n{}")
    assert faults(path) == [
        "1: expected a JSON object, got int",
        "2 and 49 more rows: broken JSON: Expecting value at column 1",
        "52: expected a JSON object, got int",
    ]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "{}"), ("a.txt.gz", "x"), ("a", "x")])
def test_unknown_suffix(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"expected a file ending in"):
        read_rows(tmp_path / name)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_rows(tmp_path / "a.parquet")


def test_parquet_rows_are_the_same_rows(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    table = pyarrow.Table.from_pylist(
        [
            {"messages": messages, "id": 7, "blob": b"unread"},
            {"messages": None, "problem": "p", "answer": 1.5},
        ],
        schema=pyarrow.schema(
            [
                ("messages", pyarrow.list_(pyarrow.struct([("role", "string"), ("content", "string")]))),
                ("id", pyarrow.int64()),
                ("blob", pyarrow.binary()),
                ("problem", pyarrow.string()),
                ("answer", pyarrow.float64()),
            ]
        ),
    )
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    first, second = read_rows(path)
    assert first == Row(f"{path}:row 1", 1, {"messages": messages, "id": 7}, "a.parquet")
    assert second == Row(f"{path}:row 2", 2, {"problem": "p", "answer": 1.5}, "a.parquet")
    assert question_messages(first) == tuple(messages)

    def refuse_second(row: Row) -> None:
        if row.number == 2:
            raise RowError("no")

    assert faults(path, refuse_second) == ["row 2: no"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "has none of `messages`, `problem`, `question`, `prompt`"),
        ({"problem": "a", "question": "b"}, "has `problem`, `question`, which mean the same: keep one"),
        ({"messages": [], "problem": "b"}, "has `messages`, `problem`, which mean the same: keep one"),
        ({"problem": ""}, "`problem` is empty"),
        ({"problem": " \n"}, "`problem` is empty"),
        ({"problem": 5}, "`problem` must be a string, got int"),
        (
            {"prompt": [{"role": "user"}]},
            "`prompt` must be a string, got a list; a chat goes under `messages`",
        ),
        ({"problem": "x\ud800"}, "`problem` has an unpaired surrogate at character 1"),
        ({"messages": []}, "`messages` must be a list of messages, got nothing"),
        ({"messages": "hi"}, "`messages` must be a list of messages, got a string"),
        ({"messages": ["hi"]}, "messages[0] must be an object with `role` and `content`, got a string"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0].role must be system, user, assistant or tool, got 'robot'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a string, got null"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content is empty"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{}], "name": "n", "audio": None}]},
            "messages[0] has fields that a message of role user cannot have: name, tool_calls",
        ),
    ],
)
def test_questions_that_cannot_be_used(fields: dict, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        question_messages(row_of(**fields))
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("roles", "wrong"),
    [("a", 0), ("uu", 1), ("ua a", 2), ("su s", 2), ("sa", 1), ("ss", 1), ("uaua s", 4)],
)
def test_roles_out_of_turn(roles: str, wrong: int) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "x"} for role in roles.replace(" ", "")]
    with pytest.raises(RowError, match=rf"^messages\[{wrong}\] is from"):
        question_messages(row_of(messages=messages))


def test_null_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": null, "question": "q", "answer": null}\n')
    assert faults(path, lambda row: (question_messages(row), truth_field(row))) == [
        "1: has none of `answer`, `truth`"
    ]


@pytest.mark.parametrize(
    ("value", "text"), [("\\frac12", "\\frac12"), (42, "42"), (-3.5, "-3.5"), (142.0, "142.0"), (0, "0")]
)
def test_truths(value: object, text: str) -> None:
    assert truth_field(row_of(answer=value)) == text
    assert truth_field(row_of(truth=value)) == text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"answer": True}, "`answer` must be a string or a number, got true or false"),
        ({"answer": ["4"]}, "`answer` must be a string or a number, got a list"),
        ({"answer": "  "}, "`answer` is empty"),
        ({"answer": float("nan")}, "`answer` is nan"),
        ({"answer": "1", "truth": "1"}, "has `answer`, `truth`, which mean the same: keep one"),
    ],
)
def test_truths_that_cannot_be_used(fields: dict, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        truth_field(row_of(**fields))
    assert str(caught.value) == reason


def test_ids_are_given_or_made_and_never_shared() -> None:
    seen: dict[str, str] = {}
    assert row_id(row_of(id="a"), seen) == "a"
    assert row_id(row_of(id=5), seen) == "5"
    assert row_id(row_of(), seen) == "file.jsonl:1"
    with pytest.raises(RowError, match=r"^`id` '5' is taken by dir/file\.jsonl:1$"):
        row_id(row_of(id="5"), seen)
    for bad in (True, 1.5, "", [1]):
        with pytest.raises(RowError, match="must be a string or a whole number"):
            row_id(row_of(id=bad), seen)


def test_bar_only_for_many_rows_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"problem": str(i)}) for i in range(20)))
    for least, terminal, shown in [(20, True, True), (21, True, False), (20, False, False)]:
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal)
        monkeypatch.setattr(rows, "PROGRESS_FROM_ROWS", least)
        monkeypatch.setattr(rows, "Console", lambda stderr, console=console: console)
        assert [text_field(row, "problem") for row in read_rows(path)] == [str(i) for i in range(20)]
        assert ("reading a.jsonl" in stream.getvalue()) == shown


def test_report_reads_well() -> None:
    report = LoadReport(data="a.jsonl", num_rows=10, num_kept=7, num_overlong=3)
    assert str(report) == "a.jsonl: 7 of 10 rows, 3 left out as over-long"


def test_a_text_of_20_mb_is_refused_with_its_row(tmp_path: Path) -> None:
    texts = ["a", "a" * 20_000_000, "b"]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"problem": text}) for text in texts))
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": texts}), table, compression="zstd")
    assert table.stat().st_size < 10_000
    reason = "`problem` has 20000000 characters, at most 4000000 are read"
    assert faults(lines, lambda row: text_field(row, "problem")) == [f"2: {reason}"]
    assert faults(table, lambda row: text_field(row, "problem")) == [f"row 2: {reason}"]


def test_rows_beyond_the_bound_are_not_parsed_and_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 40)
    texts = [
        "a",
        "b" * 200,
        "c",
        "d" * 24,
        "e" * 25,
    ]  # {"problem": "..."} has 15 bytes beside the text, and a newline
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"problem": text}) + "\n" for text in texts))
    assert faults(lines) == [f"{number}: the line is longer than 40 bytes" for number in (2, 5)]
    table = tmp_path / "a.parquet"
    chats = [[{"role": "user", "content": text}] for text in ("a", "b" * 200)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats * 20}), table)
    assert faults(table) == ["row 2 and 19 more rows: the row is longer than 40 bytes"]
