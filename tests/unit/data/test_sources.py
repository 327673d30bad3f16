"""Several sources of rows: each has its own mapping and system prompt, and its records keep the source's name."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_chord.config import SourceConfig, sources_of
from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.sources import load_sources
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.train.metrics import DROPPED, write_left_out
from tests.support.files import rows_of, write_rows

PROMPTS = partial(load_prompts, max_prompt_tokens=500, overlong="fail")


def test_each_source_has_its_own_mapping_and_system_prompt(tmp_path: Path, chatml: ChatTemplate) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", {"id": "1", "problem": "6*7?", "answer": "42"})
    other = write_rows(
        tmp_path / "other.jsonl",
        {"q": "2+2?", "gold": {"text": "4"}},
        {"q": "x", "gold": {"text": "y"}},
    )
    loaded = load_sources(
        (
            SourceConfig(path=(plain,), weight=3, name="maths"),
            SourceConfig(
                path=(other,),
                fields={"id": "q", "problem": "q", "answer": "gold.text"},
                system_prompt="Be brief.",
            ),
        ),
        chatml,
        PROMPTS,
    )
    found = [
        (prompt.source, prompt.id, prompt.truth, prompt.messages[0]["role"]) for prompt in loaded.records
    ]
    assert found == [
        ("maths", "maths/1", "42", "user"),
        ("other", "other/2+2?", "4", "system"),
        ("other", "other/x", "y", "system"),
    ]
    assert loaded.records[1].messages[0]["content"] == "Be brief."
    assert loaded.lines("prompts") == [
        f"prompts 75.0 % {plain}: 1 of 1 rows",
        f"prompts 25.0 % {other}: 2 of 2 rows",
    ]


def test_a_list_of_files_is_one_source(tmp_path: Path, chatml: ChatTemplate) -> None:
    files = [tmp_path / name / "rows.jsonl" for name in "ab"]
    for number, file in enumerate(files):
        file.parent.mkdir()
        write_rows(file, {"problem": f"{number}?", "solution": "s"})
    table = tmp_path / "more.csv"
    table.write_text("problem,solution\n2?,s\n")
    loaded = load_sources(
        sources_of(*files, table),
        chatml,
        partial(load_demonstrations, max_prompt_tokens=500, max_response_tokens=500, overlong="fail"),
    )
    assert [row.id for row in loaded.records] == [f"{files[0]}:1", f"{files[1]}:1", f"{table}:1"]
    assert {row.source for row in loaded.records} == {"rows"}
    assert loaded.lines("demonstrations") == [f"demonstrations {files[0]} and 2 more: 3 of 3 rows"]


def test_names_of_sources() -> None:
    named = {
        "train.parquet": "train",
        "gsm8k/train-*.parquet": "gsm8k",
        "gsm8k/train-[01].parquet": "gsm8k",
        "sets/*/train-?.parquet": "sets",
        "sets/amc 23": "amc_23",
        "a.jsonl.gz": "a",
    }
    for path, label in named.items():
        assert SourceConfig(path=(Path(path),)).label == label


def test_every_row_that_is_left_out_is_listed_with_its_reason(tmp_path: Path, chatml: ChatTemplate) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"problem": "6*7?", "answer": "42"},
        {"problem": "6*7?"},
        {"problem": "long " * 300, "answer": "1"},
        {"problem": "2+2?", "answer": "4"},
    )
    load = partial(load_prompts, max_prompt_tokens=200, overlong="drop", max_dropped=0.5)
    loaded = load_sources(sources_of(path), chatml, load)
    left_out = loaded.left_out("prompts")
    assert [(row["row"], row["file"], row["source"], row["data"]) for row in left_out] == [
        (2, str(path), "rows", "prompts"),
        (3, str(path), "rows", "prompts"),
    ]
    assert left_out[0]["reason"] == "has none of `answer`, `truth`"
    assert left_out[1]["reason"] == "has more than 200 tokens"
    file = tmp_path / DROPPED
    write_left_out(tmp_path, left_out)
    assert rows_of(file) == left_out
    write_left_out(tmp_path, [])
    assert not file.exists()
