"""Settings and files that cannot work are refused before any work, with the place and the reason.

These tests start no server, no model and no ranks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_cli_forked
from tests.support.task import make_task, run_cli


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def refusal(config: Path, *overrides: str, command: str = "check") -> str:
    """Return what a command prints when it refuses to work. `train` starts as a user starts it."""
    run = run_cli if command == "train" else run_cli_forked
    result = run(command, str(config), *overrides)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_good_file_passes(task: Path) -> None:
    result = run_cli("check", str(task))
    assert result.returncode == 0, result.stderr
    assert "4 prompts x 4 rollouts + 6 demonstrations" in result.stdout
    assert result.stdout.endswith(f"No fault found. Start it with: megatron-chord train {task}\n")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("batch.rollout=4", "unknown setting 'batch.rollout'; did you mean batch.rollouts?"),
        ("parallel.tensor=3", "2 attention heads / tensor 3"),
        ("method=lufy", "did you mean luffy?"),
        ("reward={kind: function, name: f, path: nowhere.py}", "reward.path: nowhere.py does not exist"),
        (
            "reward=[{kind: exact, sources: [tools]}]",
            "override 'reward=[{kind: exact, sources: [tools]}]': reward.sources: no data source is called tools; "
            "the data sources are: heldout, train",
        ),
        (
            "method=dapo",
            "method.name: 'dapo' is a preset of method chord: write base: examples/methods/dapo.yaml",
        ),
        (
            "method=luffy",
            "override 'method=luffy': method luffy needs every prompt's own demonstration: set data.aligned: true",
        ),
        ("method.mu=linea", "did you mean linear?"),
        ("parallel.pipeline=4", "2 layers / (parallel.pipeline 4 x parallel.virtual_pipeline 1)"),
        ("data.max_response_tokens=500", "is more than the model's 256 positions"),
        ("data.prompts=nowhere.jsonl", "data.prompts: nowhere.jsonl does not exist"),
        (
            "data.evaluation.fields={problm: question}",
            "override 'data.evaluation.fields={problm: question}': data.evaluation.fields name problm (did you mean "
            "problem?); known fields: answer, ",
        ),
        ("model.path=nowhere", "nowhere/config.json does not exist"),
        ("model.megatron_overrides={num_layer: 3}", "did you mean 'num_layers'?"),
    ],
)
def test_settings(task: Path, override: str, reason: str) -> None:
    assert reason in refusal(task, override)


def test_weights_that_cannot_reach_the_servers_in_time(task: Path) -> None:
    """The planner's 2 s of a push over gloo, whatever the size."""
    error = refusal(task, "rollout.transport=gloo", "timeouts.weight_push_s=1")
    assert "by the transport gloo takes about 2 s, longer than timeouts.weight_push_s (1 s)" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have what FP8 needs")
@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("precision", "missing"),
    [
        ("fp8_rollout", "a CUDA build of torch (found: CPU); a CUDA device."),
        ("fp8_tensorwise", "a CUDA build of torch (found: CPU); a CUDA device; transformer-engine (found: "),
    ],
)
def test_fp8_on_a_machine_without_a_gpu(task: Path, command: str, precision: str, missing: str) -> None:
    error = refusal(task, f"precision={precision}", "model.dtype=bf16", command=command)
    assert f"precision {precision} needs {missing}" in error
    assert "without the setting the run trains in BF16" in error


def test_fp8_in_blocks_on_a_shape_without_them(task: Path) -> None:
    settings = ("precision=fp8_e2e", "model.dtype=bf16")
    assert "hidden size 64 = 64" in refusal(task, *settings), "before any look at the machine"


@pytest.mark.parametrize("command", ["check", "train"])
def test_layout_that_does_not_divide_the_ranks(task: Path, command: str) -> None:
    assert "does not divide the 1 processes" in refusal(task, "parallel.tensor=2", command=command)


def test_model_without_weights_and_of_unknown_type(task: Path, tmp_path: Path) -> None:
    policy = task.parent / "policy"
    config: dict[str, Any] = json.loads((policy / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "has no weights" in refusal(task, f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba9"}))
    error = refusal(task, f"model.path={tmp_path}")
    assert "unknown model_type 'mamba9'; known families: deepseek_v2, deepseek_v3, llama" in error


def test_broken_rows_are_named_with_their_lines(task: Path, tmp_path: Path) -> None:
    rows = (task.parent / "train.jsonl").read_text().splitlines()
    rows[2] = '{"problem": "1 + 1 ='
    rows[4] = '{"problem": "1 + 1 =", "answer": null}'
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    error = refusal(task, f"data.prompts={tmp_path / 'prompts.jsonl'}", command="train")
    assert "prompts.jsonl:3:" in error
    assert "prompts.jsonl:5:" in error
    rows = (task.parent / "train.jsonl").read_text().splitlines()
    rows[1] = '{"problem": "1 + 1 =", "solution": ""}'
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(rows))
    assert "demonstrations.jsonl:2:" in refusal(
        task, f"data.demonstrations={tmp_path / 'demonstrations.jsonl'}"
    )


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_token_that_the_model_does_not_know(task: Path, tmp_path: Path, command: str) -> None:
    """Without this check one rank ends in a traceback. Three tensor ranks train the token with a zero embedding and a
    masked logit."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "policy"
    shutil.copytree(task.parent / "policy", folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    vocab_size = len(tokenizer)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    rows = (task.parent / "train.jsonl").read_text().splitlines()
    rows[2] = json.dumps({"problem": "1 + 1 =", "solution": "<think>2"})
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(rows))
    error = refusal(
        task,
        f"model.path={folder}",
        f"data.demonstrations={tmp_path / 'demonstrations.jsonl'}",
        command=command,
    )
    assert "demonstrations.jsonl:3: token" in error
    assert f"is '<think>', id {vocab_size}, beyond the model's vocabulary" in error
    assert f"config.json has vocab_size {vocab_size}, the tokenizer {vocab_size + 1} tokens" in error


def test_a_folder_that_will_be_served_with_another_tokenizer(task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(task.parent / "policy", folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    result = run_cli_forked("check", str(task), f"model.path={folder}")
    assert result.returncode == 0, result.stderr
    assert (
        "WARNING: the exported policy will be served with another tokenizer: AutoTokenizer" in result.stdout
    )
