"""The amount of work of a step: what it samples and trains on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one step. Lengths are means over samples, in tokens."""

    prompts: int
    rollouts: int
    """Samples per prompt."""
    demonstrations: int
    prompt_tokens: float
    response_tokens: float
    demonstration_tokens: float
    """Of a demonstration's response."""
    response_limit: int
    longest: int
    """Most tokens that one sample can have."""
    updates: int = 1
    """Optimizer updates that share the step's samples, each its own part."""
    epochs: int = 1
    passes: int = 0
    """Forward passes beside the training pass: old log-probs, the reference's."""

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
        """Of a sample, on average."""
        return self.tokens / max(1, self.sequences + self.demonstrations)
