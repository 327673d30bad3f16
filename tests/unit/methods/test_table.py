"""Methods by name: settings that do not fit are refused with the reason, and every method has the whole interface."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megatron_chord.config import (
    AsynchronousConfig,
    CorrectionConfig,
    KLConfig,
    PartialConfig,
    RunConfig,
)
from megatron_chord.config_io import ConfigError, load_config
from megatron_chord.config_methods import MethodConfig, SimpleWeight
from megatron_chord.losses.terms import empty_output
from megatron_chord.methods.table import METHODS, build, method_of
from megatron_chord.precision import Precision
from megatron_chord.schedules import Binary, Constant, GradientNorm, Learned, NoiseAware
from tests.support.ranks import ROOT
from tests.support.tiny import terms_of, tiny_run

FILES = sorted((ROOT / "examples" / "methods").glob("*.yaml"))
PUBLISHED = sorted((ROOT / "examples" / "published").glob("*.yaml"))


def changed(run: RunConfig, **blocks: dict[str, Any]) -> RunConfig:
    return replace(run, **{name: replace(getattr(run, name), **fields) for name, fields in blocks.items()})


def test_every_method_of_the_settings_has_its_class() -> None:
    settings = {kind.name: kind for kind in get_args(MethodConfig)}
    assert set(METHODS) == set(settings)
    for name, kind in METHODS.items():
        assert get_type_hints(kind)["settings"] is settings[name]
        assert build(settings[name]()) == kind()
        assert kind().name == name


@pytest.mark.parametrize(
    ("method", "blocks", "reason"),
    [
        ("luffy", {}, "luffy needs every prompt's own demonstration: set data.aligned: true"),
        (
            "chord",
            {"data": {"demonstrations": None}},
            "mu can be above 0 but data.demonstrations is not given",
        ),
        ("chord", {"batch": {"demonstrations": 0}}, "mu can be above 0 but batch.demonstrations is 0"),
        ("chord", {"batch": {"prompts": 0}}, "mu can be below 1 but batch.prompts is 0"),
        ("chord", {"data": {"aligned": True}}, "a step's demonstrations are those of its prompts"),
        (
            "chord",
            {"batch": {"updates_per_step": 6}},
            r"batch\.demonstrations is 5, which is less than batch\.updates_per_step 6",
        ),
        (
            "ghpo",
            {"data": {"aligned": True}, "batch": {"demonstrations": 3}},
            "uses only the demonstrations of its prompts",
        ),
        (
            "chord",
            {"data": {"aligned": True, "demonstrations": None}},
            "data.aligned needs data.demonstrations",
        ),
        ("remix", {"data": {"aligned": True}}, "method remix uses no demonstrations"),
        (
            "chord",
            {"objective": {"ratio_from": "current"}, "batch": {"epochs": 2}},
            "current makes every ratio 1",
        ),
        (
            "chord",
            {"method": {"mu": Constant(peak=1.0)}, "objective": {"kl": KLConfig()}},
            "mu is 1 in every step",
        ),
        (
            "chord",
            {"method": {"mu": Learned(rate=0.1)}},
            "needs the full gradient on every rank: set parallel.distributed_optimizer: false",
        ),
        (
            "chord",
            {"method": {"mu": NoiseAware(), "token_weight": SimpleWeight(kind="p")}},
            "compares the two branches with token_weight phi or one, got p",
        ),
        (
            "chord",
            {"method": {"mu": Binary(switch_step=8, reset_optimizer=True)}, "optim": {"warmup_steps": 3}},
            "no step with the full learning rate after the optimizer's reset at step 8 of 10",
        ),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, method: str, blocks: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        method_of(changed(tiny_run(tmp_path, method=method), **blocks))


def test_dynamic_sampling_with_a_group_of_one(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    with pytest.raises(
        ValueError, match=r"batch\.rollouts must be >= 2, got 1: in a group of one all rewards"
    ):
        replace(run.batch, rollouts=1, sampling_attempts=3)


def test_the_same_mismatch_is_not_corrected_twice(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"base: {FILES[0].parent / 'grpo.yaml'}\nobjective:\n  correction: {{level: token}}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:3: objective\.correction and ratio_from: rollout"):
        load_config(file)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_owes_the_loop(tmp_path: Path, name: str) -> None:
    aligned = METHODS[name].needs_demonstrations
    run = changed(tiny_run(tmp_path, method=name), data={"aligned": aligned}, batch={"rollouts": 8})
    method = method_of(run)
    outputs = [empty_output(term) for term in terms_of(run).values()]
    names = Counter(key for output in outputs for key in (*output.losses, *output.means, *output.maxima))
    assert max(names.values()) == 1, f"reported by two terms: {names.most_common(1)}"
    assert {"logprob_gap", "logprob_gap_max", "entropy"} <= names.keys()
    assert method.max_sampling_rounds(run.batch) >= 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_of_the_examples(file: Path) -> None:
    if file.stem == "aligned":
        with pytest.raises(ValueError, match=r"batch\.demonstrations is 0"):  # it names no method of its own
            method_of(load_config(file))
    else:
        method_of(load_config(file))


@pytest.mark.parametrize(
    ("method", "blocks", "reason"),
    [
        ("srft", {}, "srft has no importance ratio"),
        ("remix", {}, "remix itself mixes rollouts of older weights"),
        ("chord", {"method": {"mu": GradientNorm(warmup_steps=1)}}, "'gradient_norm' depends on"),
        ("chord", {"method": {"mu": Learned(entropy_rate=0.1, entropy_target=1.0)}}, "'learned' depends"),
        ("chord", {"method": {"mu": NoiseAware()}}, "'noise_aware' depends"),
        ("chord", {"method": {"mu": Constant(peak=1.0)}}, "this run samples nothing"),
    ],
)
def test_what_does_not_go_with_a_lag(
    tmp_path: Path, method: str, blocks: dict[str, Any], reason: str
) -> None:
    run = changed(tiny_run(tmp_path, method=method), rollout={"asynchronous": AsynchronousConfig()}, **blocks)
    if method == "srft":
        run = changed(run, data={"aligned": True})
    if method in ("srft", "remix"):
        run = changed(run, batch={"demonstrations": 0})
    with pytest.raises(ValueError, match=reason):
        method_of(run)
    assert method_of(changed(run, rollout={"asynchronous": None}))


@pytest.mark.parametrize(
    ("method", "blocks", "reason", "may_drop"),
    [
        ("srft", {}, "srft has no importance ratio", True),
        ("remix", {}, "remix itself mixes rollouts of older weights", True),
        ("chord", {"method": {"mu": Constant(peak=1.0)}}, "this run samples nothing", False),
    ],
)
def test_what_does_not_go_with_carried_answers(
    tmp_path: Path, method: str, blocks: dict[str, Any], reason: str, may_drop: bool
) -> None:
    run = changed(tiny_run(tmp_path, method=method), rollout={"partial": PartialConfig()}, **blocks)
    if method in ("srft", "remix"):
        run = changed(run, batch={"demonstrations": 0}, data={"aligned": method == "srft"})
    with pytest.raises(ValueError, match=reason):
        method_of(run)
    dropped = changed(run, rollout={"partial": PartialConfig(unfinished="drop")})
    if may_drop:
        assert method_of(dropped)
    else:
        with pytest.raises(ValueError, match=reason):
            method_of(dropped)


def test_rollouts_of_older_weights_are_corrected_for_unless_told_otherwise(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    default, off = CorrectionConfig(), CorrectionConfig(mode="none")
    own = CorrectionConfig(level="geometric", mode="mask", low=0.9, high=1.1)
    fresh: dict[str, Any] = {}
    lagging, carrying = {"asynchronous": AsynchronousConfig()}, {"partial": PartialConfig()}
    for rollout, ratio_from, given, used in (
        (fresh, "current", None, None),
        ({"partial": PartialConfig(unfinished="drop")}, "current", None, None),
        (lagging, "rollout", None, None),
        (lagging, "current", None, default),
        (lagging, "recomputed", None, default),
        (lagging, "current", own, own),
        (lagging, "current", off, off),
        (carrying, "rollout", None, None),
        (carrying, "current", None, default),
        (carrying, "current", off, off),
    ):
        asked = changed(run, rollout=rollout, objective={"ratio_from": ratio_from, "correction": given})
        assert asked.resolved_objective().correction == used


@pytest.mark.parametrize("precision", ["bf16", "fp8_rollout", "fp8_e2e", "fp8_tensorwise"])
def test_quantised_rollouts_are_corrected_for_unless_told_otherwise(
    tmp_path: Path, precision: Precision
) -> None:
    run = tiny_run(tmp_path)
    run = replace(run, model=replace(run.model, dtype="bf16"), precision=precision)
    current = changed(run, objective={"ratio_from": "current"})
    expected = (
        None if precision == "bf16" else CorrectionConfig(level="token", mode="truncate", low=0.0, high=2.0)
    )
    assert current.resolved_objective().correction == expected
    assert run.resolved_objective().correction is None, "the ratio does it"
