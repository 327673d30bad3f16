"""Every family is read, computed, trained and written as Transformers does it, in layouts that split it along every
axis."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.config_methods import SimpleWeight
from megatron_chord.families.table import read_shape
from megatron_chord.train.checkpoint import step_of
from megatron_chord.train.export import export_policy
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.state import build_state
from megatron_chord.train.update import apply_gradients
from tests.distributed import steps
from tests.distributed.splits import assert_split_invariant
from tests.distributed.test_checkpoint import SAVED, gradients, interrupted_and_not, resume
from tests.support.oracle_terms import policy_term, sft_term
from tests.support.ranks import run_ranks
from tests.support.tiny import LLAMA3_ROPE, VOCAB, make_samples, save_model, tiny_run

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
DENSE: dict[str, dict[str, Any]] = {
    "llama_untied": {"family": "llama"},
    "llama_3": {"family": "llama", "tied": True, "rope_parameters": LLAMA3_ROPE},
    "llama_linear": {"family": "llama", "rope_parameters": LINEAR_ROPE},
    "mistral_untied": {"family": "mistral"},
    "mistral_tied": {"family": "mistral", "tied": True, "sliding_window": 512, "vocab": 256},
    "qwen3_untied": {"family": "qwen3"},
    "qwen3_tied": {"family": "qwen3", "tied": True},
}
MOE: dict[str, dict[str, Any]] = {
    "mixtral_untied": {"family": "mixtral"},
    "qwen2_moe_untied": {"family": "qwen2_moe"},
    "qwen2_moe_tied": {"family": "qwen2_moe", "tied": True, "norm_topk_prob": True},
    "qwen3_moe_untied": {"family": "qwen3_moe"},
    "qwen3_moe_one": {"family": "qwen3_moe", "norm_topk_prob": False, "num_experts_per_tok": 1},
    "qwen2_moe_one_dense": {"family": "qwen2_moe", "mlp_only_layers": [2]},
    "qwen3_moe_every_other": {"family": "qwen3_moe", "decoder_sparse_step": 2},
    "deepseek_v3_untied": {"family": "deepseek_v3"},
    "deepseek_v3_plain": {
        "family": "deepseek_v3",
        "tied": True,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    },
    "deepseek_v2_untied": {"family": "deepseek_v2"},
    "deepseek_v2_groups": {
        "family": "deepseek_v2",
        "q_lora_rank": 40,
        "n_routed_experts": 8,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
    },
}
TP2_SP = {"tensor": 2, "sequence_parallel": True}
DENSE_LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "tp2": {"tensor": 2},
        "tp2_sp": TP2_SP,
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    },
    4: {
        "tp2_pp2": {"tensor": 2, "pipeline": 2},
        "tp2_pp2_vpp2": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
    },
}
MOE_LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "ep2": {"expert": 2},
        "tp2_sp": TP2_SP,
        "tp2_sp_ep2": TP2_SP | {"expert": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    },
    4: {
        "ep4": {"expert": 4},
        "ep2_pp2_vpp2": {"expert": 2, "pipeline": 2, "virtual_pipeline": 2},
        "tp2_sp_ep2": TP2_SP | {"expert": 2},
        "tp2_sp_ep4": TP2_SP | {"expert": 4},
        "tp2_sp_pp2": TP2_SP | {"pipeline": 2},
    },
}
SEQUENCES = [
    np.random.default_rng(seed).integers(3, VOCAB, length).tolist()
    for seed, length in enumerate([17, 1, 40, 8, 160])
]


def models(kinds: dict[str, dict[str, Any]], factory: pytest.TempPathFactory) -> list[Path]:
    root = factory.mktemp("models")
    return [save_model(folder=root / name, **kind) for name, kind in kinds.items()]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return models(DENSE, tmp_path_factory)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return models(MOE, tmp_path_factory)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_dense_families_are_read_computed_and_written_exactly(
    dense: list[Path], world_size: int, tmp_path: Path
) -> None:
    assert_exact(dense, DENSE_LAYOUTS[world_size], world_size, tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_families_of_experts_are_read_computed_and_written_exactly(
    moe: list[Path], world_size: int, tmp_path: Path
) -> None:
    assert_exact(moe, MOE_LAYOUTS[world_size], world_size, tmp_path)


def assert_exact(
    folders: list[Path], layouts: dict[str, dict[str, Any]], world_size: int, target: Path
) -> None:
    """Assert that logits equal Transformers' and that exported weights equal the read ones bit for bit, for every model
    and layout."""
    results = run_ranks(
        steps.logits_and_exports, world_size, layouts, folders, target, SEQUENCES, timeout_s=600
    )
    for number, folder in enumerate(folders):
        expected = transformers_logits(folder)
        for layout in layouts:
            found = [logits for rank in results if (logits := rank[layout][number]) is not None]
            assert found, f"{layout}: no logits of {folder.name}"
            for logits in found:
                for ours, theirs in zip(logits, expected, strict=True):
                    what = f"{folder.name} in {layout}"
                    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=what)
            assert_same_tensors(target / layout / folder.name, folder)
        last = target / list(layouts)[-1] / folder.name
        for ours, theirs in zip(transformers_logits(last), expected, strict=True):
            np.testing.assert_allclose(
                ours, theirs, atol=1e-5, rtol=0
            )  # the last bits depend on how memory is aligned


def assert_same_tensors(folder: Path, source: Path) -> None:
    expected = load_file(source / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not part.keys() & found.keys(), f"{folder}: twice {part.keys() & found.keys()}"
        found |= part
    assert found.keys() == expected.keys(), folder
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), f"{folder}: {name}"


def transformers_logits(folder: Path) -> list[Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in SEQUENCES]


STEPS: dict[str, dict[str, dict[str, Any]]] = {
    "llama_3": {"pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2}},
    "mistral_untied": {"tp2_sp": TP2_SP},
    "qwen3_tied": {"tp2": {"tensor": 2}, "tp2_sp": TP2_SP},
    "mixtral_untied": {"ep2": {"expert": 2}},
    "qwen2_moe_untied": {"tp2_sp_ep2": TP2_SP | {"expert": 2}},
    "qwen3_moe_untied": {"tp2_sp": TP2_SP, "cp2_ep2": {"context": 2, "expert": 2}},
    "qwen2_moe_one_dense": {"tp2_sp_ep2": TP2_SP | {"expert": 2}},
    "deepseek_v3_untied": {
        "tp2_sp": TP2_SP,
        "tp2_sp_ep2": TP2_SP | {"expert": 2},
        "cp2_ep2": {"context": 2, "expert": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    },
    "deepseek_v2_untied": {"tp2_sp": TP2_SP},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_chord_is_the_references(name: str, tmp_path: Path) -> None:
    assert_same_step(save_model(folder=tmp_path, **(DENSE | MOE)[name]), STEPS[name])


def test_experts_computed_again_give_the_same_step(tmp_path: Path) -> None:
    """Recomputed experts give the same step. The model is a mixture with dense layers and shared experts."""
    folder = save_model(folder=tmp_path, **MOE["qwen2_moe_one_dense"])
    assert_same_step(folder, {"tp2_sp_ep2": TP2_SP | {"expert": 2}}, recompute="mlp")


def assert_same_step(folder: Path, layouts: dict[str, dict[str, Any]], **model: Any) -> None:
    run = tiny_run(folder)
    run = replace(run, model=replace(run.model, **model))
    terms = {"policy": policy_term(run.objective), "sft": sft_term(SimpleWeight(kind="phi"))}
    objective = (run, make_samples(), {"policy": 0.7, "sft": 0.3}, terms)
    assert_split_invariant(folder, {"chord": objective}, layouts={2: layouts})


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_experts_resume_in_other_layouts_as_if_never_interrupted(family: str, tmp_path: Path) -> None:
    """Clipped AdamW steps, gradient norms and checkpoints do not depend on which ranks hold the experts."""
    folder = save_model(family, tmp_path / "model")
    ((through, _),) = [
        rank["one"] for rank in run_ranks(interrupted_and_not, 1, folder, {"one": {}}, tmp_path / "alone")
    ]
    for rank in run_ranks(
        interrupted_and_not, 2, folder, {"moved": TP2_SP | {"expert": 2}}, tmp_path / "cut"
    ):
        for outcome in rank["moved"]:
            assert_same_run(outcome, through, "tp2_sp_ep2")
    saved = min((tmp_path / "cut" / "moved").glob("step*"), key=step_of)
    assert step_of(saved) == SAVED
    for world_size, layouts in {
        1: {"one": {}},
        2: {"ep2": {"expert": 2}, "tp2_sp": TP2_SP},
    }.items():
        cases = {name: (saved, layout) for name, layout in layouts.items()}
        for rank in run_ranks(resume, world_size, folder, cases):
            for name, outcome in rank.items():
                assert_same_run(outcome, through, name)
    before = load_file(folder / "model.safetensors")
    for name, tensor in through["weights"].items():
        is_trained = not name.endswith("e_score_correction_bias")
        assert torch.equal(tensor, before[name]) != is_trained, name


def train_and_export_in_bf16(folder: Path, target: Path) -> None:
    parallel = ParallelConfig(distributed_optimizer=False)
    model = ModelConfig(path=folder, dtype="bf16", recompute="full")
    groups = steps.start_groups(parallel)
    state = build_state(read_shape(folder), model, parallel, OptimConfig(lr=1e-2), groups=groups, steps=10)
    gradients(state, packing_layout(state.shape, parallel, groups.data.size), 0)
    apply_gradients(state)
    export_policy(state, folder, target)


def test_a_bf16_policy_keeps_the_bias_of_its_router_in_fp32(tmp_path: Path) -> None:
    folder = save_model("deepseek_v3", tmp_path / "model")
    run_ranks(train_and_export_in_bf16, 1, folder, tmp_path / "trained")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "trained"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, before[name])
        else:
            assert tensor.dtype == torch.bfloat16
            assert not torch.equal(tensor, before[name].bfloat16()), name


def assert_same_run(outcome: Any, expected: Any, what: str) -> None:
    for ours, theirs in zip(outcome["metrics"], expected["metrics"], strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), f"{what}: {name}"
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(outcome["weights"][name], tensor, atol=2e-5, rtol=0, msg=f"{what}: {name}")
