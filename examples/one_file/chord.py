"""CHORD in one file: the whole algorithm, for a reader who has just read the paper (arXiv 2508.11408).

    python examples/one_file/chord.py                      # CHORD-phi: about a minute on two CPU cores
    python examples/one_file/chord.py --method chord_mu    # mu decays, demonstration tokens are not weighted
    python examples/one_file/chord.py --method grpo        # mu = 0: on-policy RL alone

It needs torch and Transformers, nothing else. It is the specification of `megatron_chord`: the tests prove that the
distributed trainer computes this file's loss, gradients and metrics, for every parallel layout.

The task is the quick start's: short stories with gains and losses. The base policy writes its answer at once, and is
mostly wrong. The demonstrations calculate step by step, and are always right.

Notation
    l      log-probability of a token under the policy that is trained; p = exp(l)
    l_old  log-probability of the same token when it was sampled (a constant)
    A      advantage of a rollout, the same for all its tokens
    mu     weight of the SFT loss; 1 - mu is the weight of the GRPO loss
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TokenWeight = Literal["one", "phi"]
TASK = Path(__file__).resolve().parents[1] / "arithmetic"


# ---- What is trained on ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A demonstration. The SFT loss is over the tokens of its answer, not over the prompt."""

    tokens: Tensor
    """[n] int64: prompt and response"""
    trained: Tensor
    """[k] int64: positions in ``tokens`` of the response's tokens"""


@dataclass(frozen=True, kw_only=True)
class Rollout(Demonstration):
    """A response that the policy itself has sampled."""

    old_logprobs: Tensor
    """[k]: l_old of each trained token, measured while it was sampled"""
    advantage: float
    """A"""


# ---- The loss -------------------------------------------------------------------------------------------------


def group_advantages(rewards: Sequence[float], eps: float = 1e-6) -> list[float]:
    """A of each rollout of one prompt: (R - mean) / (std + eps), with the unbiased standard deviation (eq. 2).

    All advantages are 0 if the rewards are equal: such a group does not show which response is better.
    """
    mean = sum(rewards) / len(rewards)
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    return [(reward - mean) / (std + eps) for reward in rewards]


def policy_loss(l: Tensor, l_old: Tensor, a: Tensor, clip_low: float, clip_high: float) -> Tensor:  # noqa: E741
    """GRPO's clipped surrogate of each token (eq. 2). All arguments and the result are [k].

    r = p / p_old corrects for changes of the policy since the token was sampled. A token gets no gradient if its ratio
    is outside of [1 - clip_low, 1 + clip_high] in the direction of its advantage.
    """
    r = torch.exp(l - l_old)
    return -torch.minimum(r * a, r.clamp(1 - clip_low, 1 + clip_high) * a)


def sft_loss(l: Tensor, weight: TokenWeight) -> Tensor:  # noqa: E741
    """-w l of each demonstration token (eq. 1 and 6), [k]. phi is p (1 - p): largest at p = 1/2.

    phi is small for tokens that the policy finds nearly impossible and for tokens that it already predicts with
    certainty. The weight is a constant: without ``detach`` a token with p < 0.24 would become less probable.
    """
    p = l.exp().detach()
    return -(p * (1 - p) if weight == "phi" else torch.ones_like(p)) * l


