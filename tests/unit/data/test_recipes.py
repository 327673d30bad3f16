"""tools/prepare.py on small files that have the layout of the downloaded ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_chord.config_io import load_suite
from megatron_chord.data import recipes
from megatron_chord.data.layouts import at_path
from megatron_chord.data.problems import text_key
from megatron_chord.data.recipes import read_calls
from megatron_chord.data.rows import DataError
from tests.support.files import rows_of, write_rows
from tests.support.ranks import ROOT
from tools.prepare import main

SHORT, LONG = "<think>\nhalve\n</think>\n\n\\boxed{15}", "word " * 60


def openr1_row(problem: str, answer: str, generations: list[str], marks: list[bool]) -> dict[str, Any]:
    return {
        "problem": problem,
        "solution": "s",
        "answer": answer,
        "generations": generations,
        "correctness_math_verify": marks,
        "correctness_llama": None,
        "messages": [{"role": "user", "content": problem}],
    }


def openr1_file(folder: Path) -> Path:
    good = [
        openr1_row(f"Half of {2 * n}?", str(n), [f"a{n}", f"b{n}", "c"], [True, True, False])
        for n in range(8)
    ]
    others = [
        openr1_row("一半 of 30?", "15", [SHORT] * 2, [True] * 2),
        openr1_row("Never right?", "15", [SHORT] * 2, [False] * 2),
        openr1_row("Flags are short?", "15", ["x", "y"], []),
        openr1_row("Long?", "15", [LONG] * 2, [True] * 2),
        openr1_row("HALF  of 2?", "1", [SHORT] * 2, [True] * 2),
        openr1_row("One right?", "7", ["only"], [True]),
        openr1_row("No number?", "x+1", [SHORT, SHORT], [True, True]),
    ]
    path = folder / "train.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([*good, *others]), path)
    return path


def test_openr1_filters_and_splits(tmp_path: Path) -> None:
    made = recipes.openr1(
        [openr1_file(tmp_path)], num_tokens=lambda text: len(text.split()), sft=3, rl=4, max_tokens=50, seed=1
    )
    assert made.counts["problems read"] == 15
    assert made.counts["left out: Chinese characters in the problem"] == 1
    assert made.counts["left out: no generation that math-verify found right"] == 2
    assert made.counts["left out: every right generation has more than 50 tokens"] == 1
    assert made.counts["left out: a duplicate of an earlier problem"] == 1
    shown, asked = made.files["sft"], made.files["rl"]
    assert (len(shown), len(asked)) == (3, 4)
    assert not {text_key(row["problem"]) for row in shown} & {text_key(row["problem"]) for row in asked}
    for row in shown:  # the row has a right generation of its own
        number = row["problem"].removeprefix("Half of ").rstrip("?")
        if number.isdecimal():
            assert row["solution"] in (f"a{int(number) // 2}", f"b{int(number) // 2}")
    assert all(int(row["answer"]) * 2 == int(row["problem"][8:-1]) for row in asked)
    again = recipes.openr1(
        [openr1_file(tmp_path)], num_tokens=lambda text: len(text.split()), sft=3, rl=4, max_tokens=50, seed=1
    )
    assert again.files == made.files


def test_openr1_says_when_there_are_not_enough(tmp_path: Path) -> None:
    made = recipes.openr1([openr1_file(tmp_path)], num_tokens=len, sft=0, rl=99)
    assert made.counts["not for RL: the answer is not a whole number"] == 1
    assert made.counts["not for RL: fewer than two right generations"] == 1
    assert made.notes == ["only 9 of 99 RL prompts: there are no more"]


def toolace_dialogue(
    reply: str, *, names: str = '[{"name": "Get Weather", "parameters": {"type": "dict"}}]'
) -> dict:
    phrase = "Here is a list of functions in JSON format that you can invoke:"
    return {
        "system": f"You are an expert.\n{phrase}\n{names}. \nShould you decide to return the function call(s). ...",
        "conversations": [{"from": "user", "value": f"Bern? {reply}"}, {"from": "assistant", "value": reply}],
    }


def test_toolace_keeps_first_replies_that_are_calls(tmp_path: Path) -> None:
    rows = [
        toolace_dialogue('[Get Weather(city="Bern (CH)", days=3, hourly=true)]'),
        toolace_dialogue('[Get Weather(city="Bern (CH)", days=3, hourly=true)]'),
        toolace_dialogue("[Get Weather(city='Rome'), Get Weather(city='Oslo')]"),
        toolace_dialogue("[Other(city='Rome')]"),
        toolace_dialogue("It is sunny."),
        toolace_dialogue("[Get Weather(city={[1]})]"),
        {**toolace_dialogue("x"), "conversations": ["Bern?", {"from": "assistant", "value": "x"}]},
        {**toolace_dialogue("x"), "conversations": [{"from": "user"}, {"from": "assistant", "value": "x"}]},
        toolace_dialogue("[Get Weather(city='Rome')]", names="[{broken"),
        {"system": "No tools.", "conversations": toolace_dialogue("x")["conversations"]},
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows))
    made = recipes.toolace([file], sft=1, rl=1)
    assert made.counts == {
        "dialogues read": 10,
        "left out: does not begin with a user's request and its reply": 2,
        "left out: a duplicate of an earlier request": 1,
        "left out: calls a function that is not listed": 1,
        "left out: the first reply is no call": 2,
        "left out: the list of functions is not JSON": 1,
        "left out: no list of functions in the system text": 1,
    }
    both = [*made.files["rl"], *made.files["sft_questions"]]
    calls = sorted((row["answer"] for row in both), key=len)
    assert calls[0] == [
        {"name": "Get Weather", "arguments": {"city": "Bern (CH)", "days": 3, "hourly": True}}
    ]
    assert [call["arguments"]["city"] for call in calls[1]] == ["Rome", "Oslo"]
    assert all(row["tools"][0]["parameters"]["type"] == "object" for row in both)
    assert both[0]["messages"][0]["content"].endswith("that you can invoke:")


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f()]", [("f", {})]),
        (
            '[a.b/c(x=[1, 2], y={"k": null}), g(z=-1.5)]',
            [("a.b/c", {"x": [1, 2], "y": {"k": None}}), ("g", {"z": -1.5})],
        ),
        ("[f(x=word)]", [("f", {"x": "word"})]),
        ('[f(x="it\'s (so]")]', [("f", {"x": "it's (so]"})]),
    ],
)
def test_calls_as_toolace_writes_them(text: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    assert [(call["name"], call["arguments"]) for call in read_calls(text)] == calls


@pytest.mark.parametrize(
    "text", ["f(x=1)", "[]", "[f(1)]", "[f(x=1]", "[f(x=1) g()]", "[f(x=print())]", "[f(x=1"]
)
def test_other_texts_are_no_calls(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        read_calls(text)


def test_gsm8k_splits_without_the_calculators_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"question": f"{n}+{n}?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### 1,{2 * n:03}"}
        for n in range(6)
    ]
    file = write_rows(tmp_path / "train.jsonl", *rows, rows[0])
    assert main(["gsm8k", str(file), "--sft", "2", "--out", str(tmp_path / "out")]) == 0
    shown, asked = rows_of(tmp_path / "out" / "sft.jsonl"), rows_of(tmp_path / "out" / "rl.jsonl")
    assert (len(shown), len(asked)) == (2, 4)
    assert {row["problem"] for row in [*shown, *asked]} == {f"{n}+{n}?" for n in range(6)}
    assert all("<<" not in row["solution"] for row in shown)
    assert all(row["answer"] == f"1{2 * int(row['problem'][0]):03}" for row in asked)
    said = capsys.readouterr().out
    assert "        7  problems read\n        1  left out: a duplicate of an earlier problem\n" in said
    assert "        4  rows in rl.jsonl" in said


def test_math_takes_the_box_and_leaves_held_out_problems_out(tmp_path: Path) -> None:
    rows = [{"problem": f"{n}?", "solution": f"so \\boxed{{{n}}}"} for n in range(5)]
    file = write_rows(tmp_path / "math.jsonl", *rows, {"problem": "p?", "solution": "no box"})
    held_out = write_rows(tmp_path / "math500.jsonl", {"problem": " 3 ?", "answer": "3"})
    made = recipes.math([file], exclude=[held_out], sft=1)
    assert made.counts["left out: held out (--exclude)"] == 1
    assert made.counts["left out: no box in the solution"] == 1
    assert {row["problem"] for rows in made.files.values() for row in rows} == {"0?", "1?", "2?", "4?"}
    assert all(row["answer"] == row["problem"][0] for row in made.files["rl"])


def test_evaluation_sets_have_each_problem_once(tmp_path: Path) -> None:
    rows = [{"ID": f"2024-I-{n}", "Problem": f"p{n}", "Answer": f"0{n}", "Solution": "s"} for n in range(3)]
    made = recipes.problems([write_rows(tmp_path / "aime.jsonl", *rows, *rows)])
    assert made.files["evaluation"][1] == {"id": "1", "problem": "p1", "answer": "01"}
    assert len(made.files["evaluation"]) == 3
    assert made.notes == ["every problem was there 2 times: set evaluation.samples to 2 instead"]
    years = [{"problem": f"p{year}", "answer": 1.0, "url": f"https://x/{year}_AIME"} for year in (2022, 2024)]
    made = recipes.problems([write_rows(tmp_path / "amc.jsonl", *years)], url_has="2024")
    assert [(row["problem"], row["answer"]) for row in made.files["evaluation"]] == [("p2024", "1.0")]


def test_problems_are_compared_without_unicodes_compatibility_forms(tmp_path: Path) -> None:
    wide = [{"problem": text, "answer": "1"} for text in ("Find A (1)", "find Ａ\u00a0（１）")]
    made = recipes.problems([write_rows(tmp_path / "wide.jsonl", *wide)])
    assert [row["problem"] for row in made.files["evaluation"]] == ["Find A (1)"]
    held_out = write_rows(tmp_path / "held_out.jsonl", wide[1])
    rows = [{"problem": problem, "solution": "\\boxed{1}"} for problem in ("Find A (1)", "Find B")]
    made = recipes.math([write_rows(tmp_path / "math.jsonl", *rows)], exclude=[held_out], sft=1)
    assert made.counts["left out: held out (--exclude)"] == 1


def test_the_papers_suite_reads_the_categories_of_prepared_files(tmp_path: Path) -> None:
    math = {"problem": "6*7?", "solution": "\\boxed{42}", "answer": "42", "subject": "Algebra", "level": 1}
    mmlu = {"question_id": 1, "question": "q", "options": ["x", "y"], "answer_index": 0, "category": "law"}
    for recipe, row in (("math500", math), ("mmlu_pro", mmlu)):
        assert (
            main([recipe, str(write_rows(tmp_path / "r.jsonl", row)), "--out", str(tmp_path / recipe)]) == 0
        )
    suite = load_suite(ROOT / "examples" / "suites" / "paper.yaml", [f"data={tmp_path}"])
    found = {
        item.name: at_path(row, item.category)
        for item in suite.resolved()
        if item.category is not None
        for row in rows_of(Path(item.file))
    }
    assert found == {"math500": "Algebra", "mmlu_pro": "law"}


def test_choices_are_written_into_the_question(tmp_path: Path) -> None:
    row = {
        "question_id": 70,
        "question": "Which?",
        "options": ["x", "y", "z"],
        "answer": "B",
        "answer_index": 1,
        "category": "law",
    }
    (made,) = recipes.mmlu_pro([write_rows(tmp_path / "m.jsonl", row)]).files["evaluation"]
    problem = "Which?\n\n1. x\n2. y\n3. z"
    assert made == {"id": "70", "problem": problem, "answer": "2", "category": "law"}
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    questions = [
        {"Question": f"q{n}", **dict(zip(names, ("right", "a", "b", "c"), strict=True))} for n in range(12)
    ]
    made = recipes.gpqa([write_rows(tmp_path / "g.jsonl", *questions)]).files["evaluation"]
    assert len({row["answer"] for row in made}) > 1
    assert all(f"{row['answer']}. right" in row["problem"].splitlines() for row in made)


def test_bfcl_joins_the_truths(tmp_path: Path) -> None:
    truths = tmp_path / "possible_answer"
    truths.mkdir()
    function = {"name": "w.get", "parameters": {"type": "dict", "properties": {"n": {"type": "float"}}}}
    for name in ("BFCL_v3_simple.json", "BFCL_v3_multiple.json"):
        ids = [f"{name[8:-5]}_{n}" for n in range(2)]
        turns = [[{"role": "user", "content": "Bern?"}]]
        write_rows(tmp_path / name, *[{"id": i, "question": turns, "function": [function]} for i in ids])
        write_rows(truths / name, *[{"id": i, "ground_truth": [{"w.get": {"n": [1.5, ""]}}]} for i in ids])
    write_rows(
        tmp_path / "BFCL_v3_irrelevance.json", {"id": "i_0", "question": turns, "function": [function]}
    )
    made = recipes.bfcl(tmp_path, categories=["simple_python", "multiple", "irrelevance"])
    assert made.counts == {"rows of simple_python": 2, "rows of multiple": 2, "rows of irrelevance": 1}
    first, last = made.files["evaluation"][0], made.files["irrelevance"][0]
    assert first["id"] == "simple_0"
    assert first["ground_truth"] == [{"w.get": {"n": [1.5, ""]}}]
    assert first["tools"][0]["parameters"] == {"type": "object", "properties": {"n": {"type": "number"}}}
    assert last["ground_truth"] == []
    with pytest.raises(DataError, match=r"no BFCL_v\*_parallel.json"):
        recipes.bfcl(tmp_path)


def test_wrong_files_are_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "x.jsonl", {"problem": "p", "answer": "1"})
    policy = str(ROOT / "examples" / "arithmetic" / "policy")
    for recipe, extra in (
        ("openr1", ["--tokenizer", policy]),
        ("toolace", []),
        ("gsm8k", []),
        ("mmlu_pro", []),
    ):
        assert main([recipe, str(file), *extra, "--out", str(tmp_path / "out")]) == 2
        assert f"{file}:1: expected " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
