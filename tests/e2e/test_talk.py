"""`megatron-chord generate` and `chat` give Transformers' greedy answers on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.rollout.server import RolloutServer
from tests.support.ranks import ROOT
from tests.support.task import cli_environment, run_cli

POLICY = ROOT / "examples" / "arithmetic" / "policy"
QUESTIONS = ("Tom has 3 apples and buys 4 more. How many apples has he?", "What is 12 + 5?")


def greedy(*turns: str) -> str:
    """Return the greedy answer of plain Transformers to a conversation that begins with the user."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    model: Any = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(turns)
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    answer = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


@pytest.mark.usefixtures("server_key")
def test_the_answers_are_those_of_the_policy(tmp_path: Path, server: RolloutServer) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(QUESTIONS))
    options = ["--temperature", "0", "--max-tokens", "16", "--server", server.url]
    written = run_cli("generate", str(POLICY), str(prompts), *options, "--output", str(output))
    assert written.returncode == 0, written.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["response"] for row in rows] == [greedy(question) for question in QUESTIONS]

    chat = subprocess.run(
        [sys.executable, "-m", "megatron_chord.cli", "chat", str(POLICY), *options],
        input=f"{QUESTIONS[0]}\n{QUESTIONS[1]}\n/new\n{QUESTIONS[1]}\n<|end|>\n",
        env=cli_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert chat.returncode == 0, chat.stderr
    first = greedy(QUESTIONS[0])
    expected = [first, greedy(QUESTIONS[0], first, QUESTIONS[1]), "a new conversation", greedy(QUESTIONS[1])]
    told = [line.removeprefix("> ") for line in chat.stdout.splitlines()]
    answers = [line for line in told[1:] if line and not line.startswith("[cut off")]
    assert answers[:-1] == [line for text in expected for line in text.splitlines() if line]
    assert "control token" in answers[-1]
