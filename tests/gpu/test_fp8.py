"""FP8 training on one GPU: it computes in FP8, its loss follows BF16's, its checkpoints resume, its memory is bounded.

Each run has a process of its own, because Transformer Engine reads its settings when it is imported.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_chord import doctor
from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.data.packing import plan_step
from megatron_chord.families.table import read_shape
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.model import fp8
from megatron_chord.model.forward import unwrapped
from megatron_chord.precision import Precision, preset
from megatron_chord.train import checkpoint
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.state import TrainState, build_state
from megatron_chord.train.update import Update, apply_gradients, compute_gradients, prepare_batches
from tests.distributed.steps import start_groups
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, save_model, terms_of, tiny_run

SIZES = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
"""With these sizes every matrix of every layer has sizes that are multiples of 128."""
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
}
STEPS = 80
FP8: tuple[Precision, ...] = ("fp8_e2e", "fp8_tensorwise")


def faults(precision: Precision) -> list[str]:
    return (
        doctor.fp8_faults(precision, doctor.this_machine())
        if torch.cuda.is_available()
        else ["a CUDA device"]
    )


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(faults("fp8_e2e")), reason=f"FP8 needs {'; '.join(faults('fp8_e2e'))}"),
]


def fresh_state(folder: Path, precision: Precision | None) -> TrainState:
    fp8.set_environment(precision)
    parallel = ParallelConfig()
    return build_state(
        read_shape(folder),
        ModelConfig(path=folder, dtype="bf16"),
        parallel,
        OptimConfig(lr=4e-4, clip_grad=1.0),
        groups=start_groups(parallel),
        steps=STEPS,
        fp8=preset(precision).training,
    )


def train(state: TrainState, precision: Precision | None, steps: range) -> list[float]:
    """Train plain SFT on the same eight demonstrations in every step. Return the loss of each step."""
    terms = terms_of(tiny_run(Path("model")))
    layout = packing_layout(state.shape, ParallelConfig(), 1, preset(precision).training)
    losses = []
    for _ in steps:
        samples = with_scales(make_samples(num_policy=0, num_sft=8), terms)
        plan = plan_step(samples, max_tokens=1024, layout=layout, pad_id=0)
        batches = prepare_batches(state, plan.micro_batches[0], terms, temperature=1.0)
        update = Update(weights={"policy": 0.0, "sft": 1.0}, counts=plan.counts)
        result = compute_gradients(state, batches, update, terms, temperature=1.0).result
        apply_gradients(state)
        losses.append(result.means["sft_nll"])
    return losses


def computed_in_fp8(state: TrainState) -> dict[str, bool]:
    """Return, by layer and matrix, whether Transformer Engine's last pass was in FP8."""
    layers = unwrapped(state.chunks[0]).decoder.layers
    return {
        f"{index}.{name}": bool(getattr(module, "fp8", False))
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
    }


def curve(folder: Path, precision: Precision | None) -> tuple[list[float], dict[str, bool]]:
    state = fresh_state(folder, precision)
    losses = train(state, precision, range(STEPS))
    return losses, computed_in_fp8(state)


def interrupted(folder: Path, precision: Precision, out: Path) -> dict[str, Any]:
    """Train 4 steps with a checkpoint after 2. Train the last 2 again from it, and once more in BF16."""
    from megatron.core.fp8_utils import get_fp8_recipe

    state = fresh_state(folder, precision)
    train(state, precision, range(2))
    saved = checkpoint.save(state, {"step": 2}, out, keep=2)
    results: dict[str, Any] = {"through": train(state, precision, range(2, 4))}
    metadata = FileSystemReader(saved).read_metadata()
    results["state"] = [name for name in metadata.state_dict_metadata if "_extra_state" in name]
    for name, kind in {"resumed": precision, "in BF16": None}.items():
        state = fresh_state(folder, kind)
        checkpoint.load(state, saved)
        results[name] = train(state, kind, range(2, 4))
        results[f"{name}: FP8"] = any(computed_in_fp8(state).values())
    state = fresh_state(folder, precision)
    checkpoint.load(state, saved)
    train(state, precision, range(2, 3))
    module = unwrapped(state.chunks[0]).decoder.layers[1].mlp.linear_fc1
    recipe = get_fp8_recipe(unwrapped(state.chunks[0]).config)
    results["recipe"] = (type(module.fp8_meta.get("recipe")).__name__, type(recipe).__name__)
    return results


