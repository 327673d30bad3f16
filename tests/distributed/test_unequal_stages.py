"""Pipeline stages of unequal length compute, train, save and export as equal ones do: 5 layers over 2 or 3 stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config_methods import SimpleWeight
from megatron_chord.convert.directions import to_hf, to_megatron
from megatron_chord.convert.sources import open_source
from tests.distributed.splits import assert_split_invariant
from tests.distributed.test_checkpoint import SAVED, assert_same_run, interrupted_and_not, resume
from tests.distributed.test_convert import load_folder, loaded_by_megatron
from tests.distributed.test_families import assert_exact
from tests.support.oracle_terms import policy_term, sft_term
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, save_model, tiny_run

LAYERS = 5
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"family": "qwen2"},
    "tied": {"family": "qwen2", "tied": True},
    # Layers 0 and 1 have no experts. With stages (2, 3) one whole stage has none, with (1, 1, 2, 1) one chunk has none.
    "latent_experts": {"family": "deepseek_v3", "first_k_dense_replace": 2},
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "short_last": {"pipeline": 2, "stages": (4, 1)},
        "short_first": {"pipeline": 2, "stages": (2, 3)},
        "chunks": {"pipeline": 2, "virtual_pipeline": 2, "stages": (1, 1, 2, 1)},
    },
    3: {"three": {"pipeline": 3, "stages": (1, 3, 1)}},
}
EXPERTS_TOO: dict[int, dict[str, dict[str, Any]]] = {
    4: {"ep2": {"pipeline": 2, "expert": 2, "stages": (2, 3)}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(folder=root / name, layers=LAYERS, **kind) for name, kind in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_chord_is_the_references(models: dict[str, Path], name: str) -> None:
    run = tiny_run(models[name])
    terms = {"policy": policy_term(run.objective), "sft": sft_term(SimpleWeight(kind="phi"))}
    objective = (run, make_samples(), {"policy": 0.7, "sft": 0.3}, terms)
    layouts = LAYOUTS | (EXPERTS_TOO if name == "latent_experts" else {})
    assert_split_invariant(models[name], {"chord": objective}, layouts=layouts)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_weights_are_read_computed_and_written_exactly(
    models: dict[str, Path], world_size: int, tmp_path: Path
) -> None:
    assert_exact(list(models.values()), LAYOUTS[world_size], world_size, tmp_path)


@pytest.mark.parametrize("name", ["untied", "latent_experts"])
def test_runs_resume_and_change_their_stages(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    """On the same stages a resumed run is equal bit for bit. On other stages it equals one rank's run up to
    rounding."""
    folder = models[name]
    (alone,) = run_ranks(interrupted_and_not, 1, folder, {"one": {}}, tmp_path)
    through, _ = alone["one"]
    for rank in run_ranks(interrupted_and_not, 2, folder, LAYOUTS[2], tmp_path):
        for layout, (uninterrupted, resumed) in rank.items():
            assert resumed["metrics"] == uninterrupted["metrics"], layout
            assert all(resumed["weights"][key].equal(w) for key, w in uninterrupted["weights"].items())
            assert_same_run(uninterrupted, through, layout)
    checkpoint = f"step-{SAVED:06d}"
    targets = {
        1: {"short_first": {}},
        2: {"one": LAYOUTS[2]["chunks"], "chunks": LAYOUTS[2]["short_last"], "short_last": {"tensor": 2}},
        3: {"short_first": LAYOUTS[3]["three"]},
    }
    for world_size, named in targets.items():
        for layout in named.values():
            layout.setdefault("sequence_parallel", "tensor" in layout)
        cases = {saved: (tmp_path / saved / checkpoint, layout) for saved, layout in named.items()}
        for outcome in run_ranks(resume, world_size, folder, cases)[0].items():
            assert_same_run(outcome[1], through, f"{outcome[0]} on {world_size} ranks")


def there_and_back(folder: Path, target: Path) -> None:
    to_megatron(open_source(folder), target / "megatron")
    to_hf(open_source(target / "megatron"), target / "back")


@pytest.mark.parametrize("name", ["tied", "latent_experts"])
def test_megatron_core_loads_converted_checkpoints(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    folder = models[name]
    run_ranks(there_and_back, 1, folder, tmp_path)
    expected = load_folder(folder)
    back = load_folder(tmp_path / "back")
    assert all(back[key].equal(tensor) for key, tensor in expected.items())
    layouts = list(LAYOUTS[2].values())
    for results in run_ranks(loaded_by_megatron, 2, folder, tmp_path / "megatron", layouts):
        for layout, tensors in zip(layouts, results, strict=True):
            assert tensors.keys() == expected.keys(), layout
            assert all(tensors[key].equal(expected[key]) for key in expected), layout
