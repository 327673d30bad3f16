"""The methods by the name that ``method`` gives them in a run's YAML."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, get_type_hints

from megatron_chord.config import MethodConfig, RunConfig
from megatron_chord.methods.base import Method
from megatron_chord.methods.chord import Chord
from megatron_chord.methods.dpo import MixedDPO
from megatron_chord.methods.ghpo import GHPO
from megatron_chord.methods.hpt import HPT
from megatron_chord.methods.luffy import Luffy
from megatron_chord.methods.prefix_rft import PrefixRFT
from megatron_chord.methods.remix import ReMix
from megatron_chord.methods.rl_plus import RLPlus
from megatron_chord.methods.srft import SRFT

METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (Chord, Luffy, RLPlus, SRFT, MixedDPO, ReMix, PrefixRFT, GHPO, HPT)
}


def method_of(run: RunConfig) -> Method:
    """The run's method with its settings, checked against the rest of the run.

    Raises:
        ValueError: an unknown method or setting, or settings that do not go together.
    """
    method = build(run.method)
    _check(method, run)
    return method


def build(config: MethodConfig) -> Method:
    """The method with its own settings, unchecked against the rest of a run. ValueError as for ``method_of``."""
    kind = METHODS.get(config.name)
    if kind is None:
        raise ValueError(
            f"method: {config.name!r} is none of {', '.join(METHODS)}{_near(config.name, METHODS)}"
        )
    fields = {field.name: get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    for name in config.settings:
        if name not in fields:
            known = f"its settings are {', '.join(fields)}" if fields else "it has no settings"
            raise ValueError(f"method.{name}: unknown to {config.name}; {known}{_near(name, fields)}")
    values = {name: _typed(value, fields[name], name) for name, value in config.settings.items()}
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise ValueError(f"method {config.name} needs {', '.join(f'method.{name}' for name in missing)}")
    return kind(**values)


def _typed(value: Any, kind: type, name: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"method.{name}: expected {kind.__name__}, got {value!r}")
    return value


def _check(method: Method, run: RunConfig) -> None:
    """Rules that hold for every method, then the method's own."""
    objective, batch, data, default = run.objective, run.batch, run.data, type(run.objective)()
    if method.schedule(run) is None and objective.mu is not None:
        raise ValueError(f"objective.mu: method {method.name} does not mix by mu; leave it out")
    if not method.uses_expert_settings:
        for name in ("expert_weight", "expert_cutoff", "expert_aggregation"):
            if getattr(objective, name) != getattr(default, name):
                raise ValueError(f"objective.{name}: method {method.name} does not use it; leave it out")
    if method.needs_demonstrations and not data.aligned:
        raise ValueError(
            f"method {method.name} needs every prompt's own demonstration: set data.aligned: true, with "
            "data.experts that answer the problems of data.prompts"
        )
    if not method.draws_experts and batch.experts > 0:
        raise ValueError(
            f"batch.experts is {batch.experts}, but method {method.name} draws no demonstrations beside its prompts' "
            "own; set it to 0"
        )
    for name, count in {
        "batch.experts": batch.experts,
        "batch.prompts x batch.rollouts": batch.prompts * batch.rollouts,
    }.items():
        if 0 < count < batch.mini_batches:
            raise ValueError(
                f"{name} is {count}, fewer than batch.mini_batches {batch.mini_batches}: some updates would have none"
            )
    if batch.sampling_attempts > 1 and batch.prompts == 0:
        raise ValueError("batch.sampling_attempts is above 1, but batch.prompts is 0: nothing is sampled")
    if data.aligned and data.experts is None:
        raise ValueError("data.aligned needs data.experts")
    method.check(run)


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
