"""One step's draws with a scripted engine, and one token's loss, for methods that put demonstrations into groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megatron_chord.config import RunConfig
from megatron_chord.losses.terms import TermOutput, TermTokens, TokenStats
from megatron_chord.methods.table import method_of
from megatron_chord.records import Demonstration, Grade, Prompt, Rollout, TrainSample
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.sampling.context import SamplingServices, StepContext
from tests.support.grading import GradersAtOnce
from tests.support.step_context import step_context
from tests.support.tiny import tiny_run

WRONG, RIGHT, BROKEN = 50, 51, 59
"""The last token of an answer: reward 0, reward 1, or a grading that fails."""
GRADES = {WRONG: Grade(0.0), RIGHT: Grade(1.0), BROKEN: Grade(None, "broken")}
PROBABILITIES = [1e-6, 1e-3, 0.05, 1 / 12, 0.1, 0.2, 0.24, 1 / 3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-6]


def guided_run(
    method: str, *, prompts: int = 1, settings: dict[str, Any] | None = None, **objective: Any
) -> RunConfig:
    """A run whose prompts have demonstrations. It tolerates failed gradings."""
    run = tiny_run(Path("model"), method=method, settings=settings, **objective)
    return replace(
        run,
        data=replace(run.data, aligned=True),
        batch=replace(run.batch, prompts=prompts, rollouts=3),
        reward=MathReward(max_error_rate=0.9),
    )


def assert_refused(make_run: Callable[[], RunConfig], *, batch: dict[str, Any], reason: str) -> None:
    """The run, or its method with these settings of the batch, is refused with a message that matches ``reason``."""

    def make() -> None:
        run = make_run()
        method_of(replace(run, batch=replace(run.batch, **batch)))

    with pytest.raises(ValueError, match=reason):
        make()


def answer(last: int, *, length: int = 2, finish: Literal["stop", "length"] = "stop") -> Rollout:
    """An answer of ``length`` tokens."""
    return Rollout(
        token_ids=(*range(20, 19 + length), last),
        logprobs=(-1.5,) * length,
        finish_reason=finish,
        weight_version=0,
    )


def scripted_draw(
    run: RunConfig, answers: Sequence[Sequence[Rollout]], demonstrations: Sequence[int]
) -> StepContext:
    """A step context with as many prompts as ``answers``. A demonstration is 30, 31 and its last token."""
    prompts = [
        Prompt(id=str(i), messages=({"role": "user", "content": ""},), truth="", token_ids=(100 + i, 3))
        for i in range(len(answers))
    ]
    demonstration_of = {
        prompt.id: Demonstration(
            id=prompt.id,
            token_ids=(*prompt.token_ids, 30, 31, last),
            trainable=(False, False, True, True, True),
        )
        for prompt, last in zip(prompts, demonstrations, strict=True)
    }
    services: Any = SamplingServices(
        clients=[_Client(answers)],  # type: ignore[list-item]
        version=0,
        template=_Template(),  # type: ignore[arg-type]
        graders=GradersAtOnce(lambda response: GRADES[int(response.text.split()[-1])]),  # type: ignore[arg-type]
    )
    return step_context(run, services, prompts, demonstration_of=demonstration_of)


class _Template:
    stop_token_ids = (2,)

    def turn(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        return " ".join(map(str, response_ids))


class _Client:
    def __init__(self, answers: Sequence[Sequence[Rollout]]) -> None:
        self._answers = answers

    def generate(self, requests: Sequence[Any], **_: Any) -> list[tuple[Rollout, ...]]:
        return [tuple(self._answers[request.prompt_ids[0] - 100]) for request in requests]


def constants(samples: Sequence[TrainSample], term: str, name: str) -> dict[int, list[float]]:
    """Return a constant of each sample of a term, in order, by the prompt's number."""
    found: dict[int, list[float]] = {}
    for sample in samples:
        (part,) = sample.parts
        if part.term == term:
            found.setdefault(int(sample.token_ids[0]) - 100, []).append(float(part.constants[name]))
    return found


def tokens_of(sequences: Sequence[int] = (1,), **columns: float | Sequence[float]) -> TermTokens:
    """A term's tokens in sequences of these lengths. A single number stands for a whole column."""
    count = sum(sequences)

    def column(values: float | Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).expand(count)

    return TermTokens(
        index=torch.arange(count),
        sequence=torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(sequences)),
        lengths=torch.tensor(sequences, dtype=torch.float64),
        held=torch.tensor(sequences),
        columns={name: column(values) for name, values in columns.items()},
    )


def stats_of(p: Sequence[float], entropy: Sequence[float] | None = None) -> TokenStats:
    """Statistics of tokens with these probabilities. Log-probs and entropies are leaves."""
    return TokenStats(
        torch.tensor(p, dtype=torch.float64).log().requires_grad_(),
        torch.tensor(entropy or [0.0] * len(p), dtype=torch.float64).requires_grad_(),
        None,
    )


def push_on_target(p: float, loss: Callable[[TokenStats], TermOutput]) -> float:
    """Return -d loss / d z of the target's logit. A log_softmax over four tokens gives the target the probability p."""
    others = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64) * (1 - p)
    logits = torch.cat([torch.tensor([p], dtype=torch.float64), others]).log().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    entropy = -(logprobs.exp() * logprobs).sum()[None]
    loss(TokenStats(logprobs[:1], entropy, None)).loss.sum().backward()
    assert logits.grad is not None
    return -logits.grad[0].item()


def entropy_of(p: float) -> float:
    """Return the entropy of the distribution in ``push_on_target``."""
    parts = torch.tensor([p, *(share * (1 - p) for share in (0.5, 0.3, 0.2))], dtype=torch.float64)
    return -(parts * parts.log()).sum().item()