def token_logprobs(model: PreTrainedModel, samples: Sequence[Demonstration]) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every trained token of ``samples``, one after the other: [K] and [K].

    Sequences are padded on the right. Causal attention never reads this padding, so no mask is needed.
    """
    tokens = pad_sequence([sample.tokens for sample in samples], batch_first=True)
    logprobs = torch.log_softmax(model(input_ids=tokens).logits, dim=-1)
    # The logits at position t - 1 predict the token at position t.
    rows = [logprobs[i, sample.trained - 1] for i, sample in enumerate(samples)]
    chosen = [
        row.gather(1, sample.tokens[sample.trained, None])[:, 0]
        for row, sample in zip(rows, samples, strict=True)
    ]
    entropy = [-(row.exp() * row).sum(-1) for row in rows]
    return torch.cat(chosen), torch.cat(entropy)


def chord_loss(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    demonstrations: Sequence[Demonstration],
    *,
    mu: float,
    token_weight: TokenWeight,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, float]]:
    """L = (1 - mu) L_GRPO + mu L_SFT-phi (eq. 3), differentiable, and its metrics.

    Both losses are means over all tokens of the whole update. So the result does not depend on how the update is
    split into micro-batches or over processes.
    """
    loss, metrics = torch.zeros((), dtype=model.dtype), {}
    if rollouts:
        l, entropy = token_logprobs(model, rollouts)  # noqa: E741
        l_old = torch.cat([rollout.old_logprobs for rollout in rollouts]).to(l.dtype)
        a = torch.cat([l.new_full((len(rollout.trained),), rollout.advantage) for rollout in rollouts])
        grpo = policy_loss(l, l_old, a, clip_low, clip_high)
        loss = loss + (1 - mu) * grpo.mean()
        r = torch.exp(l - l_old)
        clipped = ((a > 0) & (r > 1 + clip_high)) | ((a < 0) & (r < 1 - clip_low))
        metrics |= {
            "policy_loss": grpo.mean().item(),
            "entropy": entropy.mean().item(),
            "clip_fraction": clipped.double().mean().item(),
        }
    if demonstrations:
        l, _ = token_logprobs(model, demonstrations)  # noqa: E741
        sft = sft_loss(l, token_weight)
        loss = loss + mu * sft.mean()
        p = l.exp().detach()
        metrics |= {
            "sft_loss": sft.mean().item(),
            "sft_nll": -l.mean().item(),
            "sft_p": p.mean().item(),
            "sft_phi": (p * (1 - p)).mean().item(),
        }
    return loss, {"loss": loss.item()} | metrics


def cosine_mu(step: int, *, peak: float, valley: float, decay_steps: int) -> float:
    """CHORD-mu's schedule: from ``peak`` at step 0 along a half cosine to ``valley``, and ``valley`` from then on."""
    progress = min(step / decay_steps, 1.0)
    return valley + (peak - valley) * (1 + math.cos(math.pi * progress)) / 2


# ---- The task -------------------------------------------------------------------------------------------------


def reward(response: str, truth: str) -> float:
    """1 if the text after the last ``####`` is the truth, else 0."""
    _, marker, answer = response.rpartition("####")
    return float(bool(marker) and answer.split("\n")[0].strip() == truth)


def render(tokenizer: PreTrainedTokenizerBase, problem: str, solution: str | None = None) -> Demonstration:
    """A problem, ready to be answered; or with its solution, ready to be trained on."""
    user = [{"role": "user", "content": problem}]
    prompt: str = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)  # type: ignore[assignment]
    start = len(tokenizer.encode(prompt, add_special_tokens=False))
    if solution is None:
        whole = prompt
    else:
        chat = [*user, {"role": "assistant", "content": solution}]
        whole: str = tokenizer.apply_chat_template(chat, tokenize=False)  # type: ignore[assignment]
    tokens = torch.tensor(tokenizer.encode(whole, add_special_tokens=False))
    return Demonstration(tokens=tokens, trained=torch.arange(start, len(tokens)))


