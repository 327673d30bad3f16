"""Two real tokenizers that are made here: a byte-level BPE with Qwen's chat markup, and a plain SentencePiece model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_chord.data.templates import ChatTemplate, load_template
from tests.support.files import data_set

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[{{ m.role }}] {{ m.content }}\nAnswer:{% endif %}{% endfor %}"
)
CORPUS = [f"Question {i}: what is {i} plus {3 * i}? The answer is {4 * i}.\nAnswer: {i}" for i in range(400)]


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only tokenizer.model and config.json. Transformers ties its model type to another tokenizer."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=200,
        model_type="bpe",
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "[", "]", "<end>"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 200}))
    return folder


@pytest.fixture(scope="session")
def chatml(chatml_folder: Path) -> ChatTemplate:
    return load_template(chatml_folder)


@pytest.fixture(scope="session")
def plain(sentencepiece_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    jinja = tmp_path_factory.mktemp("jinja") / "plain.jinja"
    jinja.write_text(PLAIN)
    return load_template(sentencepiece_folder, chat_template=jinja)


@pytest.fixture(scope="session")
def math_data() -> Path:
    """The folder of files such as gsm8k_test.jsonl."""
    return data_set("math")
