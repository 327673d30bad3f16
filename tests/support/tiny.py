"""Tiny models and batches with which the tests compare, and the plain float64 reference of one CHORD step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_chord.config import ObjectiveConfig
from megatron_chord.records import TrainSample

POLICY_MEANS = ("policy_loss", "entropy", "clip_fraction", "logprob_gap")
EXPERT_MEANS = ("expert_loss", "expert_nll", "expert_p", "expert_phi")
VOCAB = 203  # odd, so that every tensor-parallel layout pads it


def save_qwen2(
    folder: Path, *, tied: bool = False, layers: int = 4, seed: int = 0, vocab: int = VOCAB
) -> Path:
    """A random Qwen2 in Hugging Face format, with norms and biases away from their initial values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_samples(
    *, num_policy: int = 6, num_expert: int = 5, seed: int = 0, vocab: int = VOCAB
) -> list[TrainSample]:
    """Random samples of uneven lengths; rollout log-probs such that some ratios clip on either side."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(num_policy + num_expert):
        is_expert = index >= num_policy
        prompt, response = int(rng.integers(2, 9)), int(rng.integers(1, 14))
        token_ids = rng.integers(3, vocab, prompt + response)
        trained = np.arange(prompt + response) >= prompt
        if is_expert and response > 4:
            trained[prompt + 2] = False  # a hole, as in a conversation of several turns
        samples.append(
            TrainSample(
                kind="expert" if is_expert else "policy",
                token_ids=token_ids,
                trained=trained,
                advantage=0.0 if is_expert else float(rng.normal()),
                rollout_logprobs=None
                if is_expert
                else np.where(trained, rng.normal(-6, 2, len(token_ids)), 0).astype(np.float32),
            )
        )
    return samples


def reference_step(
    folder: Path,
    samples: Sequence[TrainSample],
    mu: float,
    objective: ObjectiveConfig,
    temperature: float = 1.0,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients (by Hugging Face name) of one CHORD step, written out with Transformers in float64.

    Independent of the package: one sample at a time, full logits, the formulas of arXiv 2508.11408 eq. 1-6.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    count = {
        kind: sum(int(s.trained.sum()) for s in samples if s.kind == kind) for kind in ("policy", "expert")
    }
    sums = dict.fromkeys(
        (*POLICY_MEANS, *EXPERT_MEANS),
        0.0,
    )
    loss = torch.zeros((), dtype=torch.float64)
    gap_max = 0.0
    for sample in samples:
        ids = torch.from_numpy(np.asarray(sample.token_ids))[None]
        logps = torch.log_softmax(model(ids).logits[0, :-1] / temperature, dim=-1)
        chosen = logps.gather(1, ids[0, 1:, None])[:, 0]
        keep = torch.from_numpy(sample.trained[1:])
        logp, full = chosen[keep], logps[keep]
        if sample.kind == "expert":
            p = logp.detach().exp()
            weight = {"one": torch.ones_like(p), "p": p, "phi": p * (1 - p)}[objective.expert_weight]
            term = -(weight * logp).sum()
            loss = loss + mu * term / count["expert"]
            sums["expert_loss"] += term.item()
            sums["expert_nll"] -= logp.sum().item()
            sums["expert_p"] += p.sum().item()
            sums["expert_phi"] += (p * (1 - p)).sum().item()
        else:
            rolled = torch.from_numpy(sample.rollout_logprobs[1:])[keep].double()
            old = rolled if objective.ratio_from == "rollout" else logp.detach()
            ratio = (logp - old).clamp(-20, 20).exp()
            clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
            a = float(np.float32(sample.advantage))
            term = -torch.minimum(ratio * a, clipped * a).sum()
            entropy = -(full.exp() * full).sum()
            loss = loss + (1 - mu) * (term - objective.entropy_bonus * entropy) / count["policy"]
            sums["policy_loss"] += term.item()
            sums["entropy"] += entropy.item()
            sums["clip_fraction"] += (clipped * a < ratio * a).sum().item()
            sums["logprob_gap"] += (logp - rolled).abs().sum().item()
            gap_max = max(gap_max, (logp - rolled).abs().max().item())
    loss.backward()
    metrics = {
        name: value / count["expert" if name.startswith("expert") else "policy"]
        for name, value in sums.items()
        if count["expert" if name.startswith("expert") else "policy"]
    }
    grads = {
        name: (p.grad if p.grad is not None else torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    return {"loss": loss.item(), "logprob_gap_max": gap_max, **metrics}, grads
