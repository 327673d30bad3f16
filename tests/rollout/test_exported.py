"""Stock AutoTokenizer, Transformers and vLLM load every family's exported folder, without any code of this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.data.served import tokenizer_difference
from megatron_chord.data.templates import load_template
from megatron_chord.families.table import CAUSAL_LM
from tests.distributed import steps
from tests.rollout.test_families import DENSE, MOE, SIZES
from tests.support.ranks import run_ranks
from tests.support.task import CHATML
from tests.support.tiny import save_model

ALL = DENSE | MOE
MESSAGES = [{"role": "user", "content": "12 + 7?\n\nTwo  spaces, été."}]
TOKENS = 12
# The program of a user who has vLLM and a folder. On a GPU the last two arguments of LLM are not needed.
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=64 << 20)
sampling = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[3]), ignore_eos=True)
(reply,) = llm.chat(json.loads(sys.argv[2]), sampling)
print("ANSWER", json.dumps([reply.prompt_token_ids, list(reply.outputs[0].token_ids), reply.outputs[0].text]))
"""


def add_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer with some merges and a chat template. It uses Qwen's pipeline; all model types can
    read it."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pipeline = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=markers, initial_alphabet=alphabet, show_progress=False
    )
    pipeline.train_from_iterator(["user assistant two spaces and an answer " * 3], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    assert len(tokenizer) <= 300
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("do as you like")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of source and exported models, by family. Their config.json names a class that vLLM cannot serve."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("exported")
    for family, settings in ALL.items():
        folder = save_model(family, source / family, **SIZES, **settings)
        add_tokenizer(folder)
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stated | {"architectures": ["AnyModel"]}))
    folders = [source / family for family in ALL]
    run_ranks(steps.logits_and_exports, 1, {"": {}}, folders, target, [[3, 4, 5]])
    return source, target


def answer_of_transformers(folder: Path) -> tuple[list[int], list[int], str]:
    """Return the prompt's ids, and the ids and text of the greedy answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        pad_token_id=0,
        eos_token_id=299,
    )
    ids = output[0, len(prompt) :].tolist()
    return prompt, ids, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", ALL)
def test_stock_transformers_answers_as_before(family: str, exported: tuple[Path, Path]) -> None:
    source, target = (folder / family for folder in exported)
    answer = answer_of_transformers(target)
    assert answer == answer_of_transformers(source)
    template = load_template(target, vocab_size=SIZES["vocab"])
    assert template.prompt_ids(MESSAGES) == tuple(answer[0])
    assert tokenizer_difference(target, template, [tuple(answer[0])]) is None
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == [CAUSAL_LM[family]]
    assert (target / "LICENSE").read_text() == "do as you like"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stock_vllm_answers_the_same_text(family: str, exported: tuple[Path, Path]) -> None:
    folder = exported[1] / family
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder), json.dumps(MESSAGES), str(TOKENS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("ANSWER "))
    prompt, ids, text = json.loads(line.removeprefix("ANSWER "))
    expected_prompt, expected_ids, expected_text = answer_of_transformers(folder)
    assert (prompt, ids) == (expected_prompt, expected_ids)
    # vLLM does not return bytes that do not yet form a character.
    assert text == expected_text.rstrip("\ufffd")