def gradients(folder: Path, precision: Precision | None, scores: bool) -> list[dict[str, Tensor]]:
    """Return the gradients of two updates. With ``scores`` a pass without gradients over the same micro-batches
    precedes each, as with ``ratio_from: recomputed``."""
    state = fresh_state(folder, precision)
    terms = terms_of(tiny_run(Path("model")))
    scored = terms_of(tiny_run(Path("model"), ratio_from="recomputed"))
    layout = packing_layout(state.shape, ParallelConfig(), 1, preset(precision).training)
    samples = with_scales(make_samples(num_policy=12, num_sft=12), terms)
    plan = plan_step(samples, max_tokens=128, layout=layout, pad_id=0)
    assert len(plan.micro_batches[0]) > 1
    update = Update(weights={"policy": 0.7, "sft": 0.3}, counts=plan.counts)
    found = []
    for _ in range(2):
        if scores:
            first = prepare_batches(state, plan.micro_batches[0], scored, temperature=1.0)[0]
            assert "old_logprob" in first.terms["policy"].columns
        batches = prepare_batches(state, plan.micro_batches[0], terms, temperature=1.0)
        compute_gradients(state, batches, update, terms, temperature=1.0)
        parameters: Any = state.parameters()
        found.append(
            {name: parameter.main_grad.float().cpu().clone() for name, parameter in parameters.items()}
        )
        apply_gradients(state)
    return found


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all gradients, divided by the norm of ``theirs``."""
    difference = sum(float((ours[name] - value).square().sum()) for name, value in theirs.items())
    return (difference / sum(float(value.square().sum()) for value in theirs.values())) ** 0.5


def peak_memory(folder: Path, precision: Precision | None) -> int:
    """Return the peak memory in bytes of an update of 16384 tokens."""
    import numpy as np

    from megatron_chord.records import Part, TrainSample

    state = fresh_state(folder, precision)
    terms = terms_of(tiny_run(Path("model")))
    length = 4096
    ids = np.random.default_rng(0).integers(3, 200, length)
    part = Part(term="sft", positions=np.arange(length // 2, length), constants={})
    samples = with_scales([TrainSample(token_ids=ids, parts=(part,))] * 4, terms)
    layout = packing_layout(state.shape, ParallelConfig(), 1, preset(precision).training)
    plan = plan_step(samples, max_tokens=4 * length, layout=layout, pad_id=0)
    update = Update(weights={"policy": 0.0, "sft": 1.0}, counts=plan.counts)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        batches = prepare_batches(state, plan.micro_batches[0], terms, temperature=1.0)
        compute_gradients(state, batches, update, terms, temperature=1.0)
        apply_gradients(state)
    return torch.cuda.max_memory_allocated()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2", tmp_path_factory.mktemp("model"), **SIZES)


@pytest.fixture(scope="module")
def bf16_curve(model: Path) -> list[float]:
    ((losses, in_fp8),) = run_ranks(curve, 1, model, None)
    assert not any(in_fp8.values())
    return losses


@pytest.mark.parametrize("precision", FP8)
def test_loss_follows_bf16(
    model: Path, bf16_curve: list[float], precision: Precision, record_property: Any
) -> None:
    ((losses, in_fp8),) = run_ranks(curve, 1, model, precision)
    outer = precision == "fp8_tensorwise"
    for name, is_fp8 in in_fp8.items():
        assert is_fp8 == (not outer or name.split(".")[0] in ("1", "2")), name
    record_property("losses", {"bf16": bf16_curve[::10], precision: losses[::10]})
    assert losses[0] == pytest.approx(bf16_curve[0], rel=0.02)
    assert losses != bf16_curve, "FP8 rounds more"
    assert statistics.fmean(bf16_curve[-10:]) < 0.5 * bf16_curve[0], "there is something to follow"
    for start in range(0, STEPS, 10):
        ours, theirs = (statistics.fmean(curve[start : start + 10]) for curve in (losses, bf16_curve))
        assert ours == pytest.approx(theirs, rel=0.1, abs=0.05), f"steps {start} to {start + 9}"


@pytest.mark.parametrize("precision", FP8)
def test_resumes_as_itself_and_in_bf16(model: Path, tmp_path: Path, precision: Precision) -> None:
    (results,) = run_ranks(interrupted, 1, model, precision, tmp_path)
    assert results["state"], "Megatron's extra state is in the checkpoint"
    assert results["resumed"] == pytest.approx(results["through"], rel=1e-3)
    assert results["resumed: FP8"]
    assert not results["in BF16: FP8"]
    assert results["in BF16"] == pytest.approx(results["through"], rel=0.05)
    loaded, configured = results["recipe"]
    assert loaded == configured


@pytest.mark.parametrize("precision", FP8)
def test_a_pass_without_gradients_does_not_change_the_gradients(model: Path, precision: Precision) -> None:
    """Transformer Engine keeps FP8 copies of weights between passes. Those of the pass before, or of the weights before
    an update, must not be used. Attention's backward pass may sum in another order each time."""
    (plain,), (preceded,) = (run_ranks(gradients, 1, model, precision, scores) for scores in (False, True))
    assert distance(plain[1], plain[0]) > 0.02, "an update changes the gradients"
    for ours, theirs in zip(preceded, plain, strict=True):
        assert distance(ours, theirs) < 0.005


def test_memory(tmp_path: Path, record_property: Any) -> None:
    folder = save_model("qwen2", tmp_path, layers=8, **LARGE)
    peaks = {name: run_ranks(peak_memory, 1, folder, name)[0] for name in (None, *FP8)}
    record_property("peak_gib", {str(name): peak / 2**30 for name, peak in peaks.items()})
    for precision in FP8:
        # FP8 adds copies of the weights, at most 2 bytes each, and halves part of what is kept for the backward pass.
        assert peaks[precision] < 1.15 * peaks[None], peaks
