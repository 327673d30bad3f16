"""A ``StepContext`` whose answers a test writes down, and helpers for what the answers contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from megatron_chord.config import BatchConfig, DataConfig, ObjectiveConfig, RunConfig
from megatron_chord.records import Grade, GradedRollouts, Prompt, Rollout
from megatron_chord.sampling.context import DrawnPrompt
from megatron_chord.schedules import ScheduleInput

Score = float | None


def prompt(name: str, *, tokens: Sequence[int] = (5, 6), text: str = "?") -> Prompt:
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": text})
    return Prompt(id=name, messages=messages, truth="", token_ids=tuple(tokens))


def graded(
    of: Prompt, scores: Sequence[Score], *, prefix: tuple[int, ...] = (), finish_reason: Any = "stop"
) -> GradedRollouts:
    """Return answers of two tokens (20 and 21, 30 and 31, ...) whose rewards are the scores."""
    rollouts = tuple(
        Rollout(
            token_ids=(20 + 10 * i, 21 + 10 * i),
            logprobs=(-0.5, -1.0 - i),
            finish_reason=finish_reason,
            weight_version=0,
        )
        for i in range(len(scores))
    )
    return GradedRollouts(
        prompt=of,
        prefix=prefix,
        rollouts=rollouts,
        texts=("",) * len(scores),
        grades=tuple(Grade(score, "timeout" if score is None else None) for score in scores),
        rewards=tuple(scores),
    )


@dataclass(kw_only=True)
class ScriptedContext:
    """Everything that a method may ask for in a step."""

    run: RunConfig
    scores: Mapping[tuple[str, str], Sequence[Score]]
    """The scores of the rollouts, by attempt and prompt id."""
    demonstrations: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    step: int = 0
    template: Any = None
    asked: list[tuple[str, Sequence[DrawnPrompt], int]] = field(
        default_factory=list[tuple[str, Sequence[DrawnPrompt], int]]
    )
    """The attempt, the prompts and the number of rollouts of every call of ``rollouts``."""

    @property
    def batch(self) -> BatchConfig:
        return self.run.batch

    @property
    def data(self) -> DataConfig:
        return self.run.data

    @property
    def objective(self) -> ObjectiveConfig:
        return self.run.objective

    @property
    def seed(self) -> int:
        return self.run.seed

    @property
    def num_steps(self) -> int:
        return self.run.steps

    @property
    def now(self) -> ScheduleInput:
        return ScheduleInput(step=self.step)

    def prompts(self, count: int) -> list[DrawnPrompt]:
        names = list(dict.fromkeys(name for _, name in self.scores))
        return [DrawnPrompt(prompt=prompt(names[i]), position=100 + i) for i in range(count)]

    def demonstration(self, of: Prompt) -> tuple[int, ...]:
        return self.demonstrations[of.id]

    def groups(self, count: int, *, num_rollouts: int) -> list[tuple[DrawnPrompt, GradedRollouts]]:
        drawn = self.prompts(count)
        return list(zip(drawn, self.rollouts(drawn, num_rollouts=num_rollouts), strict=True))

    def rollouts(
        self,
        drawn: Sequence[DrawnPrompt],
        *,
        num_rollouts: int,
        attempt: str = "",
        prefixes: Sequence[tuple[int, ...]] | None = None,
    ) -> list[GradedRollouts]:
        self.asked.append((attempt, drawn, num_rollouts))
        found = [
            graded(item.prompt, self.scores[attempt, item.prompt.id], prefix=prefixes[i] if prefixes else ())
            for i, item in enumerate(drawn)
        ]
        assert all(len(item.rollouts) == num_rollouts for item in found)
        return found


class WordTemplate(SimpleNamespace):
    """A template whose tokens are the characters of all messages in order."""

    def prompt_ids(self, messages: Sequence[Mapping[str, str]], *, tools: Sequence[Any]) -> tuple[int, ...]:
        return tuple(ord(letter) for message in messages for letter in message["content"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode the tokens. The stop token 0 is left out."""
        return "".join(chr(token) for token in token_ids if token)
