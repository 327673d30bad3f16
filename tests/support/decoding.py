"""A rollout client whose engine writes one token of every answer at a time. A test gives the length of each answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_chord.records import Rollout
from megatron_chord.rollout.client import Stop
from megatron_chord.rollout.replies import GenerateRequest

END = 2
"""The stop token."""


class DecodingClient:
    """A prompt is one token, the key to ``lengths``: the length of each of its answers, with END.

    Answer j is 10 + j, then 50, 50, ..., then END. A token's log-prob is -(version + place / 1000), so it tells which
    version sampled the token and at which place of the answer.
    """

    def __init__(self, lengths: Mapping[int, Sequence[int]]) -> None:
        self._lengths = lengths
        self.asked: list[GenerateRequest] = []

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        version: int,
        deadline_s: float,
        may_advance: bool = False,
        on_answer: Callable[[int, tuple[Rollout, ...]], None] | None = None,
        stop: Stop | None = None,
    ) -> list[tuple[Rollout, ...]]:
        self.asked += requests
        told: list[bool] = []
        if stop is not None:
            stop.listen(lambda: told.append(True))
        answers = [
            [_Answer(self._lengths, request, sample) for sample in range(request.num_rollouts)]
            for request in requests
        ]
        running = set(range(len(requests)))
        while running and not told:
            for index in running:
                for answer in answers[index]:
                    answer.write()
            for index in [index for index in running if all(answer.reason for answer in answers[index])]:
                running.remove(index)
                if on_answer is not None:
                    on_answer(index, self._rollouts(requests[index], answers[index], version))
        return [
            self._rollouts(request, group, version) for request, group in zip(requests, answers, strict=True)
        ]

    def cancel(self) -> None:
        """Do nothing, because its calls of ``generate`` do not wait."""

    def _rollouts(
        self, request: GenerateRequest, answers: Sequence[_Answer], version: int
    ) -> tuple[Rollout, ...]:
        return tuple(answer.rollout(version) for answer in answers)


class _Answer:
    def __init__(self, lengths: Mapping[int, Sequence[int]], request: GenerateRequest, sample: int) -> None:
        prompt, *before = request.prompt_ids
        assert not before or request.num_rollouts == 1
        self._sample = before[0] - 10 if before else sample
        self._begun = len(before)
        self._length = lengths[prompt][self._sample]
        self._limit = request.max_tokens
        self._tokens: list[int] = []
        self.reason = ""

    def write(self) -> None:
        if self.reason:
            return
        place = self._begun + len(self._tokens)
        token = END if place + 1 == self._length else 50 if place else 10 + self._sample
        self._tokens.append(token)
        self.reason = "stop" if token == END else "length" if len(self._tokens) == self._limit else ""

    def rollout(self, version: int) -> Rollout:
        return Rollout(
            token_ids=tuple(self._tokens),
            logprobs=tuple(-(version + (self._begun + i) / 1000) for i in range(len(self._tokens))),
            finish_reason=self.reason or "abort",  # type: ignore[arg-type]
            weight_version=version,
        )
