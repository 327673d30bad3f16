"""Tiny models, settings and batches for the tests."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from megatron_chord import config
from megatron_chord.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    sources_of,
)
from megatron_chord.losses.terms import Term
from megatron_chord.methods.table import build
from megatron_chord.records import Part, TrainSample

VOCAB = 203  # odd, so that every tensor-parallel layout pads it


def save_qwen2(
    folder: Path, *, tied: bool = False, layers: int = 4, seed: int = 0, vocab: int = VOCAB
) -> Path:
    return save_model("qwen2", folder, tied=tied, layers=layers, seed=seed, vocab=vocab)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 6.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 256,
}
"""A head of 16 (or 32) has 8 (or 16) frequencies: some are kept, some are slowed down and some are interpolated."""

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 128,
}
"""A rotated part of 16 has 8 frequencies: some are kept, some are slowed down and some are between."""

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 28,
    "rope_parameters": YARN_ROPE,
}
"""All sizes of latent attention differ from each other."""

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "qwen3": {"head_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "deepseek_v2": LATENT
    | {
        "q_lora_rank": None,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": LATENT
    | {
        "q_lora_rank": 40,
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
}
"""What each family's tiny config.json has in addition to the sizes that all families share."""


def save_model(
    family: str,
    folder: Path,
    *,
    tied: bool = False,
    layers: int = 4,
    seed: int = 0,
    vocab: int = VOCAB,
    **settings: Any,
) -> Path:
    """Save a random model in Hugging Face format. Its norms and biases differ from their initial values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **sizes | FAMILIES[family] | settings)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            buffer.data.add_(0.1 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return folder


def tiny_run(
    folder: Path,
    *,
    method: str = "chord",
    settings: dict[str, Any] | None = None,
    max_tokens: int = 10_000,
    parallel: dict[str, Any] | None = None,
    temperature: float = 1.0,
    **objective: Any,
) -> RunConfig:
    """Settings of a run whose objective is tested. Only the model is read from disk.

    ``objective`` may also hold settings of the method, if ``ObjectiveConfig`` has none of the same name.
    """
    kind = {kind.name: kind for kind in get_args(config.MethodConfig)}[method]
    names = {field.name for field in fields(kind)} - {field.name for field in fields(ObjectiveConfig)}
    own = {name: objective.pop(name) for name in names & set(objective)}
    return RunConfig(
        output=folder / "out",
        steps=10,
        model=ModelConfig(path=folder, dtype="fp32"),
        data=DataConfig(
            prompts=sources_of(folder / "prompts"),
            demonstrations=sources_of(folder / "demonstrations"),
            max_response_tokens=16,
        ),
        batch=BatchConfig(
            prompts=3, rollouts=2, demonstrations=5 if method == "chord" else 0, max_tokens_per_gpu=max_tokens
        ),
        method=kind(**own, **settings or {}),
        parallel=ParallelConfig(**parallel or {}),
        objective=ObjectiveConfig(**objective),
        rollout=RolloutConfig(temperature=temperature),
    )


def terms_of(run: RunConfig) -> dict[str, Term]:
    """All terms of the run's objective."""
    return build(run.method).all_terms(run.resolved_objective(), run.batch)


def make_samples(
    *, num_policy: int = 6, num_sft: int = 5, seed: int = 0, vocab: int = VOCAB
) -> list[TrainSample]:
    """Random samples of CHORD's two terms with many lengths. Ratios are clipped on both sides."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(num_policy + num_sft):
        is_demonstration = index >= num_policy
        prompt, response = int(rng.integers(2, 9)), int(rng.integers(1, 14))
        positions = np.arange(prompt, prompt + response)
        token_ids = rng.integers(3, vocab, prompt + response)
        if is_demonstration and response > 4:
            positions = np.delete(positions, 2)  # a hole, as in a conversation of several turns
        constants = {
            "advantage": float(rng.normal()),
            "rollout_logprob": rng.normal(-6, 2, response).astype(np.float32),
        }
        part = Part(
            term="sft" if is_demonstration else "policy",
            positions=positions,
            constants={} if is_demonstration else constants,
        )
        samples.append(TrainSample(token_ids=token_ids, parts=(part,)))
    return samples
