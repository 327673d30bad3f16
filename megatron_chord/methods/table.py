"""The table of methods, by the value of ``method.name`` in a run's YAML."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_chord.config import RunConfig
from megatron_chord.config_methods import MethodConfig
from megatron_chord.methods.base import Method
from megatron_chord.methods.chord import Chord
from megatron_chord.methods.dpo import MixedDPO
from megatron_chord.methods.dypo import DYPO
from megatron_chord.methods.ghpo import GHPO
from megatron_chord.methods.hpt import HPT
from megatron_chord.methods.luffy import Luffy
from megatron_chord.methods.prefix_rft import PrefixRFT
from megatron_chord.methods.relift import ReLIFT
from megatron_chord.methods.remix import ReMix
from megatron_chord.methods.rl_plus import RLPlus
from megatron_chord.methods.self_distillation import SelfDistillation
from megatron_chord.methods.srft import SRFT
from megatron_chord.methods.trapo import TRAPO

METHODS: dict[str, type[Method]] = {
    "chord": Chord,
    "luffy": Luffy,
    "rl_plus": RLPlus,
    "srft": SRFT,
    "dpo": MixedDPO,
    "remix": ReMix,
    "prefix_rft": PrefixRFT,
    "ghpo": GHPO,
    "hpt": HPT,
    "relift": ReLIFT,
    "self_distillation": SelfDistillation,
    "trapo": TRAPO,
    "dypo": DYPO,
}


def method_of(run: RunConfig) -> Method:
    """Build the run's method and check its settings against the rest of the run.

    Raises:
        ValueError: settings that contradict each other.
    """
    method = build(run.method)
    _check(method, run)
    return method


def build(settings: MethodConfig) -> Method:
    """Build the method with its settings, without a check against the rest of a run."""
    return METHODS[settings.name](settings=settings)


def _check(method: Method, run: RunConfig) -> None:
    """Check the rules that hold for every method, then those of the method."""
    rules = (*_rules_of_objective(method, run), *_rules_of_data(method, run), *_rules_of_rollout(method, run))
    for is_broken, reason in rules:
        if is_broken:
            raise ValueError(reason)
    method.check(run)


def _rules_of_objective(method: Method, run: RunConfig) -> Iterator[tuple[bool, str]]:
    """Yield (whether the rule is broken, the message) for each rule."""
    objective, batch = run.objective, run.batch
    yield (
        objective.ratio_from == "current"
        and objective.surrogate != "unclipped"
        and batch.updates_per_step * batch.epochs > 1,
        "objective.ratio_from: current makes every ratio 1, also in the later updates of a step; if "
        "batch.updates_per_step or batch.epochs is above 1, set it to rollout or recomputed",
    )


def _rules_of_data(method: Method, run: RunConfig) -> Iterator[tuple[bool, str]]:
    """Yield (whether the rule is broken, the message) for each rule."""
    batch, data = run.batch, run.data
    yield (
        method.uses_own_demonstrations and not data.aligned,
        f"method {method.name} needs every prompt's own demonstration: set data.aligned: true, and give "
        "data.demonstrations that answer the problems of data.prompts",
    )
    yield (
        data.aligned and not (method.uses_own_demonstrations or method.draws_demonstrations),
        f"data.aligned: method {method.name} uses no demonstrations; leave it out",
    )
    yield data.aligned and data.demonstrations is None, "data.aligned needs data.demonstrations"
    yield (
        not method.draws_demonstrations and batch.demonstrations > 0,
        f"batch.demonstrations is {batch.demonstrations}, but method {method.name} uses only the demonstrations of "
        "its prompts; set it to 0",
    )
    for name, count in {
        "batch.demonstrations": batch.demonstrations,
        "batch.prompts x batch.rollouts": batch.prompts * batch.rollouts,
    }.items():
        yield (
            0 < count < batch.updates_per_step,
            f"{name} is {count}, which is less than batch.updates_per_step {batch.updates_per_step}: some updates "
            "would have none",
        )
    yield (
        batch.sampling_attempts > 1 and batch.prompts == 0,
        "batch.sampling_attempts is above 1, but batch.prompts is 0: nothing is sampled",
    )


def _rules_of_rollout(method: Method, run: RunConfig) -> Iterator[tuple[bool, str]]:
    """Yield (whether the rule is broken, the message) for each rule."""
    schedule = method.schedule()
    if run.rollout.asynchronous is not None:
        yield (
            schedule is not None and schedule.needs_last_step,
            f"rollout.asynchronous: method.mu {schedule and schedule.schedule!r} depends on the result of the previous "
            "step, but rollouts are sampled before that step ends; leave it out, or choose another schedule",
        )
        yield (
            not method.uses_rollouts(run.batch),
            "rollout.asynchronous: this run samples nothing; leave it out",
        )
    yield (
        run.rollout.partial is not None and not method.uses_rollouts(run.batch),
        "rollout.partial: this run samples nothing; leave it out",
    )
