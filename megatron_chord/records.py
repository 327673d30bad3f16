"""The nouns: what travels between reading, sampling, grading, packing and training. No tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Message = dict[str, str]
"""A chat message: ``role`` (system, user, assistant) and ``content``."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem: what the policy is asked and what its answer is graded against."""

    id: str
    messages: tuple[Message, ...]
    truth: str
    token_ids: tuple[int, ...]
    """After the chat template, with the generation prompt."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A demonstration. ``trainable[i]`` says whether token i is one the expert wrote."""

    id: str
    token_ids: tuple[int, ...]
    trainable: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response: ids as the engine sampled them, never decoded and encoded again."""

    token_ids: tuple[int, ...]
    """The response only, the stop token included."""
    logprobs: tuple[float, ...]
    """The engine's log-prob of each, at the sampling temperature."""
    finish_reason: Literal["stop", "length"]
    weight_version: int
    """Optimizer steps in the weights that sampled every one of these tokens."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """One prompt's rollouts with their rewards and group advantages."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TrainSample:
    """Tokens with what the loss needs at each. All arrays have the length of ``token_ids``."""

    kind: Literal["policy", "expert"]
    token_ids: np.ndarray
    """int64"""
    trained: np.ndarray
    """bool: the loss counts this token's own log-prob. Never the first token."""
    advantage: float = 0.0
    rollout_logprobs: np.ndarray | None = None
    """float32, 0 where not trained; policy samples only."""

    def __post_init__(self) -> None:
        assert self.token_ids.shape == self.trained.shape
        assert not self.trained[0], "the first token has no predecessor to be predicted from"
        assert (self.rollout_logprobs is None) == (self.kind == "expert")