@torch.no_grad()
def sample(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Demonstration], *, greedy: bool = False
) -> list[tuple[Rollout, str]]:
    """One response of at most 48 tokens to each prompt: the rollout (its advantage still 0), and its text."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    width = max(len(prompt.tokens) for prompt in prompts)
    padding = [width - len(prompt.tokens) for prompt in prompts]
    ids = torch.stack(
        [torch.cat([torch.full((n,), pad), p.tokens]) for n, p in zip(padding, prompts, strict=True)]
    )
    mask = torch.stack([(torch.arange(width) >= n).long() for n in padding])
    how: dict[str, Any] = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    )
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=48, output_logits=True, return_dict_in_generate=True, **how
    )
    logprobs = torch.log_softmax(torch.stack(out.logits, dim=1), dim=-1)  # [prompts, new tokens, vocabulary]
    found = []
    for i, (n, prompt) in enumerate(zip(padding, prompts, strict=True)):
        new = out.sequences[i, width:].tolist()
        new = new[: new.index(end) + 1] if end in new else new
        response = torch.tensor(new)
        rollout = Rollout(
            tokens=torch.cat([prompt.tokens, response]),
            trained=torch.arange(width - n, width - n + len(new)),
            old_logprobs=logprobs[i, torch.arange(len(new)), response],
            advantage=0.0,
        )
        found.append((rollout, tokenizer.decode(new, skip_special_tokens=True)))
    return found


# ---- The run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 20
    prompts: int = 16
    """per step"""
    rollouts: int = 8
    """per prompt"""
    demonstrations: int = 32
    """per step"""
    lr: float = 5e-4
    mu: float | None = 0.5
    """constant; None: from 0.9 along a cosine to 0.05 over the run"""
    token_weight: TokenWeight = "phi"
    seed: int = 0


METHODS = {
    "chord_phi": Settings(),
    "chord_mu": Settings(mu=None, token_weight="one"),
    "grpo": Settings(mu=0.0),
    "sft": Settings(mu=1.0, token_weight="one"),
}


def train(settings: Settings, policy: Path = TASK / "policy") -> list[float]:
    """Train the quick start's policy; returns the held-out accuracies before and after."""
    torch.manual_seed(settings.seed)
    draw = random.Random(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    problems, held_out, demonstrations = (
        [json.loads(line) for line in (TASK / f"{name}.jsonl").read_text().splitlines()]
        for name in ("problems_train", "problems_heldout", "demonstrations")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))

    def accuracy() -> float:
        prompts = [render(tokenizer, row["problem"]) for row in held_out[:200]]
        texts = [text for _, text in sample(model, tokenizer, prompts, greedy=True)]
        return sum(reward(t, row["answer"]) for t, row in zip(texts, held_out, strict=False)) / len(prompts)

    accuracies = [accuracy()]
    print(f"held-out accuracy before: {accuracies[0]:.1%}", flush=True)
    for step in range(settings.steps):
        mu = settings.mu
        if mu is None:
            mu = cosine_mu(step, peak=0.9, valley=0.05, decay_steps=settings.steps)
        rollouts: list[Rollout] = []
        rewards: list[float] = []
        if mu < 1:
            asked = [row for row in draw.sample(problems, settings.prompts) for _ in range(settings.rollouts)]
            answers = sample(model, tokenizer, [render(tokenizer, row["problem"]) for row in asked])
            rewards = [reward(text, row["answer"]) for (_, text), row in zip(answers, asked, strict=True)]
            for first in range(0, len(rewards), settings.rollouts):  # the first rollout of each prompt
                group = slice(first, first + settings.rollouts)
                advantages = group_advantages(rewards[group])
                rollouts += [
                    replace(rollout, advantage=a)
                    for (rollout, _), a in zip(answers[group], advantages, strict=True)
                ]
        chosen = draw.sample(demonstrations, settings.demonstrations) if mu > 0 else []
        imitated = [render(tokenizer, row["problem"], row["solution"]) for row in chosen]
        loss, metrics = chord_loss(model, rollouts, imitated, mu=mu, token_weight=settings.token_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        mean = f"reward {sum(rewards) / len(rewards):.2f}  " if rewards else ""
        print(
            f"step {step + 1:2}  mu {mu:.2f}  {mean}" + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()),
            flush=True,
        )
    accuracies.append(accuracy())
    print(f"held-out accuracy after {settings.steps} steps: {accuracies[1]:.1%}")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="CHORD in one file, on the quick start's task.")
    parser.add_argument("--method", choices=METHODS, default="chord_phi")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(replace(METHODS[arguments.method], seed=arguments.seed))
