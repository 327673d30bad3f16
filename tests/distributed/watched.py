"""One step of any method for tests that watch its calls (``tests.support.watch``): its samples and its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_chord.config import ParallelConfig, RunConfig
from megatron_chord.config_io import load_config
from megatron_chord.data.packing import plan_step
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.methods.table import method_of
from megatron_chord.records import Part, TrainSample
from megatron_chord.train.coordinator import StepInputs
from megatron_chord.train.learned_mu import MuGradient
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.state import TrainState
from megatron_chord.train.step import train_step
from megatron_chord.train.update import Update
from tests.support.ranks import ROOT
from tests.support.watch import Watch

PRESETS = {
    path.stem: path
    for path in sorted((ROOT / "examples" / "methods").glob("*.yaml"))
    if path.stem not in ("common", "aligned")
}
MICRO_BATCHES = 3
"""The number of micro-batches of each data-parallel rank."""
LENGTH = 16
"""Tokens of a sample. A micro-batch has two samples."""
TRAINED = 3
"""Tokens of a sample that each term trains."""


def preset(path: Path) -> RunConfig:
    """Load a preset. Set one update a step, and remove the limits on log-prob gaps, because rollouts and policy are
    random."""
    run = load_config(path)
    return replace(
        run,
        batch=replace(run.batch, updates_per_step=1, epochs=1),
        rollout=replace(run.rollout, max_logprob_gap=1e9, max_probability_error=1e9),
    )


def samples_of(names: Sequence[str], num_samples: int, *, has_teacher: bool) -> list[TrainSample]:
    """Random samples. Each has a part of every term and every constant that any term reads.

    Only rollout parts get rollout log-probs, because a term that has them is compared with the engine.
    """
    rng = np.random.default_rng(0)
    samples = []
    for index in range(num_samples):
        constants = {
            "advantage": 1.0,
            "stale_logprob": np.full(TRAINED, -2.0, np.float32),
            "sign": 1.0 if index % 2 == 0 else -1.0,
            "is_rollout": 1.0,
            "pair": float(index // 2),
            "age": 1.0,
            "taught": 1.0,
            "group": float(index // 2 % 8),
            "member": float(index % 2),
        }
        sampled = {"rollout_logprob": np.full(TRAINED, -2.0, np.float32)}
        parts = tuple(
            Part(
                term=name,
                positions=np.arange(start, start + TRAINED),
                constants=constants | (sampled if name in ("policy", "dpo") else {}),
            )
            for name, start in zip(names, range(4, LENGTH, TRAINED), strict=False)
        )
        token_ids = rng.integers(3, 200, LENGTH)
        # The first two tokens are the prompt of a sample that has a teacher; the teacher's prompt has two others.
        teacher_ids = np.array([7, 8, *token_ids[2:]]) if has_teacher else None
        samples.append(TrainSample(token_ids=token_ids, parts=parts, teacher_ids=teacher_ids))
    return samples


def watched_step(run: RunConfig, state: TrainState, parallel: ParallelConfig) -> Watch:
    """Train one step of ``run``'s method with ``train_step`` and watch it."""
    method = method_of(run)
    terms = method.terms(run.resolved_objective(), run.batch)
    has_teacher = any("teacher_logprob" in term.scored for term in terms.values())
    samples = samples_of(list(terms), 2 * MICRO_BATCHES * state.groups.data.size, has_teacher=has_teacher)
    plan = plan_step(
        with_scales(samples, terms),
        max_tokens=2 * LENGTH,
        layout=packing_layout(state.shape, parallel, state.groups.data.size),
        pad_id=0,
    )
    mine = plan.micro_batches[state.groups.data.rank]
    assert len(mine) == MICRO_BATCHES
    inputs = StepInputs(
        updates=(Update(weights=dict.fromkeys(terms, 0.5), counts=plan.counts),),
        mu=0.5,
        stats={},
        seconds={},
        weight_version=0,
        num_tokens=1,
        squared_tokens=1,
    )
    schedule = method.schedule()
    mu_gradient = MuGradient() if schedule is not None and schedule.needs_mu_gradient else None
    with Watch() as watch:
        train_step(run, state, terms, inputs, [mine], step=0, mu_gradient=mu_gradient)
    return watch
