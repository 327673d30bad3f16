"""Compare an update that is split over ranks and micro-batches with the float64 oracle: its metrics and its
gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config import ParallelConfig, RunConfig
from megatron_chord.losses.noise import NoiseMeasurement
from megatron_chord.records import TrainSample
from tests.distributed import steps
from tests.support.oracle import OracleTerm, oracle_update
from tests.support.ranks import run_ranks

RELATIVE = 1e-5
ABSOLUTE = 1e-7
"""Absolute tolerance of a metric near 0."""

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "tp2": {"tensor": 2},
        "tp2_sp": {"tensor": 2, "sequence_parallel": True},
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
        "dp2": {},
        "dp2_reduced_after": {"overlap_grad_reduce": False},
        "cp2": {"context": 2},
    },
    4: {
        "tp2_pp2": {"tensor": 2, "pipeline": 2},
        "tp2_pp2_sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        "tp2_dp2": {"tensor": 2},
        "pp2_dp2": {"pipeline": 2},
        "tp2_cp2_sp": {"tensor": 2, "context": 2, "sequence_parallel": True},
        "pp2_vpp2_dp2": {"pipeline": 2, "virtual_pipeline": 2},
        "dp4": {},
    },
}
"""The layouts by number of ranks, then by name."""


def case(
    run: RunConfig, samples: Sequence[TrainSample], weights: Mapping[str, float], **extra: Any
) -> dict[str, Any]:
    """One case for ``steps.updates``. ``extra`` may hold the folders ``reference`` and ``old``, and ``noise``."""
    return {"run": run, "samples": list(samples), "weights": dict(weights), **extra}


def with_layout(run: RunConfig, parallel: Mapping[str, Any], max_tokens: int) -> RunConfig:
    return replace(
        run, parallel=ParallelConfig(**parallel), batch=replace(run.batch, max_tokens_per_gpu=max_tokens)
    )


def assert_same_update(
    result: Any, expected: Any, what: str, *, relative: float = RELATIVE, absolute: float = ABSOLUTE
) -> None:
    """Assert that every metric of the oracle and every gradient agrees. A rank without whole gradients returned None in
    their place.

    An error is compared with the parameter's largest gradient. A key's bias is compared with the query's: the same
    shift of all keys changes no softmax, so the terms of its gradient nearly cancel, and their rounding is large beside
    the sum.
    """
    (metrics, grads), (wanted, wanted_grads) = result, expected
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, rel=relative, abs=absolute), f"{what}: {name}"
    if grads is None:
        return
    assert grads.keys() == wanted_grads.keys(), what
    for name, grad in wanted_grads.items():
        terms = wanted_grads[name.replace("k_proj.bias", "q_proj.bias")]
        scale = max(grad.abs().max().item(), terms.abs().max().item())
        error = (grads[name].double() - grad).abs().max().item()
        assert error <= relative * scale + 1e-9, (
            f"{what}: gradient of {name} off by {error:.2e} of {scale:.2e}"
        )


def assert_split_invariant(
    model: Path,
    objectives: Mapping[
        str, tuple[RunConfig, Sequence[TrainSample], Mapping[str, float], Mapping[str, OracleTerm]]
    ],
    *,
    layouts: Mapping[int, Mapping[str, Mapping[str, Any]]],
    reference: Path | None = None,
    old: Path | None = None,
    noise: tuple[NoiseMeasurement, Mapping[str, float]] | None = None,
    relative: float = RELATIVE,
    absolute: float = ABSOLUTE,
) -> None:
    """Compare every objective in every layout with the oracle, once in one micro-batch a rank and once in many.

    Args:
        objectives: by name: the run, the samples of one update, the weights of the terms, and the oracle's terms.
        layouts: parallel settings by number of ranks and by name. Processes start once for each number of ranks.
        old: the folder of the policy before the step's first update. With it, the tested update is a later one.
        noise: what is measured in addition, and its result.
        absolute: absolute tolerance of a metric near 0.
    """
    expected = {
        name: oracle_update(
            model, samples, terms, weights, temperature=run.rollout.temperature, reference=reference, old=old
        )
        for name, (run, samples, weights, terms) in objectives.items()
    }
    for world_size, named in layouts.items():
        cases, names = [], []
        for layout, parallel in named.items():
            for name, (run, samples, weights, _) in objectives.items():
                for split, max_tokens in {"one": 10_000, "many": 30}.items():
                    whole = samples if split == "one" else samples[::-1]
                    run_here = with_layout(run, parallel, max_tokens)
                    extra = {"noise": noise[0]} if noise else {}
                    cases.append(case(run_here, whole, weights, reference=reference, old=old, **extra))
                    names.append((name, f"{name}/{layout}/{split}"))
        for rank, results in enumerate(run_ranks(steps.updates, world_size, model, cases, timeout_s=600)):
            for (name, what), result in zip(names, results, strict=True):
                assert (result[1] is None) == (rank > 0), what
                assert_same_update(result, expected[name], what, relative=relative, absolute=absolute)
                for number, value in (noise[1] if noise else {}).items():
                    assert result[0][number] == pytest.approx(value, rel=relative), f"{what}: {number}"


def total(grads: Mapping[str, torch.Tensor]) -> float:
    """Return the largest gradient entry. A test uses it to see that it does not compare zeros."""
    return max(grad.abs().max().item() for grad in grads.values())
