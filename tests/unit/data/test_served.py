"""AutoTokenizer reads some folders as training does. For other folders the difference is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_chord.data.served import tokenizer_difference
from megatron_chord.data.templates import ChatTemplate, load_template

EXAMPLE = Path(__file__).parents[3] / "examples" / "arithmetic" / "policy"
MESSAGES = [{"role": "user", "content": "what is 2 plus 2?\nAnswer: 4"}]


def test_a_folder_that_is_served_as_it_is_trained(chatml_folder: Path, chatml: ChatTemplate) -> None:
    assert tokenizer_difference(chatml_folder, chatml, [chatml.prompt_ids(MESSAGES)]) is None


def test_the_quick_starts_policy_is_served_as_it_is_trained() -> None:
    template = load_template(
        EXAMPLE, vocab_size=json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    )
    assert tokenizer_difference(EXAMPLE, template, [template.prompt_ids(MESSAGES)]) is None


def test_sentencepiece_in_a_model_type_with_another_tokenizer(
    sentencepiece_folder: Path, plain: ChatTemplate
) -> None:
    difference = tokenizer_difference(sentencepiece_folder, plain, [])
    assert difference is not None
    assert "AutoTokenizer" in difference


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "Qwen2Tokenizer"])
def test_a_tokenizer_class_of_another_kind(chatml_folder: Path, tmp_path: Path, kind: str) -> None:
    """LlamaTokenizer replaces spaces by SentencePiece's sign, which these tokens lack. Qwen's tokenizer splits text in
    another way."""
    folder = tmp_path / "model"
    shutil.copytree(chatml_folder, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": kind}))
    template = load_template(folder)
    difference = tokenizer_difference(folder, template, [template.prompt_ids(MESSAGES)])
    assert difference is not None
    assert f"AutoTokenizer ({kind}), which vLLM uses, too, reads " in difference


def test_a_folder_that_autotokenizer_cannot_load(
    chatml_folder: Path, chatml: ChatTemplate, tmp_path: Path
) -> None:
    difference = tokenizer_difference(tmp_path, chatml, [])
    assert difference is not None
    assert f"cannot load {tmp_path}" in difference
