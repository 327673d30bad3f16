"""The averaged weights are the average, the policy keeps its own bit for bit, and a checkpoint has both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_chord.data.packing import plan_step
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.train import checkpoint
from megatron_chord.train.state import TrainState, with_averaged
from megatron_chord.train.update import apply_gradients, prepare_batches
from tests.distributed.test_checkpoint import fresh_state, gradients, whole_weights
from tests.distributed.test_terms_distillation import taught_samples
from tests.support.ranks import run_ranks
from tests.support.tiny import save_qwen2, terms_of, tiny_run

RATE, UPDATES = 0.3, 3
LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "dp2_bf16": {"dtype": "bf16"}}
TOLERANCE = {"dp2": (1e-5, 1e-6), "dp2_bf16": (2**-7, 1e-3)}
"""Relative and absolute. In BF16 the expected average is that of the rounded weights. An update moves a weight by up to
1e-2."""


def averages(folder: Path, out: Path) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    results = {}
    for name, layout in LAYOUTS.items():
        made, packing = fresh_state(folder, layout)
        state = with_averaged(made, RATE)
        expected = {key: weight.double() for key, weight in whole_weights(state).items()}
        for step in range(UPDATES):
            gradients(state, packing, step)
            apply_gradients(state)
            average_of(state).update()
            expected = {
                key: (1 - RATE) * expected[key] + RATE * weight.double()
                for key, weight in whole_weights(state).items()
            }
        found = {"expected": expected, "own": whole_weights(state), "averaged": averaged_weights(state)}
        found["own again"] = whole_weights(state)
        saved = checkpoint.save(state, {"step": UPDATES}, out / name, keep=2)
        loaded = with_averaged(fresh_state(folder, layout)[0], RATE)
        checkpoint.load(loaded, saved)
        found |= {"own loaded": whole_weights(loaded), "averaged loaded": averaged_weights(loaded)}
        results[name] = found
    return results


def average_of(state: TrainState) -> Any:
    assert state.averaged is not None
    return state.averaged


def averaged_weights(state: TrainState) -> dict[str, torch.Tensor]:
    with average_of(state).active():
        return whole_weights(state)


def test_the_average_is_that_of_the_weights_and_is_saved(tmp_path: Path) -> None:
    model = save_qwen2(tmp_path / "model")
    found, _ = run_ranks(averages, 2, model, tmp_path / "out")
    for name, weights in found.items():
        rtol, atol = TOLERANCE[name]
        for key, expected in weights["expected"].items():
            averaged, own = weights["averaged"][key], weights["own"][key]
            torch.testing.assert_close(averaged.double(), expected, rtol=rtol, atol=atol)
            assert torch.equal(own, weights["own again"][key]), (name, key)
            assert torch.equal(own, weights["own loaded"][key]), (name, key)
            assert torch.equal(averaged, weights["averaged loaded"][key]), (name, key)
        assert any(not torch.equal(weights["averaged"][key], own) for key, own in weights["own"].items())


@dataclass(frozen=True)
class Scored:
    logprobs: list[float]
    """The teacher's, of one sample after an update."""
    averaged: dict[str, torch.Tensor]
    """The weights that the teacher had."""
    trained: dict[str, torch.Tensor]
    """The policy's weights after the update."""
    begun: dict[str, torch.Tensor]
    """The averaged weights of a run that resumes from a checkpoint without an average."""


def scored(folder: Path, out: Path) -> Scored:
    run = tiny_run(folder, method="self_distillation", teacher="averaged")
    terms = terms_of(run)
    made, packing = fresh_state(folder, {})
    state = with_averaged(made, RATE)
    gradients(state, packing, 0)
    apply_gradients(state)
    average_of(state).update()
    plan = plan_step(with_scales(taught_samples()[:1], terms), max_tokens=100, layout=packing, pad_id=0)
    (batch,) = prepare_batches(state, plan.micro_batches[0], terms, temperature=1.0)
    saved = checkpoint.save(made, {"step": 1}, out, keep=2)
    averaged, trained = averaged_weights(state), whole_weights(state)
    resumed = with_averaged(fresh_state(folder, {})[0], RATE)
    checkpoint.load(resumed, saved)
    return Scored(
        logprobs=batch.terms["policy"]["averaged_teacher_logprob"].tolist(),
        averaged=averaged,
        trained=trained,
        begun=averaged_weights(resumed),
    )


def test_the_teacher_computes_with_the_average_which_begins_with_the_weights(tmp_path: Path) -> None:
    folder = save_qwen2(tmp_path / "model")
    (found,) = run_ranks(scored, 1, folder, tmp_path / "out")
    assert all(torch.equal(found.begun[key], weight) for key, weight in found.trained.items())
    sample = taught_samples()[0]
    assert sample.teacher_ids is not None
    ids = torch.from_numpy(sample.teacher_ids)
    count = len(sample.parts[0].positions)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    missing, unexpected = model.load_state_dict(
        {key: weight.double() for key, weight in found.averaged.items()}, strict=False
    )
    assert not unexpected
    assert not missing
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[1:, None])[-count:, 0]
    torch.testing.assert_close(torch.tensor(found.logprobs, dtype=torch.float64), expected, rtol=0, atol=1e-4)
