"""The two branches' gradients are measured apart. Mixed, they are the step's gradient; mu's slope is the float64
cosine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config_methods import SimpleWeight
from megatron_chord.data.packing import plan_step
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.train.learned_mu import MuGradient
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.update import Update, prepare_batches
from tests.distributed.splits import assert_same_update
from tests.distributed.steps import build, gather_hf
from tests.support.oracle import oracle_update
from tests.support.oracle_terms import policy_term, sft_term
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, save_qwen2, terms_of, tiny_run

WEIGHTS = {"policy": 0.7, "sft": 0.3}
LAYOUTS = [{"tensor": 2}, {"pipeline": 2}, {}, {"context": 2}]


def two_steps(folder: Path, layouts: list[dict[str, int]]) -> list[Any]:
    """Measure twice on the same weights, for each layout. Return metrics and gradients of the second, and both
    slopes."""
    results = []
    for layout in layouts:
        run = tiny_run(folder, parallel={"distributed_optimizer": False, **layout}, max_tokens=30)
        terms = terms_of(run)
        state = build(folder, run.parallel)
        measure, slopes = MuGradient(), []
        for seed in (0, 1):
            plan = plan_step(
                with_scales(make_samples(seed=seed), terms),
                max_tokens=run.batch.max_tokens_per_gpu,
                layout=packing_layout(state.shape, run.parallel, state.groups.data.size),
                pad_id=0,
            )
            mine = plan.micro_batches[state.groups.data.rank]
            batches = prepare_batches(state, mine, terms, temperature=1.0)
            update = Update(weights=WEIGHTS, counts=plan.counts)
            result = measure.compute(state, batches, update, terms, temperature=1.0).result
            slopes.append(result.means.pop("mu_gradient"))
        grads = {name: parameter.main_grad for name, parameter in state.parameters().items()}
        metrics = {"loss": result.loss, **result.means}
        results.append((metrics, gather_hf(state, grads), slopes))
    return results


@pytest.mark.parametrize("tied", [False, True])
def test_mixture_and_slope(tmp_path: Path, tied: bool) -> None:
    folder = save_qwen2(tmp_path, tied=tied)
    run = tiny_run(folder)
    terms = {"policy": policy_term(run.objective), "sft": sft_term(SimpleWeight(kind="phi"))}

    def reference(seed: int, **weights: float) -> Any:
        return oracle_update(folder, make_samples(seed=seed), terms, {"policy": 0.0, "sft": 0.0, **weights})

    def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([gradients[name].flatten() for name in sorted(gradients)])

    policy, demonstration = (flat(reference(0, **{branch: 1.0})[1]) for branch in WEIGHTS)
    next_policy = flat(reference(1, policy=1.0)[1])
    slope = -torch.cosine_similarity(next_policy, policy - demonstration, dim=0).item()
    expected = reference(1, **WEIGHTS)
    for results in run_ranks(two_steps, 2, folder, LAYOUTS):
        for layout, (metrics, grads, slopes) in zip(LAYOUTS, results, strict=True):
            assert_same_update((metrics, grads), expected, str(layout))
            assert slopes[0] == 0.0
            assert slopes[1] == pytest.approx(slope, abs=1e-5), str(layout)
