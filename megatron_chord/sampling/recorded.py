"""Sampled and graded rollouts as plain JSON, so that a checkpoint can save rollouts that were sampled ahead of a step.

A method's ``collect`` is a function of its draws and of the sampled answers. So a checkpoint saves only the answers.
The resumed run calls ``collect`` again with them and gets the same samples, bit for bit (JSON keeps every float64), on
any parallel layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_chord.records import Grade, Rollout, RolloutRequest
from megatron_chord.sampling.rounds import Sampling


@dataclass(frozen=True, kw_only=True)
class SamplingRound:
    """The requests of one sampling call, with the sampled rollouts and their grades."""

    sampling: Sampling | None
    """None if the answers were given (demonstrations) and only graded."""
    requests: Sequence[RolloutRequest]
    sampled: Sequence[tuple[Rollout, ...]]
    grades: Sequence[tuple[Grade, ...]]
    """The grades of each request's rollouts. Empty for a request whose sampling was stopped."""


def to_json(sampled_round: SamplingRound) -> dict[str, Any]:
    return {
        "sampling": _sampling_json(sampled_round.sampling),
        "answers": [
            {
                "prompt": request.prompt.id,
                "prefix": list(request.prefix),
                "rollouts": list(map(rollout_json, rollouts)),
                "grades": [asdict(grade) for grade in grades],
            }
            for request, rollouts, grades in zip(
                sampled_round.requests, sampled_round.sampled, sampled_round.grades, strict=True
            )
        ],
    }


def answers_to(
    requests: Sequence[RolloutRequest], sampling: Sampling | None, recorded: Mapping[str, Any]
) -> tuple[list[tuple[Rollout, ...]], list[tuple[Grade, ...]]]:
    """The rollouts and grades of every request, from JSON that ``to_json`` wrote.

    Raises:
        ValueError: the recorded requests or sampling settings differ from those given.
    """
    then = recorded["sampling"]
    now = _sampling_json(sampling)
    if then != now:
        raise ValueError(f"recorded answers were sampled with {then}, but {now} is requested")
    asked = [(answer["prompt"], answer["prefix"]) for answer in recorded["answers"]]
    wanted = [(request.prompt.id, list(request.prefix)) for request in requests]
    if asked != wanted and [name for name, _ in asked] == [name for name, _ in wanted]:
        raise ValueError(f"recorded answers to the prompts {_names(asked)} were sampled with other prefixes")
    if asked != wanted:
        raise ValueError(
            f"answers to the prompts {_names(asked)} were recorded, but those to {_names(wanted)} are requested"
        )
    answers = recorded["answers"]
    return (
        [tuple(rollout_of(row) for row in answer["rollouts"]) for answer in answers],
        [tuple(Grade(**grade) for grade in answer["grades"]) for answer in answers],
    )


def rollout_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain JSON, but for its ``routes``: an array, which a checkpoint saves in a file of its own."""
    row = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    return row if rollout.routes is not None else {name: row[name] for name in row if name != "routes"}


def rollout_of(row: Mapping[str, Any]) -> Rollout:
    """The rollout that ``rollout_json`` wrote."""
    spans = tuple((version, count) for version, count in row.get("spans", ()))
    return Rollout(
        **{
            **row,
            "token_ids": tuple(row["token_ids"]),
            "logprobs": tuple(row["logprobs"]),
            "spans": spans,
        }
    )


def _sampling_json(sampling: Sampling | None) -> dict[str, Any] | None:
    """The settings that must be equal when answers are used again. Those of routes are not: they change no token."""
    if sampling is None:
        return None
    settings = asdict(sampling) | {"stop_token_ids": list(sampling.stop_token_ids)}
    del settings["routes"], settings["step"]
    return settings


def _names(asked: Sequence[tuple[str, list[int]]]) -> str:
    shown = ", ".join(name for name, _ in asked[:4])
    return f"{shown}, ... ({len(asked)})" if len(asked) > 4 else shown
