"""CHORD's objective equals the oracle's in every layout, with every option of its policy and SFT branch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from megatron_chord.config import CorrectionConfig, KLConfig, ModelConfig, ObjectiveConfig
from megatron_chord.config_methods import (
    BernoulliEntropyWeight,
    ClippedISWeight,
    EntropyNormWeight,
    EntropyTopWeight,
    FocalWeight,
    MarginWeight,
    PowerWeight,
    SimpleWeight,
    TrustRegionWeight,
)
from megatron_chord.losses.noise import NUMBER, NoiseMeasurement
from megatron_chord.records import TrainSample
from tests.distributed import steps
from tests.distributed.splits import LAYOUTS, assert_same_update, assert_split_invariant, case
from tests.support.oracle import OracleTerm, oracle_update
from tests.support.oracle_noise import oracle_noise
from tests.support.oracle_terms import policy_term, sft_term
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, save_qwen2, tiny_run

MU = 0.3
WEIGHTS = {"policy": 1 - MU, "sft": MU}
CONSTANT_LENGTH = 16


def chord(folder: Path, samples: list[TrainSample], **settings: Any) -> Any:
    """The run with these settings, and its oracle terms."""
    run = tiny_run(folder, **settings)
    terms = {
        "policy": policy_term(run.objective, length=CONSTANT_LENGTH),
        "sft": sft_term(
            run.method.token_weight,
            cutoff=run.method.cutoff,
            aggregation=run.method.aggregation,
            temperature=run.method.sft_temperature,
            length=CONSTANT_LENGTH,
        ),
    }
    return run, samples, WEIGHTS, with_entropy(run.objective, terms)


def with_entropy(objective: ObjectiveConfig, terms: dict[str, OracleTerm]) -> dict[str, OracleTerm]:
    """The terms with an entropy that is averaged apart, if ``objective`` has one."""
    chosen = {"rollouts": ["policy"], "all": list(terms)}[objective.entropy_bonus_on]
    if not objective.averages_entropy_apart:
        return terms
    aggregation = objective.entropy_aggregation or objective.aggregation
    return terms | {
        name: replace(terms[name], entropy_bonus=objective.entropy_bonus, entropy_aggregation=aggregation)
        for name in chosen
    }


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp(request.param), tied=request.param == "tied")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("untied"))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_computes_the_reference_step(model: Path, world_size: int) -> None:
    """Every layout also measures the same noise (GAC)."""
    samples = numbered(make_samples())
    measured = NoiseMeasurement(demonstrations=5, uses_phi=True, trim=0.2)
    assert_split_invariant(
        model,
        {"chord": chord(model, samples, entropy_bonus=0.01)},
        layouts={world_size: LAYOUTS[world_size]},
        noise=(measured, oracle_noise(model, samples, uses_phi=True, trim=0.2)),
    )


def numbered(samples: list[TrainSample]) -> list[TrainSample]:
    """The samples with numbered demonstrations, as a step that measures the noise has them."""
    number, found = itertools.count(), []
    for sample in samples:
        (part,) = sample.parts
        constants = {NUMBER: float(next(number))} if part.term == "sft" else part.constants
        found.append(replace(sample, parts=(replace(part, constants=constants),)))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_answers_that_share_their_prompt_give_the_same_step(untied: Path, world_size: int) -> None:
    """Also where activations are recomputed, and where a group is divided among ranks and micro-batches."""
    samples = with_shared_prompts(make_samples(num_policy=9))
    run, *rest = chord(untied, samples, entropy_bonus=0.01)
    recomputed = replace(run, model=replace(run.model, recompute="full"))
    assert_split_invariant(
        untied,
        {"chord": (run, *rest), "recomputed": (recomputed, *rest)},
        layouts={world_size: LAYOUTS[world_size]},
    )


def with_shared_prompts(samples: list[TrainSample]) -> list[TrainSample]:
    """The samples, in which every three rollouts in a row have the prompt of the first of them."""
    found, prompt = list[TrainSample](), np.zeros(0, np.int64)
    for number, sample in enumerate(samples):
        (part,) = sample.parts
        first = int(part.positions[0])
        if part.term == "policy" and number % 3 == 0:
            prompt = sample.token_ids[:first]
        elif part.term == "policy":
            moved = replace(part, positions=part.positions + len(prompt) - first)
            ids = np.concatenate([prompt, sample.token_ids[first:]])
            sample = TrainSample(token_ids=ids, parts=(moved,))
        found.append(sample)
    return found


def test_recomputed_activations_give_the_same_step(untied: Path) -> None:
    run, *rest = chord(untied, make_samples())
    assert_split_invariant(
        untied,
        {
            what: (replace(run, model=replace(run.model, recompute=what)), *rest)
            for what in get_args(get_type_hints(ModelConfig)["recompute"])
        },
        layouts={2: {"tp2_sp": LAYOUTS[2]["tp2_sp"], "pp2_vpp2": LAYOUTS[2]["pp2_vpp2"]}},
    )


OPTIONS: dict[str, dict[str, Any]] = {
    # the policy branch
    "asymmetric clip": {"clip_low": 0.1, "clip_high": 0.28, "temperature": 0.7},
    "dual clip": {"dual_clip": 3.0},
    "gspo": {"surrogate": "gspo", "aggregation": "seq-mean-token-mean", "clip_low": 0.02, "clip_high": 0.03},
    "gspo, dual clip": {"surrogate": "gspo", "dual_clip": 1.5},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.28},
    "unclipped": {"surrogate": "unclipped", "ratio_from": "current"},
    "seq-mean-token-mean": {
        "aggregation": "seq-mean-token-mean",
        "settings": {"aggregation": "seq-mean-token-mean"},
    },
    "seq-mean-token-sum": {
        "aggregation": "seq-mean-token-sum",
        "settings": {"aggregation": "seq-mean-token-sum"},
    },
    "constant": {
        "aggregation": "seq-mean-token-sum-norm",
        "settings": {"aggregation": "seq-mean-token-sum-norm"},
    },
    "recomputed": {"ratio_from": "recomputed", "entropy_bonus": 0.02},
    "entropy of all": {"entropy_bonus": 0.02, "entropy_bonus_on": "all"},
    "entropy of all, summed": {
        "entropy_bonus": 0.02,
        "entropy_bonus_on": "all",
        "entropy_aggregation": "seq-mean-token-sum-norm",
    },
    "entropy by sequence": {"entropy_bonus": 0.02, "entropy_aggregation": "seq-mean-token-mean"},
    **{
        f"correction {level} {mode}": {
            "ratio_from": ratio_from,
            "correction": CorrectionConfig(
                level=level, mode=mode, low=0.0 if mode == "truncate" else 0.5, high=2.0
            ),
        }
        for level, mode, ratio_from in (
            ("token", "truncate", "current"),
            ("token", "clamp", "recomputed"),
            ("token", "mask", "current"),
            ("sequence", "truncate", "recomputed"),
            ("sequence", "mask", "current"),
            ("geometric", "mask", "recomputed"),
            ("geometric", "clamp", "current"),
        )
    },
    # the SFT branch
    "one": {"token_weight": SimpleWeight(kind="one")},
    "p": {"token_weight": SimpleWeight(kind="p")},
    "power": {"token_weight": PowerWeight(a=0.5, b=2.0, scale=4.0)},
    "trust region": {"token_weight": TrustRegionWeight(threshold=0.01)},
    "clipped is": {"token_weight": ClippedISWeight(threshold=0.01)},
    "focal": {"token_weight": FocalWeight()},
    "bernoulli entropy": {"token_weight": BernoulliEntropyWeight()},
    "entropy top": {"token_weight": EntropyTopWeight(share=0.3)},
    "entropy norm": {"token_weight": EntropyNormWeight()},
    "margin": {"token_weight": MarginWeight()},
    "gaussian margin": {"token_weight": MarginWeight(width=0.1)},
    "cutoff": {"cutoff": 0.01},
}
SPREAD: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": {"tensor": 2, "sequence_parallel": True}, "cp2": {"context": 2}},
    4: {"pp2_dp2": {"pipeline": 2}},
}


def test_every_option_in_layouts_that_cut_sequences_vocabulary_and_batch(untied: Path) -> None:
    samples = make_samples(seed=3)
    objectives = {name: chord(untied, samples, **settings) for name, settings in OPTIONS.items()}
    assert_split_invariant(untied, objectives, layouts=SPREAD)


def test_a_later_update_of_a_step(untied: Path, tmp_path: Path) -> None:
    """Ratios, corrections and quantiles start from log-probs of the old policy. The policy has moved since then."""
    old = save_qwen2(tmp_path, seed=2)
    later: dict[str, dict[str, Any]] = {
        "ppo": {"ratio_from": "recomputed", "dual_clip": 1.5},
        "gspo": {"ratio_from": "recomputed", "surrogate": "gspo", "clip_low": 0.02, "clip_high": 0.03},
        "corrected": {"ratio_from": "recomputed", "correction": CorrectionConfig(level="geometric", low=0.0)},
        "rollout": {"token_weight": EntropyTopWeight(share=0.3)},
    }
    objectives = {name: chord(untied, make_samples(seed=4), **settings) for name, settings in later.items()}
    assert_split_invariant(untied, objectives, layouts={2: SPREAD[2]}, old=old)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_to_a_reference(untied: Path, tmp_path: Path, estimator: Any) -> None:
    reference = save_qwen2(tmp_path, seed=1)
    kl = KLConfig(estimator=estimator, coefficient=0.1, reference=reference)
    assert_split_invariant(
        untied,
        {"kl": chord(untied, make_samples(), kl=kl)},
        layouts={2: {"pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2}, "cp2": {"context": 2}}},
        reference=reference,
    )


@pytest.mark.parametrize(
    ("kinds", "world_size", "parallel"),
    [
        ({"num_policy": 0, "num_sft": 3}, 2, {}),
        ({"num_policy": 3, "num_sft": 0}, 2, {"pipeline": 2}),
        ({"num_policy": 1, "num_sft": 0}, 2, {}),
        ({"num_policy": 1, "num_sft": 1}, 4, {}),
    ],
    ids=["demonstrations only", "rollouts only", "a rank with nothing", "ranks with one kind or nothing"],
)
def test_micro_batches_without_a_kind(
    untied: Path, kinds: dict[str, int], world_size: int, parallel: dict[str, int]
) -> None:
    objective = chord(untied, make_samples(**kinds), surrogate="gspo", token_weight=EntropyNormWeight())
    assert_split_invariant(untied, {str(kinds): objective}, layouts={world_size: {"": parallel}})


def test_mu_0_is_grpo_and_mu_1_is_sft(untied: Path) -> None:
    """Tokens of the other kind share the forward pass and add nothing. (tests/unit/losses proves that they add exactly
    0.)"""
    samples = make_samples()
    run = tiny_run(untied)
    cases = [case(run, samples, {"policy": 1 - mu, "sft": mu}) for mu in (0.0, 1.0)]
    (results,) = run_ranks(steps.updates, 1, untied, cases)
    for kind, result in zip(("policy", "sft"), results, strict=True):
        pure = [sample for sample in samples if sample.parts[0].term == kind]
        terms = {"policy": policy_term(run.objective), "sft": sft_term(SimpleWeight(kind="phi"))}
        assert_same_update(result, oracle_update(untied, pure, terms, {kind: 1.0}), kind)
