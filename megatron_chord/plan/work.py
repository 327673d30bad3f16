"""The amount of work of a step: what it samples and trains on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """``rollout.partial``: a step samples more prompts than it trains, and stops when enough of them are finished."""

    extra_prompts: int
    """Number of prompts in addition to those that are trained."""
    carries: bool
    """True if the next step continues the unfinished answers, False if they are dropped."""
    max_carries: int | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one step. Lengths are means over samples, in tokens."""

    prompts: int
    rollouts: int
    """Rollouts per prompt."""
    demonstrations: int
    prompt_tokens: float
    response_tokens: float
    demonstration_tokens: float
    """Mean length of a demonstration's response."""
    response_limit: int
    longest: int
    """Largest number of tokens that a sample can have."""
    updates: int = 1
    """Number of optimizer updates, among which the step's samples are divided."""
    epochs: int = 1
    passes: int = 0
    """Number of forward passes in addition to the training pass: old log-probs, log-probs of the reference."""

    early_stop: EarlyStop | None = None

    @property
    def sequences(self) -> int:
        return self.prompts * self.rollouts

    @property
    def tokens(self) -> float:
        """All tokens of the trained samples, prompts included."""
        sampled = self.sequences * (self.prompt_tokens + self.response_tokens)
        return sampled + self.demonstrations * (self.prompt_tokens + self.demonstration_tokens)

    @property
    def length(self) -> float:
        """Mean number of tokens of a sample."""
        return self.tokens / max(1, self.sequences + self.demonstrations)
