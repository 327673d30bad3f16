"""A whole training task in a folder: tiny policy with tokenizer, problems, demonstrations and a YAML file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.support.files import write_rows

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_task(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Write everything below ``folder`` and return the path of run.yaml. ``settings`` replace whole YAML blocks."""
    save_policy(folder / "policy", seed=seed)
    rows = [
        {
            "id": str(i),
            "problem": f"{i} + {i + 1} =",
            "solution": f"#### {2 * i + 1}",
            "answer": str(2 * i + 1),
        }
        for i in range(24)
    ]
    write_rows(folder / "train.jsonl", *rows[:16])
    write_rows(folder / "heldout.jsonl", *rows[16:])
    config = {
        "output": str(folder / "out"),
        "steps": 3,
        "seed": 1,
        "model": {"path": "policy", "dtype": "fp32"},
        "data": {
            "prompts": "train.jsonl",
            "demonstrations": "train.jsonl",
            "evaluation": "heldout.jsonl",
            "max_prompt_tokens": 64,
            "max_response_tokens": 12,
        },
        "batch": {"prompts": 4, "rollouts": 4, "demonstrations": 6, "max_tokens_per_gpu": 256},
        "method": {"mu": {"peak": 0.3}},
        "rollout": {"kv_cache_bytes": 64 * 2**20},
        "reward": {"kind": "exact", "workers": 1},
        "optim": {"lr": 1e-3},
    } | settings
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def save_policy(folder: Path, *, seed: int = 0, layers: int = 2) -> None:
    """Save a random Qwen2, with a head size that vLLM's CPU attention supports, and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)


def run_cli(*arguments: str, timeout_s: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `megatron-chord` as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_chord.cli", *arguments],
        env=cli_environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def cli_environment(**env: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | env


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run, which may still be running: the last line counts only when it is complete."""
    complete, _, _ = (folder / "metrics.jsonl").read_text().rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]
