"""A run on a mixture of experts replays vLLM's routes by itself, and a resume from answers with routes is exact."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_chord.config_io import load_config
from megatron_chord.rollout.route_store import MEMORY_VARIABLE
from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server
from tests.e2e.test_lag import numbers, samples, train_in_turn, weights
from tests.e2e.test_stages import COMMON, SMALL
from tests.e2e.test_tails import STILL
from tests.support.few_rows import with_few_rows
from tests.support.ranks import ROOT, run_ranks
from tests.support.task import metrics_of

LAYERS = 2
SERVER_SETTINGS = ServerSettings(
    dtype="fp32", max_model_len=160, kv_cache_bytes=64 << 20, routes=True, repeatable=True
)
"""A repeatable server caches no prefixes, which vLLM refuses together with routes where nothing is adapted."""


def save_policy(folder: Path, *, end_scale: float = 1.0) -> Path:
    """Save a random mixture with the tokenizer of the quick start's policy. A larger ``end_scale`` makes the token that
    ends an answer likely for some contexts, so that lengths differ."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "arithmetic" / "policy")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).float()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= end_scale
    model.save_pretrained(folder)
    return folder


def train_split(url: str, run: tuple[Path, Path, dict[str, str], int | str]) -> int:
    """Train. Returns the number of micro-batches whose routes this rank's replica read from the server."""
    from megatron_chord.train import step_queue

    usual, count = step_queue.with_routes_here, 0

    def counted(updates: Any, keys: Any, groups: Any) -> Any:
        nonlocal count
        count += len(step_queue.remote_of(updates))
        return usual(updates, keys, groups)

    step_queue.with_routes_here = counted
    train_in_turn(url, [run])
    return count


def test_ranks_that_split_the_model_replay_routes_that_survive_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensor ranks, and two stages in a run that carries answers over. The server keeps the routes."""
    policy = save_policy(tmp_path / "policy")
    common = {"model.path": str(policy), "rollout.router_replay": "true", "method.mu": "{peak: 0.3}"}
    tensor = {"parallel.tensor": "2", "parallel.sequence_parallel": "true"}
    settings = common | tensor | {"optim.lr": "0.001", "steps": "3"}
    ending = save_policy(tmp_path / "ending", end_scale=8.0)
    carrying = STILL | common | {"model.path": str(ending), "parallel.pipeline": "2"}
    carrying |= {"steps": "3", "checkpoint.every": "0"}
    straight, resumed, carried = tmp_path / "straight", tmp_path / "resumed", tmp_path / "carried"
    with start_server(policy, SERVER_SETTINGS, log=tmp_path / "vllm.log") as server:
        server.wait_until_ready(300)
        monkeypatch.setenv("VLLM_API_KEY", server.api_key)
        runs: list[tuple[Path, Path, dict[str, str], int | str]] = [
            (COMMON, straight, settings, "never"),
            (COMMON, resumed, settings, 2),
            (COMMON, resumed, settings, "auto"),
            (COMMON, carried, carrying, "never"),
        ]
        read = [run_ranks(train_split, 2, server.url, run) for run in runs]
    assert all(first == second for first, second in read)
    assert [first > 0 for first, _ in read] == [True, True, False, True], (
        "the resumed run has its last step's routes in the checkpoint"
    )
    check_carried(carried)
    assert (resumed / "checkpoints" / "step-000002" / "routes.safetensors").is_file()
    assert numbers(resumed) == numbers(straight)
    assert weights(resumed) == weights(straight)
    rows = [row for row in metrics_of(straight) if "loss" in row]
    assert [row["routed_rollouts"] for row in rows] == [1.0] * 3
    for row in rows:
        assert 0 < row["routing"]["replayed"] < 1, "demonstrations have no routes"
        assert row["routing"]["dropped"] == 0
        assert list(row["routing_by_layer"]["otherwise"]) == [str(layer) for layer in range(LAYERS)]
    assert rows[0]["routing"]["otherwise"] < 0.02, "the start weights have sampled them"
    assert rows[2]["routing"]["otherwise"] > 0.005, "so a resume without the routes would not be exact"


def check_carried(folder: Path) -> None:
    """The weights do not move. So the model chooses the same experts as vLLM did, in whichever step it sampled a token,
    if each token has its own routes."""
    rows = [row for row in metrics_of(folder) if "loss" in row]
    assert [row["routed_rollouts"] for row in rows] == [1.0] * 3
    assert max(row["logprob_gap_max"] for row in rows) < 1e-3
    assert max(row["routing"]["otherwise"] for row in rows) < 0.02
    spans = [row["weight_spans"] for step in range(3) for row in samples(folder, step)]
    assert any(len(of_answer) > 1 for of_answer in spans), "answers were carried over"


def train_without_a_lag(
    output: Path, settings: dict[str, str], *, kill_before: int | None = None
) -> list[int]:
    """Train. Returns the number of micro-batches of each reading of a step's routes that had some on servers.

    The run's own server is killed after the answers of step ``kill_before`` were collected, and before any rank has
    read their routes.
    """
    from megatron_chord.train import step_queue
    from megatron_chord.train.loop import train

    usual, sizes, calls = step_queue.with_routes_here, list[int](), 0

    def after_a_kill(updates: Any, keys: Any, groups: Any) -> Any:
        nonlocal calls
        calls += 1
        sizes.append(len(step_queue.remote_of(updates)))
        if calls - 1 == kill_before and groups.is_coordinator:
            (server,) = [found for found in gc.get_objects() if isinstance(found, RolloutServer)]
            server.kill()
        groups.gather(None)
        return usual(updates, keys, groups)

    step_queue.with_routes_here = after_a_kill
    wanted = {**SMALL, **settings, "output": str(output)}
    train(with_few_rows(load_config(COMMON, [f"{name}={value}" for name, value in wanted.items()])))
    return sizes


def test_a_step_whose_routes_are_lost_is_repeated_and_ranks_read_what_replies_would_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two data-parallel ranks. The first run's server keeps no routes, so that they pass through rank 0. The server of
    the second keeps them, and is killed once."""
    policy = save_policy(tmp_path / "policy")
    settings = {
        "model.path": str(policy),
        "rollout.router_replay": "true",
        "method.mu": "{peak: 0.3}",
        "optim.lr": "0.001",
        "steps": "2",
        "checkpoint.every": "0",
    }
    sent, kept = tmp_path / "sent", tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setenv(MEMORY_VARIABLE, "0")
        server = start_server(policy, SERVER_SETTINGS, log=tmp_path / "vllm.log")
    with server:
        server.wait_until_ready(300)
        with monkeypatch.context() as patch:
            patch.setenv("VLLM_API_KEY", server.api_key)
            sizes = run_ranks(train_without_a_lag, 2, sent, settings | {"rollout.servers": f"[{server.url}]"})
    assert sizes == [[0, 0], [0, 0]]
    own = {"rollout.repeatable": "true", "rollout.kv_cache_bytes": str(64 << 20)}
    for first, second, third in run_ranks(train_killed, 2, kept, settings | own):
        assert min(first, second, third) > 0, "both ranks read routes, those of step 1 twice"
    assert weights(kept) == weights(sent)
    assert numbers(kept) == numbers(sent)
    assert [row["routed_rollouts"] for row in metrics_of(kept) if "loss" in row] == [1.0, 1.0]
    logs = sorted(path.name for path in (kept / "logs").glob("rollout-server-*"))
    assert logs == ["rollout-server-1.log", "rollout-server-2.log"]


def train_killed(output: Path, settings: dict[str, str]) -> list[int]:
    return train_without_a_lag(output, settings, kill_before=1)
