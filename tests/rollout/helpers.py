"""A tiny random policy, requests for it, and the log-probs that Transformers gives to its rollouts."""

from __future__ import annotations

import re
import time
from typing import Any

import httpx
import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_chord.records import Rollout
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.replies import GenerateRequest
from megatron_chord.rollout.server import RolloutServer
from megatron_chord.routes import RouteShape

START_S = 300.0
VOCAB = 300
_SAMPLED = re.compile(r"^vllm:generation_tokens_total(?:{[^}]*})? (\S+)", re.MULTILINE)


def make_model(seed: int, *, tied: bool = False) -> Qwen2ForCausalLM:
    """A model with random weights. They are so large that two models' log-probs differ by more than 1."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        eos_token_id=1,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model


def weights_of(model: Qwen2ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    """Yield the name and the tensor of each parameter. A tied model has no lm_head."""
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def requests(num_prompts: int = 4, *, temperature: float = 1.0, seed: int = 0) -> list[GenerateRequest]:
    generator = torch.Generator().manual_seed(seed)
    return [
        GenerateRequest(
            prompt_ids=tuple(torch.randint(3, VOCAB, (5 + 40 * i,), generator=generator).tolist()),
            num_rollouts=4,
            seed=seed + i,
            temperature=temperature,
            max_tokens=24,
            stop_token_ids=(1, 2),
        )
        for i in range(num_prompts)
    ]


def num_sampled(server: RolloutServer) -> float:
    """Return how many tokens the server has sampled since it started, by its own count."""
    reply = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {server.api_key}"})
    return sum(map(float, _SAMPLED.findall(reply.raise_for_status().text)))


def await_sampling(server: RolloutServer, *, since: float, timeout_s: float = 240) -> None:
    """Wait until the server has sampled more than ``since`` tokens."""
    deadline = time.monotonic() + timeout_s
    while num_sampled(server) <= since:
        assert time.monotonic() < deadline, f"nothing was sampled within {timeout_s} s"
        time.sleep(0.01)


@torch.no_grad()
def expected_logprobs(model: Qwen2ForCausalLM, request: GenerateRequest, rollout: Rollout) -> torch.Tensor:
    """Return Transformers' log-prob of each of the rollout's tokens."""
    ids = torch.tensor([request.prompt_ids + rollout.token_ids])
    logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].double()
    logprobs = torch.log_softmax(logits / (request.temperature or 1.0), dim=-1)
    return logprobs.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]


def largest_gap(
    model: Qwen2ForCausalLM, asked: list[GenerateRequest], replies: list[tuple[Rollout, ...]]
) -> float:
    """Return the largest |vLLM - Transformers| log-prob over all sampled tokens."""
    return float(_gaps(model, asked, replies).max())


def mean_gap(
    model: Qwen2ForCausalLM, asked: list[GenerateRequest], replies: list[tuple[Rollout, ...]]
) -> float:
    """Return the mean |vLLM - Transformers| log-prob over all sampled tokens."""
    return float(_gaps(model, asked, replies).mean())


def _gaps(
    model: Qwen2ForCausalLM, asked: list[GenerateRequest], replies: list[tuple[Rollout, ...]]
) -> torch.Tensor:
    return torch.cat(
        [
            (torch.tensor(rollout.logprobs).double() - expected_logprobs(model, request, rollout)).abs()
            for request, rollouts in zip(asked, replies, strict=True)
            for rollout in rollouts
        ]
    )


def client_of(server: RolloutServer) -> RolloutClient:
    return RolloutClient(server.url, server.api_key)


def assert_routes(
    model: Any,
    shape: RouteShape,
    asked: list[GenerateRequest],
    replies: list[tuple[Rollout, ...]],
    *,
    least: float = 0.99,
) -> None:
    """Assert that routes are Transformers' own choice for this share of the tokens, since near ties may be decided
    otherwise. Shifted by one token they are not."""
    same, shifted = [], []
    for request, rollouts in zip(asked, replies, strict=True):
        for rollout in rollouts:
            assert isinstance(rollout.routes, np.ndarray)
            theirs = transformers_routes(model, shape, request.prompt_ids + rollout.token_ids)
            ours = np.sort(np.delete(rollout.routes, shape.dense_layers, axis=1), axis=-1)
            assert len(ours) == len(theirs) - 1, "all but the last token"
            same.append((ours == theirs[:-1]).all((1, 2)))
            shifted.append((ours == theirs[1:]).all((1, 2)))
    assert np.concatenate(same).mean() > least
    assert np.concatenate(shifted).mean() < 0.5


def answers_of(
    client: RolloutClient, asked: list[GenerateRequest], *, version: int | None, deadline_s: float = 10
) -> dict[int, tuple[Rollout, ...] | None]:
    """Return the answers to the requests, two of which are sent at a time, by their index."""
    left, answers = list(enumerate(asked)), dict[int, tuple[Rollout, ...] | None]()
    client.generate_each(
        lambda: left.pop(0) if left else None,
        version=version,
        at_once=2,
        deadline_s=deadline_s,
        on_answer=answers.__setitem__,
    )
    return answers


@torch.no_grad()
def transformers_routes(model: Any, shape: RouteShape, token_ids: tuple[int, ...]) -> np.ndarray:
    """Return the experts that Transformers chooses for each token, sorted: [tokens, layers with experts, chosen]."""
    chosen: list[Any] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [
        gate.register_forward_hook(lambda gate, inputs, output: chosen.append(output[2])) for gate in gates
    ]
    model(torch.tensor([token_ids]))
    for hook in hooks:
        hook.remove()
    assert len(chosen) == shape.layers - len(shape.dense_layers)
    return torch.stack(chosen, dim=1).sort(-1).values.numpy()
