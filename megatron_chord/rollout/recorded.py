"""What was sampled and graded, as plain JSON: rollouts sampled ahead of their step live through a checkpoint.

A method's ``collect`` is a function of its draws and of the answers to them, so the answers alone are kept: the resumed
run collects the step again from them, bit for bit (JSON keeps every float64), on any layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_chord.records import Rollout
from megatron_chord.rewards.pool import Grade
from megatron_chord.rollout.collect import Ask, GradedRollouts, Sampling


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call for answers."""

    sampling: Sampling | None
    """None: the answers were given, and only graded."""
    graded: Sequence[GradedRollouts]


def to_json(call: Call) -> dict[str, Any]:
    return {
        "sampling": _sampling_json(call.sampling),
        "answers": [
            {
                "prompt": item.prompt.id,
                "prefix": list(item.prefix),
                "rollouts": [asdict(rollout) for rollout in item.rollouts],
                "grades": [asdict(grade) for grade in item.grades],
            }
            for item in call.graded
        ],
    }


def answers_to(
    asks: Sequence[Ask], sampling: Sampling | None, recorded: Mapping[str, Any]
) -> tuple[list[tuple[Rollout, ...]], list[Grade]]:
    """The rollouts of every ask, and the grades of all of them in order, from what ``to_json`` wrote.

    Raises:
        ValueError: something else was asked then.
    """
    then = recorded["sampling"]
    now = _sampling_json(sampling)
    if then != now:
        raise ValueError(f"answers were sampled with {then}, and are wanted with {now}")
    asked = [(answer["prompt"], answer["prefix"]) for answer in recorded["answers"]]
    wanted = [(ask.prompt.id, list(ask.prefix)) for ask in asks]
    if asked != wanted and [name for name, _ in asked] == [name for name, _ in wanted]:
        raise ValueError(f"answers to the prompts {_names(asked)} were sampled with other beginnings")
    if asked != wanted:
        raise ValueError(
            f"answers to the prompts {_names(asked)} were sampled, and those to {_names(wanted)} are wanted"
        )
    sampled = [tuple(_rollout(row) for row in answer["rollouts"]) for answer in recorded["answers"]]
    return sampled, [Grade(**grade) for answer in recorded["answers"] for grade in answer["grades"]]


def _rollout(row: Mapping[str, Any]) -> Rollout:
    return Rollout(**{**row, "token_ids": tuple(row["token_ids"]), "logprobs": tuple(row["logprobs"])})


def _sampling_json(sampling: Sampling | None) -> dict[str, Any] | None:
    return None if sampling is None else asdict(sampling) | {"stop_token_ids": list(sampling.stop_token_ids)}


def _names(asked: Sequence[tuple[str, list[int]]]) -> str:
    shown = ", ".join(name for name, _ in asked[:4])
    return f"{shown}, ... ({len(asked)})" if len(asked) > 4 else shown
