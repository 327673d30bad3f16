"""The kinds of reward. A new kind is one file in ``rewards/kinds`` and one entry in ``TermConfig``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from megatron_chord.config_checks import require
from megatron_chord.rewards.kinds.base import RewardKind, WholeReward
from megatron_chord.rewards.kinds.exact import ExactReward
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward
from megatron_chord.rewards.response import RowNeeds

TermConfig = MathReward | ExactReward | ToolCallsReward | FunctionReward
"""Every kind of reward, chosen by ``kind``; the first is the default."""

KINDS: dict[str, type[RewardKind]] = {member.kind: member for member in get_args(TermConfig)}


@dataclass(frozen=True, kw_only=True)
class SumReward(WholeReward):
    """The weighted sum of several rewards. A list of them in place of the block means the same."""

    kind: Literal["sum"] = "sum"
    terms: tuple[TermConfig, ...] = field(metadata={"from_list": True})
    """The rewards that are added, each a block as `reward` itself, with its weight. The first one that grades a prompt
    decides whether an answer is right. Evaluations, dynamic sampling, GHPO, HPT, ReLIFT and TRAPO use only its score
    for their decisions. Advantages and other methods use the total reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.terms) > 0, "reward.terms lists no reward")
        whole = WholeReward()
        for term in self.terms:
            require(
                (term.overlong, term.max_error_rate) == (whole.overlong, whole.max_error_rate),
                "reward.overlong and reward.max_error_rate hold for all terms together: write reward: {kind: sum, "
                "terms: [...], overlong: ..., max_error_rate: ...}",
            )


RewardConfig = TermConfig | SumReward
"""The block ``reward``."""


def terms_of(reward: RewardConfig) -> dict[str, RewardKind]:
    """The single rewards that ``reward`` consists of, by their names in the metrics.

    A name is a term's label. The second term with a label gets ``_2``, the third ``_3``; a number is left out where the
    name with it is another term's label.
    """
    terms: Sequence[RewardKind] = reward.terms if isinstance(reward, SumReward) else (reward,)
    labels = {term.label for term in terms}
    named: dict[str, RewardKind] = {}
    for term in terms:
        numbers = (f"{term.label}_{number}" for number in itertools.count(2))
        free = (name for name in numbers if name not in labels and name not in named)
        named[next(free) if term.label in named else term.label] = term
    return named


def needs_of(reward: RewardConfig, source: str) -> RowNeeds:
    """What the rewards read of the rows of a data source."""
    needs = [term.NEEDS for term in terms_of(reward).values() if term.grades(source)]
    return RowNeeds(truth=any(need.truth for need in needs), fields=any(need.fields for need in needs))


def check_sources(reward: RewardConfig, sources: Iterable[str]) -> None:
    """Raise ValueError if a data source has no reward, or if a reward names a source that the run does not have."""
    terms, known = terms_of(reward).values(), set(sources)
    unknown = sorted({name for term in terms for name in term.sources} - known)
    listed = ", ".join(sorted(name or "(without a name)" for name in known))
    require(
        not unknown,
        f"reward.sources: no data source is called {', '.join(unknown)}; the data sources are: {listed}",
    )
    ungraded = sorted(source for source in known if not any(term.grades(source) for term in terms))
    require(not ungraded, f"reward.sources: nothing grades the prompts of {', '.join(ungraded)}")


def to_json(reward: RewardKind) -> dict[str, Any]:
    """The data about a reward that a grader process needs, as JSON."""
    others = {field.name for field in dataclasses.fields(WholeReward)}
    values = {field.name: getattr(reward, field.name) for field in dataclasses.fields(reward)}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if name not in others
    }


def from_json(settings: Mapping[str, Any]) -> RewardKind:
    """The reward that ``to_json`` wrote, without the settings that hold for the reward as a whole."""
    kind = KINDS[settings["kind"]]
    hints = get_type_hints(kind)

    def typed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return Path(value) if hints[name] is Path else value

    return kind(**{name: typed(name, value) for name, value in settings.items()})
