"""vLLM samples Transformers' greedy tokens from each family's exported folder, and from weights that are pushed to
it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_chord.families.table import read_shape
from megatron_chord.records import Prompt, RolloutRequest
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.replies import GenerateRequest
from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server
from megatron_chord.rollout.sync import SyncSettings, WeightSync
from megatron_chord.routes import RouteShape
from megatron_chord.sampling.rounds import Sampling, sample
from megatron_chord.weights.folder import open_model
from megatron_chord.weights.reader import HFReader
from tests.distributed import steps
from tests.rollout.helpers import START_S, VOCAB, assert_routes, client_of, largest_gap, requests
from tests.support.ranks import run_ranks
from tests.support.tiny import LLAMA3_ROPE, save_model

TOLERANCE = 1e-4
DEADLINE_S = 240.0
TOKENS = 24
# On a CPU vLLM's attention has no kernel for heads of size 16.
SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "layers": 2,
    "vocab": VOCAB,
}
# vLLM's CPU kernel for latent attention supports only these sizes.
LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
DENSE: dict[str, dict[str, Any]] = {
    "qwen2": {"tied": True},
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {},
    "qwen3": {"tied": True},
}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"moe_intermediate_size": 64},
    "qwen3_moe": {"moe_intermediate_size": 128},
    "deepseek_v2": LATENT | {"moe_intermediate_size": 64},
    "deepseek_v3": LATENT | {"moe_intermediate_size": 64},
}
LAYOUT: dict[str, Any] = {"tensor": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each family, exported from two tensor-parallel ranks that share the experts."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("exported")
    folders = {
        name: save_model(name, source / name, **SIZES, **settings) for name, settings in (DENSE | MOE).items()
    }
    for kinds, layout in ((DENSE, LAYOUT), (MOE, LAYOUT | {"expert": 2})):
        of_kind = [folders[name] for name in kinds]
        run_ranks(steps.logits_and_exports, 2, {"": layout}, of_kind, target, [[3, 4, 5]])
    return target


@pytest.fixture
def server(request: pytest.FixtureRequest, exported: Path, tmp_path: Path) -> Iterator[RolloutServer]:
    settings = ServerSettings(
        dtype="fp32",
        max_model_len=512,
        kv_cache_bytes=64 << 20,
        gpu_memory_utilization=0.1,
        routes=request.param in MOE,
    )
    server = start_server(exported / request.param, settings, log=tmp_path / "vllm.log")
    try:
        server.wait_until_ready(START_S)
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize(("family", "server"), [(name, name) for name in DENSE | MOE], indirect=["server"])
def test_greedy_tokens_are_those_of_transformers(
    family: str, server: RolloutServer, exported: Path, tmp_path: Path
) -> None:
    model = transformers_model(exported / family)
    for request in requests(3):
        assert served(server, request.prompt_ids) == greedy(model, request.prompt_ids)

    other = save_model(family, tmp_path / "other", seed=1, **SIZES, **(DENSE | MOE)[family])
    reader = HFReader.of(other)
    client = client_of(server)
    sync = WeightSync(
        [client],
        SyncSettings(transport="file", timeout_s=DEADLINE_S, bucket_bytes=60_000),
        exporters=[0],
        group=None,
        device=torch.device("cpu"),
    )
    try:
        sync.push(((name, reader.read(name)) for name in reader.names), 1)
        shape = read_shape(other).routes
        assert (shape is not None) == (family in MOE)
        sampled = [replace(request, routes=shape) for request in requests(3)]
        replies = client.generate(sampled, version=1, deadline_s=DEADLINE_S)
        assert largest_gap(transformers_model(other), sampled, replies) < TOLERANCE
        assert largest_gap(model, sampled, replies) > 1
        if shape is not None:
            assert_routes(transformers_model(other), shape, sampled, replies)
            assert_continued(client, transformers_model(other), shape)
    finally:
        sync.close()
        client.close()


def assert_continued(client: RolloutClient, model: Any, shape: RouteShape) -> None:
    """Assert that an answer which was stopped after its first request has the routes of both requests."""
    prompt = Prompt(id="0", messages=(), truth="", token_ids=tuple(range(20, 50)))
    sampling = Sampling(
        num_rollouts=1,
        temperature=1.0,
        max_tokens=6,
        stop_token_ids=(1,),
        routes=replace(shape, is_required=True),
    )
    ask = RolloutRequest(prompt=prompt, seed=3)
    ((first,),) = sample([client], [ask], sampling, version=1, deadline_s=DEADLINE_S)
    stopped = replace(ask, partial_rollouts=(replace(first, finish_reason="abort"),))
    longer = replace(sampling, max_tokens=30)
    ((whole,),) = sample([client], [stopped], longer, version=1, deadline_s=DEADLINE_S)
    assert len(whole.token_ids) > len(first.token_ids)
    asked = GenerateRequest(
        prompt_ids=prompt.token_ids, num_rollouts=1, seed=0, temperature=1.0, max_tokens=30, stop_token_ids=()
    )
    assert_routes(model, shape, [asked], [(whole,)])


def test_a_folder_without_the_models_prefix_is_served_once_its_weights_are_pushed(tmp_path: Path) -> None:
    """vLLM does not know such tensor names, the activation swish, or the class that config.json names."""
    settings: dict[str, Any] = SIZES | {"tied": True}
    model = transformers_model(save_model("qwen3", tmp_path / "whole", **settings))
    folder = save_model("qwen3", tmp_path / "bare", **settings)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3Model"], "hidden_act": "swish"}
    (folder / "config.json").write_text(json.dumps(config))
    started = ServerSettings(dtype="fp32", max_model_len=512, kv_cache_bytes=64 << 20)
    with start_server(folder, started, log=tmp_path / "vllm.log") as server:
        server.wait_until_ready(START_S)
        client = client_of(server)
        sync = WeightSync(
            [client],
            SyncSettings(transport="file", timeout_s=DEADLINE_S),
            exporters=[0],
            group=None,
            device=torch.device("cpu"),
        )
        try:
            reader = open_model(folder, read_shape(folder).weights)
            sync.push(((name, reader.read(name)) for name in reader.names), 1)
            sampled = requests(2)
            replies = client.generate(sampled, version=1, deadline_s=DEADLINE_S)
            assert largest_gap(model, sampled, replies) < TOLERANCE
        finally:
            sync.close()
            client.close()


def served(server: RolloutServer, prompt: tuple[int, ...]) -> list[int]:
    """Return the server's greedy tokens with the weights from its folder. A RolloutClient would refuse these
    weights."""
    sampling = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    body = {"model": "policy", "token_ids": list(prompt), "sampling_params": sampling}
    headers = {"Authorization": f"Bearer {server.api_key}"}
    reply = httpx.post(
        f"{server.url}/inference/v1/generate", json=body, headers=headers, timeout=DEADLINE_S, trust_env=False
    )
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["token_ids"]


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def greedy(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """Return the most probable continuation. Each token is computed from the start, without a cache."""
    ids = list(prompt)
    for _ in range(TOKENS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
