"""The names of metrics in trackers: each name begins with a group.

Trackers sort by name, so the groups with reward and accuracy come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_REWARD = {
    "reward_mean": "reward/mean",
    "reward_std": "reward/std",
    "equal_reward_groups": "reward/equal_groups",
    "equal_score_groups": "reward/equal_score_groups",
    "dropped_groups": "reward/dropped_groups",
    "grader_errors": "reward/grader_errors",
    "evaluation/accuracy": "reward/accuracy",
}
_SFT = ("mu", "token_weight", "demonstration_epochs", "num_sft_tokens")
_ROLLOUT = (
    "response_length",
    "truncated_fraction",
    "zero_advantage_tokens",
    "weight_version",
    "staleness_mean",
    "staleness_max",
    "mixed_rollouts",
    "sampling_rounds",
    "prompts_sampled",
    "continued_prompts",
    "unfinished_prompts",
    "unfinished_tokens",
    "logprob_gap",
    "logprob_gap_max",
    "probability_error",
    "compared_tokens",
)
_TIME = ("tokens_per_s", "tflops_per_gpu", "mfu", "gpus")
_STARTS = {
    "reward/": "reward/by_source",
    "accuracy/": "reward/accuracy_by_source",
    "reward_terms/": "reward/terms",
    "evaluation/": "reward/evaluation",
    "prompts/": "rollout/prompts_by_source",
    "seconds/": "time",
    "sft_": "sft",
}
"""For each beginning of a metric's name, the group that replaces it. Metrics that contain the names of sources or
terms, which users choose, have groups of their own."""


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a row of metrics except ``step``, by their names in trackers."""
    return {tag(name): value for name, value in scalars(row) if name != "step"}


def tag(name: str) -> str:
    """The name of a metric in trackers.

    Its group is reward, rollout, sft, time or, for the numbers of an update, update.
    """
    if name in _REWARD:
        return _REWARD[name]
    for start, group in _STARTS.items():
        if name.startswith(start):
            return f"{group}/{name.removeprefix(start)}"
    groups = {"sft": _SFT, "rollout": _ROLLOUT, "time": _TIME}
    group = next((group for group, names in groups.items() if name in names), "update")
    return f"{group}/{name}"


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) for all numbers of a row; ``block/name`` for numbers in a block."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in scalars(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
