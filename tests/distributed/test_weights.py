"""Weights go from Hugging Face to Megatron shards and back bit for bit, in every layout. Transformers loads the
result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.train.export import export_policy
from megatron_chord.train.state import build_state
from megatron_chord.weights.sums import part_sum
from tests.distributed.steps import start_groups
from tests.support.ranks import run_ranks
from tests.support.tiny import save_qwen2

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "tp2": {"tensor": 2},
        "tp2_sp": {"tensor": 2, "sequence_parallel": True},
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
        "dp2": {},
    },
    4: {
        "tp2_pp2": {"tensor": 2, "pipeline": 2},
        "tp2_pp2_vpp2": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
    },
}
MODELS = {
    f"{'tied' if tied else 'untied'}_{vocab}_{dtype}": {"tied": tied, "vocab": vocab, "dtype": dtype}
    for tied in (False, True)
    for vocab in (203, 256)
    for dtype in ("fp32", "bf16")
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, kind in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        save_qwen2(folder, tied=kind["tied"], vocab=kind["vocab"])
        if kind["dtype"] == "bf16":
            store_bf16(folder)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        folders[name] = folder
    return folders


def store_bf16(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


def round_trips(cases: list[tuple[Path, Any, dict[str, Any], Path]]) -> None:
    """Load and export each (source, dtype, layout, target), which proves each tensor's sum.

    The sums that ranks expect must be those of the tensors in the folder.
    """
    for source, dtype, layout, target in cases:
        parallel = ParallelConfig(distributed_optimizer=False, **layout)
        state = build_state(
            read_shape(source),
            ModelConfig(path=source, dtype=dtype),
            parallel,
            OptimConfig(),
            groups=start_groups(parallel),
            steps=1,
        )
        export_policy(state, source, target)
        expected = {
            name: total for part in state.groups.gather(state.expected_sums()) for name, total in part.items()
        }
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        whole = load_file(source / "model.safetensors")
        assert expected == {
            name: part_sum(tensor.to(dtypes[dtype])).item() for name, tensor in whole.items()
        }, layout


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_round_trip_is_bit_for_bit(models: dict[str, Path], tmp_path: Path, world_size: int) -> None:
    cases = {
        f"{layout}-{model}": (models[model], kind["dtype"], parallel, tmp_path / f"{layout}-{model}")
        for layout, parallel in LAYOUTS[world_size].items()
        for model, kind in MODELS.items()
    }
    run_ranks(round_trips, world_size, list(cases.values()))
    for name, (source, _, _, target) in cases.items():
        expected = load_file(source / "model.safetensors")
        found: dict[str, torch.Tensor] = {}
        for file in sorted(target.glob("*.safetensors")):
            part = load_file(file)
            assert not part.keys() & found.keys(), f"{name}: twice {part.keys() & found.keys()}"
            found |= part
        assert found.keys() == expected.keys(), name
        for tensor, value in expected.items():
            assert found[tensor].dtype == value.dtype, f"{name}: {tensor}"
            assert torch.equal(found[tensor].view(torch.uint8), value.view(torch.uint8)), f"{name}: {tensor}"
        config = json.loads((source / "config.json").read_text())
        dtype = str(next(iter(expected.values())).dtype).removeprefix("torch.")
        assert json.loads((target / "config.json").read_text()) == config | {"dtype": dtype}, name
        for file in ("generation_config.json", "chat_template.jinja"):
            assert (target / file).read_bytes() == (source / file).read_bytes(), f"{name}: {file}"
        assert not list(tmp_path.glob(".*")), "a partial folder was left behind"
    for name in (next(iter(cases)), list(cases)[-1], f"{list(LAYOUTS[world_size])[-1]}-tied_203_fp32"):
        source, _, _, target = cases[name]
        assert torch.equal(transformers_logits(target), transformers_logits(source)), name


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits


def test_fp32_training_of_a_bf16_folder_and_an_export_that_replaces(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """A BF16 folder that is read as FP32 and written as FP32 keeps its numbers. The export replaces the old target."""
    source, target = models["untied_203_bf16"], tmp_path / "exported"
    target.mkdir()
    (target / "model-00001-of-00009.safetensors").write_bytes(b"from an earlier run")
    run_ranks(round_trips, 1, [(source, "fp32", {}, target)])
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    expected, found = (load_file(folder / "model.safetensors") for folder in (source, target))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value.float()), name


def load_broken(cases: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    messages = []
    for folder, layout in cases:
        try:
            round_trips([(folder, "fp32", layout, folder / "never")])
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_wrong_folder_is_refused_on_every_rank(tmp_path: Path) -> None:
    folder = save_qwen2(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, path, metadata={"format": "pt"})
    for (message,) in run_ranks(load_broken, 2, [(folder, {"pipeline": 2})]):
        assert message.splitlines()[1:] == [
            "  missing model.layers.1.mlp.up_proj.weight",
            "  missing model.norm.weight",
            "  unexpected model.layers.9.mlp.up_proj.weight",
        ]
