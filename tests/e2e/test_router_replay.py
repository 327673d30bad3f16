"""A run on a mixture of experts replays vLLM's routes by itself, and a resume from answers with routes is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_chord.rollout.server import ServerSettings, start_server
from tests.e2e.test_lag import numbers, train_in_turn, weights
from tests.e2e.test_stages import COMMON
from tests.support.ranks import ROOT, run_ranks
from tests.support.task import metrics_of

LAYERS = 2


def save_policy(folder: Path) -> Path:
    """Save a random mixture with the tokenizer of the quick start's policy."""
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
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).float().save_pretrained(folder)
    return folder


def test_routes_are_replayed_and_survive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = save_policy(tmp_path / "policy")
    settings = {
        "model.path": str(policy),
        "rollout.router_replay": "true",
        "method.mu": "{peak: 0.3}",
        "optim.lr": "0.001",
        "steps": "3",
    }
    # A repeatable server caches no prefixes, which vLLM refuses together with routes where nothing is adapted.
    server_settings = ServerSettings(
        dtype="fp32", max_model_len=160, kv_cache_bytes=64 << 20, routes=True, repeatable=True
    )
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    with start_server(policy, server_settings, log=tmp_path / "vllm.log") as server:
        server.wait_until_ready(300)
        monkeypatch.setenv("VLLM_API_KEY", server.api_key)
        runs: list[tuple[Path, Path, dict[str, str], int | str]] = [
            (COMMON, straight, settings, "never"),
            (COMMON, resumed, settings, 2),
            (COMMON, resumed, settings, "auto"),
        ]
        run_ranks(train_in_turn, 1, server.url, runs)
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
