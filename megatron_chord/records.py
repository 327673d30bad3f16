"""The records that are passed between reading, sampling, grading, packing and training. They have no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, overload

import numpy as np

from megatron_chord.routes import Routes

Message = dict[str, Any]
"""A chat message: the texts ``role`` (system, user, assistant, tool) and ``content``, and more (``data.messages``)."""
Tool = Mapping[str, Any]
"""A function's schema, as chat templates take it: ``{"type": "function", "function": {"name": ..., ...}}``."""


E = TypeVar("E", int, bool)


class Compact(Sequence[E]):
    """A tuple of numbers, kept as an array: 4 bytes an int or 1 a bool, in memory or in a mapped file.

    It equals the tuple, and slices of it are tuples. NumPy takes it without a copy of each number.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Sequence[E] | np.ndarray, kind: type[np.int32] | type[np.bool_]) -> None:
        """``values`` is kept as it is where it is an array of ``kind``, and copied otherwise."""
        self._values = np.asarray(values, kind)

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, place: int) -> E: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[E, ...]: ...
    def __getitem__(self, place: int | slice) -> E | tuple[E, ...]:
        found = self._values[place].tolist()
        return tuple(found) if isinstance(place, slice) else found

    def __iter__(self) -> Iterator[E]:
        return iter(self._values.tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Compact):
            return np.array_equal(self._values, other._values)
        return self[:] == other

    def __hash__(self) -> int:
        return hash(self[:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._values, dtype, copy=copy)

    def __repr__(self) -> str:
        return f"Compact({self[:]})"

    def count(self, value: object) -> int:
        return int(np.count_nonzero(self._values == value))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem: the prompt of the policy, and the ground truth with which its answer is graded."""

    id: str
    messages: tuple[Message, ...]
    truth: str
    token_ids: tuple[int, ...]
    """The token ids after the chat template was applied, with the generation prompt."""
    tools: tuple[Tool, ...] = ()
    """Functions that the chat template shows."""
    source: str = ""
    """Name of the data source that it comes from (``data.prompts``)."""
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """All fields of its row, as the data file has them; kept only where the reward reads them."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A conversation to imitate. ``trainable[i]`` says whether token i belongs to an assistant's turn."""

    id: str
    token_ids: tuple[int, ...] | Compact[int]
    trainable: tuple[bool, ...] | Compact[bool]
    source: str = ""
    """Name of the data source that it comes from (``data.demonstrations``)."""


Span = tuple[int, int]
"""(weight version, number of tokens): consecutive tokens of a rollout that one weight version sampled."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response. Its token ids are those that the engine sampled; they are never decoded and encoded
    again."""

    token_ids: tuple[int, ...]
    """The token ids of the response, including the stop token, without the prompt."""
    logprobs: tuple[float, ...]
    """The log-prob of each token, at the sampling temperature, by the weights that sampled it."""
    finish_reason: Literal["stop", "length", "abort"]
    """abort: sampling was stopped, and the response will be continued (``rollout.partial``); it is never trained."""
    weight_version: int
    """Version (number of optimizer steps) of the oldest weights that sampled any of the tokens."""
    spans: tuple[Span, ...] = ()
    """The weight versions of the tokens if there are several: with ``rollout.asynchronous.in_flight: keep``, or if the
    response was sampled in several steps. Otherwise empty."""
    routes: Routes | None = field(default=None, compare=False, repr=False)
    """[R, layers, chosen] uint8 or uint16, in memory or still on a rollout server: the experts that the engine chose
    for each token of prompt, prefix and response, except for the last token, which was never an input. None for dense
    models and without ``rollout.router_replay``. Tokens that were sampled in an earlier step keep the choice of that
    time."""

    def __post_init__(self) -> None:
        assert not self.spans or self.weight_version == min(version for version, _ in self.spans)
        assert not self.spans or len(self.token_ids) == sum(count for _, count in self.spans)

    @property
    def all_spans(self) -> tuple[Span, ...]:
        """The weight versions of the tokens, also if there is only one."""
        return self.spans or ((self.weight_version, len(self.token_ids)),)


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One prompt to sample rollouts of."""

    prompt: Prompt
    seed: int
    prefix: tuple[int, ...] = ()
    """Token ids with which every answer begins. They are not sampled, but count towards the length limit."""
    partial_rollouts: tuple[Rollout, ...] = ()
    """Rollouts of this prompt that were sampled earlier. Those with the finish reason `abort` are continued."""
    is_awaited: bool = False
    """True if sampling must not stop before this request is complete."""

    @property
    def is_answered(self) -> bool:
        return bool(self.partial_rollouts) and all(
            rollout.finish_reason != "abort" for rollout in self.partial_rollouts
        )


@dataclass(frozen=True)
class Grade:
    """One response's score, or the reason why there is none."""

    score: float | None
    error: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    """The named summands of the score, if the grader names them."""


@dataclass(frozen=True, kw_only=True)
class GradedRollouts:
    """One prompt's rollouts with their grades and rewards, in the engine's order."""

    prompt: Prompt
    prefix: tuple[int, ...] = ()
    """Token ids with which every answer begins. They are not part of ``rollouts``."""
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    """The whole answers, including the prefix."""
    grades: tuple[Grade, ...]
    rewards: tuple[float | None, ...]
    """The weighted sum of the reward's terms, changed by the rules for form and length. None if the grading failed."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """One prompt's rollouts with their rewards and group advantages."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]

    @property
    def has_equal_rewards(self) -> bool:
        return min(self.rewards) == max(self.rewards)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokens of a sample that one term of the objective trains."""

    term: str
    positions: np.ndarray
    """[K] int64, ascending: indices of the sample's tokens. Never 0, because nothing predicts the first token."""
    constants: Mapping[str, float | np.ndarray] = field(default_factory=dict[str, "float | np.ndarray"])
    """The constants that the term reads, by name: [K] float32, or one number for all tokens."""

    def __post_init__(self) -> None:
        assert len(self.positions) == 0 or self.positions[0] > 0
        assert all(np.shape(value) in ((), self.positions.shape) for value in self.constants.values())


@dataclass(frozen=True, kw_only=True)
class TrainSample:
    """A sequence to train on. No token is in two of its parts."""

    token_ids: np.ndarray
    """[N] int64"""
    parts: tuple[Part, ...]
    routes: Routes | None = None
    """[R, layers, k] uint8 or uint16, R <= N, in memory or still on a rollout server: the k experts that the rollout
    engine chose for each of the first R tokens, in every layer of the model. The routers choose the experts of the
    other tokens. None: the routers choose the experts of all tokens."""
    teacher_ids: np.ndarray | None = None
    """[M] int64: another prompt with the same answer; None if the sample has no teacher. It ends with the tokens of
    ``token_ids`` from the first trained token on. The log-probs of its trained tokens are the column
    ``teacher_logprob`` (``losses.terms.Term.scored``)."""

    def __post_init__(self) -> None:
        assert self.routes is None or len(self.routes) <= len(self.token_ids)
