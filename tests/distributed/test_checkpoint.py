"""A resumed run equals the uninterrupted one, in its own layout and in another. A damaged checkpoint is never loaded.

The optimizer step is compared with torch: clipping, AdamW, the schedule, and the parameters without weight decay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_chord.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.data.packing import plan_step
from megatron_chord.families.table import read_shape
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.train import checkpoint
from megatron_chord.train.checkpoint import CheckpointError
from megatron_chord.train.saver import Saver
from megatron_chord.train.state import TrainState, build_state
from megatron_chord.train.update import Update, apply_gradients, compute_gradients, prepare_batches
from megatron_chord.weights.torch_dist import read_metadata
from tests.distributed.steps import gather_hf, packing_layout, start_groups
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, save_qwen2, terms_of, tiny_run

SAVED, STEPS = 2, 4
OPTIM = OptimConfig(
    lr=1e-2,
    min_lr=1e-3,
    schedule="cosine",
    warmup_steps=1,
    weight_decay=0.1,
    clip_grad=0.3,
    eps=1e-3,  # with 1e-8, Adam would enlarge the rounding of tiny gradients to whole steps
)
RATES = [1e-2, 1e-3 + 9e-3 * (2 + 2**0.5) / 4, 1e-3 + 9e-3 / 2, 1e-3 + 9e-3 * (2 - 2**0.5) / 4]
"""The rates of OPTIM over 4 steps: one step up to 1e-2, then down to 1e-3 with (1 + cos) / 2 at 1/4, 2/4 and 3/4 of the
way."""

SAME_LAYOUT: dict[str, dict[str, Any]] = {
    "one": {"world": 1},
    "one_bf16": {"world": 1, "dtype": "bf16"},
    "tp2": {"world": 2, "tensor": 2},
    "dp2": {"world": 2},
    "pp2_vpp2": {"world": 2, "pipeline": 2, "virtual_pipeline": 2},
    "dp2_replicated_optimizer": {"world": 2, "distributed_optimizer": False},
    "tp2_dp2": {"world": 4, "tensor": 2},
    "pp2_dp2": {"world": 4, "pipeline": 2},
}
Outcome = dict[str, Any]


def fresh_state(folder: Path, layout: dict[str, Any], optim: OptimConfig = OPTIM) -> tuple[TrainState, Any]:
    layout = {name: value for name, value in layout.items() if name != "world"}
    dtype = layout.pop("dtype", "fp32")
    parallel = ParallelConfig(**layout)
    state = build_state(
        read_shape(folder),
        ModelConfig(path=folder, dtype=dtype),
        parallel,
        optim,
        groups=start_groups(parallel),
        steps=STEPS,
    )
    return state, packing_layout(state.shape, parallel, state.groups.data.size)


def gradients(state: TrainState, layout: Any, step: int) -> dict[str, float]:
    """Compute the gradients of this step's samples. Return the metrics."""
    terms = terms_of(tiny_run(Path("model"), entropy_bonus=0.01))
    samples = with_scales(make_samples(seed=step), terms)
    plan = plan_step(samples, max_tokens=60, layout=layout, pad_id=0)
    batches = prepare_batches(state, plan.micro_batches[state.groups.data.rank], terms, temperature=1.0)
    update = Update(weights={"policy": 0.7, "sft": 0.3}, counts=plan.counts)
    result = compute_gradients(state, batches, update, terms, temperature=1.0).result
    return {"loss": result.loss, **result.means, **result.maxima}


def train(state: TrainState, layout: Any, steps: range) -> list[dict[str, float]]:
    metrics = []
    for step in steps:
        row = gradients(state, layout, step)
        row["grad_norm"], row["rate"] = apply_gradients(state)
        metrics.append(row)
    return metrics


def whole_weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gather_hf(state, state.weights()).items()}


def interrupted_and_not(
    folder: Path, layouts: dict[str, dict[str, Any]], out: Path
) -> dict[str, tuple[Outcome, Outcome]]:
    """For each layout: train 4 steps and save after 2, then train the last 2 again from that checkpoint in a fresh
    state."""
    results = {}
    for name, settings in layouts.items():
        state, layout = fresh_state(folder, settings)
        train(state, layout, range(SAVED))
        run_state = {"step": SAVED, "cursor": {"epoch": 3}}
        saved = checkpoint.save(state, run_state, out / name, keep=2)
        metrics = train(state, layout, range(SAVED, STEPS))
        through = {"metrics": metrics, "weights": whole_weights(state)}
        checkpoint.save(state, {"step": STEPS}, out / name, keep=2)

        state, layout = fresh_state(folder, settings)
        # Loading also restores the RNG state. Training draws nothing from it, so the test draws one number.
        torch.manual_seed(7)
        loaded = checkpoint.load(state, saved)
        drawn = torch.rand(1).item()
        resumed = {"metrics": train(state, layout, range(SAVED, STEPS)), "weights": whole_weights(state)}
        resumed |= {"run_state": loaded, "drawn": drawn}
        results[name] = (through, resumed)
    return results


def resume(folder: Path, cases: dict[str, tuple[Path, dict[str, Any]]]) -> dict[str, Outcome]:
    """Train the last 2 steps from each pair of checkpoint and layout."""
    results = {}
    for name, (saved, settings) in cases.items():
        state, layout = fresh_state(folder, settings)
        checkpoint.load(state, saved)
        metrics = train(state, layout, range(SAVED, STEPS))
        results[name] = {"metrics": metrics, "weights": whole_weights(state)}
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(model: Path, checkpoints: Path) -> dict[str, list[tuple[Outcome, Outcome]]]:
    """For each layout: what each rank has of the uninterrupted run and of the resumed run."""
    results: dict[str, list[tuple[Outcome, Outcome]]] = {}
    for world_size in (1, 2, 4):
        layouts = {name: kind for name, kind in SAME_LAYOUT.items() if kind["world"] == world_size}
        per_rank = run_ranks(interrupted_and_not, world_size, model, layouts, checkpoints)
        results |= {name: [rank[name] for rank in per_rank] for name in layouts}
    return results


@pytest.mark.parametrize("layout", SAME_LAYOUT)
def test_resuming_on_the_same_layout_is_bit_for_bit(runs: Any, layout: str) -> None:
    for through, resumed in runs[layout]:
        assert resumed["run_state"] == {"step": SAVED, "cursor": {"epoch": 3}}
        assert resumed["metrics"] == through["metrics"]
        assert through["weights"].keys() == resumed["weights"].keys() != set()
        for name, weight in through["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name
        torch.manual_seed(0)  # the seed that the run was started with
        assert resumed["drawn"] == torch.rand(1).item()


@pytest.mark.parametrize("is_optimizer", [False, True])
def test_data_parallel_ranks_write_equally_much(runs: Any, checkpoints: Path, is_optimizer: bool) -> None:
    stored = read_metadata(checkpoints / "dp2" / f"step-{SAVED:06d}").storage_data
    sizes = {"__0": 0, "__1": 0}
    for index, place in stored.items():
        if index.fqn.startswith("optimizer.state.") == is_optimizer:
            sizes[place.relative_path[:3]] += place.length
    assert min(sizes.values()) > 0.4 * sum(sizes.values())


def test_every_layout_trains_the_same_model(runs: Any) -> None:
    """Four steps of Adam with clipping agree over all layouts in gradient norms, rates and weights."""
    through, _ = runs["one"][0]
    for layout in ("tp2", "dp2", "pp2_vpp2", "dp2_replicated_optimizer", "tp2_dp2", "pp2_dp2"):
        assert_same_run(runs[layout][0][0], through, layout)


def test_resuming_on_another_layout(model: Path, checkpoints: Path, runs: Any) -> None:
    targets: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
        1: {name: (name, {}) for name in ("tp2", "pp2_vpp2", "dp2", "tp2_dp2", "pp2_dp2")},
        2: {
            "tp2 -> pp2": ("tp2", {"pipeline": 2}),
            "tp2 -> dp2": ("tp2", {}),
            "pp2_vpp2 -> tp2": ("pp2_vpp2", {"tensor": 2}),
            "dp2 -> pp2": ("dp2", {"pipeline": 2}),
            "one -> tp2": ("one", {"tensor": 2}),
        },
    }
    for world_size, named in targets.items():
        cases = {
            name: (checkpoints / saved / f"step-{SAVED:06d}", layout)
            for name, (saved, layout) in named.items()
        }
        (first, *_) = run_ranks(resume, world_size, model, cases)
        for name, outcome in first.items():
            through, _ = runs[named[name][0]][0]
            assert_same_run(outcome, through, name)


def assert_same_run(ours: Outcome, theirs: Outcome, what: str) -> None:
    """Assert that two runs agree up to FP32 rounding."""
    for step, (row, expected) in enumerate(zip(ours["metrics"], theirs["metrics"], strict=True)):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-7), f"{what}, step {step}"
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        error = (ours["weights"][name] - weight).abs().max().item()
        assert error < 1e-5, f"{what}: {name} off by {error:.1e}"


# ---------------------------------------------------------------------------------------------------------------
# Damaged checkpoints


@pytest.fixture
def folder(runs: Any, checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the single rank's two checkpoints."""
    return shutil.copytree(checkpoints / "one", tmp_path / "checkpoints")


def find(folder: Path) -> tuple[Path | None, list[str]]:
    said: list[str] = []
    return checkpoint.find(folder, said.append, checkpoint.Alone()), said


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


OLDER, NEWER = f"step-{SAVED:06d}", f"step-{STEPS:06d}"


def test_the_newest_whole_checkpoint_is_found(folder: Path) -> None:
    assert (folder / "latest").read_text() == f"{NEWER}\n"
    assert find(folder) == (folder / NEWER, [])
    assert checkpoint.step_of(folder / NEWER) == STEPS


def test_a_checkpoint_is_found_by_its_name(folder: Path) -> None:
    def named(name: str) -> Path:
        return checkpoint.find_named(folder, name, print, checkpoint.Alone())

    assert named(OLDER) == named(f"step-{SAVED}") == folder / OLDER
    for name in ("step-999", "latest"):
        with pytest.raises(ValueError, match=f"no checkpoint {name} in .*; there are: {OLDER}, {NEWER}"):
            named(name)
    flip_a_byte(folder / OLDER / "run.json")
    with pytest.raises(CheckpointError, match=f"{OLDER} is damaged: .*run.json"):
        named(OLDER)
    assert named(NEWER) == folder / NEWER


def test_checkpoints_after_the_one_that_is_continued_are_set_aside(folder: Path) -> None:
    said: list[str] = []
    checkpoint.set_aside(folder, after=SAVED, notify=said.append)
    (line,) = said
    assert f"{NEWER} is kept as {NEWER}.set-aside" in line
    assert (folder / f"{NEWER}.set-aside" / "run.json").is_file()
    assert (folder / "latest").read_text() == f"{OLDER}\n"
    assert find(folder) == (folder / OLDER, [])


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find(tmp_path) == (None, [])
    assert find(tmp_path / "nowhere") == (None, [])


def test_one_flipped_byte_in_any_file_falls_back_and_says_so(folder: Path) -> None:
    files = [path for path in (folder / NEWER).rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        intact = path.read_bytes()
        flip_a_byte(path)
        found, said = find(folder)
        assert found == folder / OLDER, path.name
        (line,) = said
        assert f"{folder / NEWER} is damaged" in line
        if path.name != "manifest.json":
            assert f"{path.relative_to(folder / NEWER)} has changed" in line
        path.write_bytes(intact)
    assert find(folder) == (folder / NEWER, [])


def test_a_missing_file_or_manifest_falls_back(folder: Path) -> None:
    (folder / NEWER / "run.json").unlink()
    found, (line,) = find(folder)
    assert found == folder / OLDER
    assert "run.json is missing" in line
    (folder / NEWER / "manifest.json").unlink()
    found, (line,) = find(folder)
    assert found == folder / OLDER
    assert "no readable manifest.json" in line


def test_all_damaged_is_an_error_and_no_start_from_the_beginning(folder: Path) -> None:
    for name in (OLDER, NEWER):
        flip_a_byte(next((folder / name).glob("*.distcp")))
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        checkpoint.find(folder, said.append, checkpoint.Alone())
    assert [NEWER in said[0], OLDER in said[1]] == [True, True]


def test_what_a_crash_leaves_behind_is_ignored(folder: Path) -> None:
    shutil.copytree(folder / NEWER, folder / ".step-000006.partial")
    (folder / ".step-000006.partial" / "manifest.json").unlink()
    (folder / ".latest.tmp").write_text("step-000006\n")
    assert find(folder) == (folder / NEWER, [])


def save_again(folder: Path, out: Path) -> list[list[str]]:
    """List the checkpoints after each of several saves. The partial folder of an earlier crash is there at the
    start."""
    state, layout = fresh_state(folder, {})
    train(state, layout, range(1))
    there = []
    (out / ".step-000001.partial").mkdir(parents=True)
    (out / ".step-000001.partial" / "half.distcp").write_bytes(b"half")
    for step in (1, 2, 3, 12, 5, 5):
        saved = checkpoint.save(state, {"step": step}, out, keep=2)
        there.append(sorted(path.name for path in out.iterdir()))
        assert checkpoint.find(out, print, state.groups) is not None
        assert not (saved / "half.distcp").exists()
    # Now fewer are kept than before, while a newer checkpoint is there. It may be a damaged one that was skipped.
    checkpoint.save(state, {"step": 6}, out, keep=1)
    there.append(sorted(path.name for path in out.iterdir()))
    return there


def test_the_newest_are_kept_and_never_is_the_one_just_written_dropped(model: Path, tmp_path: Path) -> None:
    (there,) = run_ranks(save_again, 1, model, tmp_path / "out")
    assert [[int(name[5:]) for name in names if name != "latest"] for names in there] == [
        [1],
        [1, 2],
        [2, 3],
        [3, 12],
        [5, 12],
        [5, 12],
        [6, 12],
    ]
    assert all("latest" in names for names in there)


# ---------------------------------------------------------------------------------------------------------------
# Hostile contents and failing disks


EXTRA_STATE = "extra state"
"""The place of a canary that is never read, so the checkpoint is loaded."""


class Canary:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def pickled(canary: Canary) -> bytes:
    return pickle.dumps(canary)


def saved(canary: Canary) -> bytes:
    content = io.BytesIO()
    torch.save([canary], content)
    return content.getvalue()


def plant(checkpoint_folder: Path, canary: Canary) -> dict[str, Path]:
    """Copy a checkpoint once for each place that can hold the canary. The manifest of each copy agrees with its files.

    Returns the changed file of each copy, by the name of the place.
    """
    copies = {}
    description = read_metadata(checkpoint_folder)
    objects = {"rng": None, "tensor": None, EXTRA_STATE: None}
    for index, place in (description.storage_data or {}).items():
        other = EXTRA_STATE if "_extra_state" in index.fqn else "tensor"
        kind = "rng" if index.fqn.startswith("rng/") else other
        objects[kind] = objects[kind] or place
    for name, contents in {
        ".metadata": pickled(canary),
        "common.pt": saved(canary),
        "common.pt of old": pickled(canary),
        "rng": saved(canary),
        "tensor": saved(canary),
        EXTRA_STATE: saved(canary),
    }.items():
        copy = shutil.copytree(
            checkpoint_folder, checkpoint_folder.parents[1] / f"{name}-planted" / "step-000002"
        )
        file = copy / name.partition(" ")[0]
        if name in objects:
            place = objects[name]
            assert place is not None
            file = copy / place.relative_path
            whole = file.read_bytes()
            file.write_bytes(whole + contents)
            place = dataclasses.replace(place, offset=len(whole), length=len(contents))
            moved = {
                i: place if p == objects[name] else p for i, p in (description.storage_data or {}).items()
            }
            (copy / ".metadata").write_bytes(
                pickle.dumps(dataclasses.replace(description, storage_data=moved))
            )
        else:
            file.write_bytes(contents)
        digests = {
            str(path.relative_to(copy)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in copy.rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }
        (copy / "manifest.json").write_text(json.dumps(digests))
        copies[name] = file
    return copies


def refusals(folder: Path, out: Path) -> tuple[dict[str, tuple[str, str]], bool]:
    """Load each planted copy. Return the messages with the files that they should name, and whether no canary was
    unpickled.

    The second value is also False if the canary does not work at all.
    """
    canary = Canary(out.parent / "canary")
    state, layout = fresh_state(folder, {})
    train(state, layout, range(1))
    said = {}
    for name, file in plant(checkpoint.save(state, {"step": 2}, out, keep=1), canary).items():
        assert checkpoint.find(file.parents[1], print, state.groups) == file.parent
        if name == EXTRA_STATE:
            checkpoint.load(state, file.parent)
            continue
        with pytest.raises(CheckpointError) as refusal:
            checkpoint.load(state, file.parent)
        said[name] = (str(refusal.value), str(file))
    harmless = not canary.path.exists()
    with contextlib.suppress(Exception):  # only the canary's effect is checked
        pickle.loads(pickled(canary))
    return said, harmless and canary.path.exists()


def test_nothing_in_a_checkpoint_executes(model: Path, tmp_path: Path) -> None:
    ((said, harmless),) = run_ranks(refusals, 1, model, tmp_path / "out")
    assert harmless
    for name, (text, file) in said.items():
        assert "\n" not in text, name
        assert text.startswith(file), name
        assert "mkdir" in text or name == "common.pt of old", name  # a bare pickle is not even opened
    assert len(said) == 5


def failing_saves(folder: Path, out: Path) -> dict[str, Any]:
    """Save while the files of one rank are limited to 20 kB, for each rank in turn. Then save without a limit."""
    state, layout = fresh_state(folder, {})
    train(state, layout, range(1))
    rank = state.groups.rank
    outcome: dict[str, Any] = {"errors": []}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for poor in range(state.groups.world_size):
        if rank == poor:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large") as error:
            checkpoint.save(state, {"step": 1}, out, keep=2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        outcome["errors"].append(str(error.value))
        state.groups.gather(None)
        outcome["left"] = [path.name for path in out.iterdir()]
        state.groups.gather(None)
    checkpoint.save(state, {"step": 1}, out, keep=2)
    outcome["children"] = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    outcome["found"] = checkpoint.find(out, print, state.groups)
    return outcome


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_is_an_error_on_every_rank_and_leaves_nothing(
    model: Path, tmp_path: Path, world_size: int
) -> None:
    for outcome in run_ranks(failing_saves, world_size, model, tmp_path / "out"):
        assert len(outcome["errors"]) == world_size
        assert all("\n" not in error and str(tmp_path) in error for error in outcome["errors"])
        assert outcome["left"] == []
        assert outcome["children"] == "", "a save needs no other process, which could outlive this one"
        assert outcome["found"] == tmp_path / "out" / "step-000001"


def saves_beside_what_cannot_be_removed(folder: Path, out: Path) -> list[str]:
    state, layout = fresh_state(folder, {})
    train(state, layout, range(1))
    said: list[str] = []
    out.mkdir()
    (out / "step-000001").write_text("a file, which is not removed like a folder")
    checkpoint.save(state, {"step": 2}, out, keep=1, notify=said.append)
    return said


def test_a_checkpoint_that_cannot_be_removed_is_told_of(model: Path, tmp_path: Path) -> None:
    ((line,),) = run_ranks(saves_beside_what_cannot_be_removed, 1, model, tmp_path / "out")
    assert line.startswith(
        f"{tmp_path / 'out' / 'step-000001'} cannot be removed and still uses disk space: "
    )


def test_partial_checkpoints_are_cleared_and_whole_ones_stay(folder: Path) -> None:
    shutil.copytree(folder / NEWER, folder / ".step-000006.partial")
    checkpoint.clear_partial(folder, print)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", OLDER, NEWER]


def shared_finds(out: Path) -> dict[str, Any]:
    """Return the files that this rank reads while all ranks look for a checkpoint: first two whole ones, then the newer
    one damaged."""
    groups = start_groups(ParallelConfig())
    read: list[str] = []
    digest = checkpoint._digest

    def note(path: Path, *rest: Any) -> str | None:
        read.append(f"{path.parent.name}/{path.name}")
        return digest(path, *rest)

    checkpoint._digest = note
    said: list[str] = []
    found = checkpoint.find(out, said.append, groups)
    first, read[:] = list(read), []
    flip_a_byte(next((out / NEWER).glob("*.distcp"))) if groups.rank == 0 else None
    groups.gather(None)
    return {
        "found": [found, checkpoint.find(out, said.append, groups)],
        "first": first,
        "then": read,
        "said": said,
    }


def test_ranks_share_the_search_and_read_older_ones_only_in_need(folder: Path) -> None:
    files = {
        name: {f"{name}/{path.name}" for path in (folder / name).iterdir() if path.name != "manifest.json"}
        for name in (OLDER, NEWER)
    }
    one, two = run_ranks(shared_finds, 2, folder)
    assert one["found"] == two["found"] == [folder / NEWER, folder / OLDER]
    assert sorted(one["first"] + two["first"]) == sorted(files[NEWER])
    assert min(len(one["first"]), len(two["first"])) >= len(files[NEWER]) // 2
    assert sorted(one["then"] + two["then"]) == sorted(files[NEWER] | files[OLDER])
    assert len(one["said"]) == 1
    assert two["said"] == []


# ---------------------------------------------------------------------------------------------------------------
# Training goes on while a checkpoint is written


def saved_beside_training(folder: Path, out: Path) -> dict[str, Any]:
    """Begin a checkpoint, train on before its threads write anything, and finish it. Then train again from it."""
    state, layout = fresh_state(folder, {})
    train(state, layout, range(SAVED))
    may_write, write_part = threading.Event(), checkpoint.write_part

    def late(*args: Any, **settings: Any) -> Any:
        may_write.wait()
        return write_part(*args, **settings)

    checkpoint.write_part = late
    writing = checkpoint.begin(state, {"step": SAVED}, out, keep=2, may_stage=True)
    outcome: dict[str, Any] = {"staged": writing.is_staged, "progress": writing.progress}
    train(state, layout, range(SAVED, STEPS))
    outcome["through"] = whole_weights(state)
    outcome["there"] = [path.name for path in out.iterdir()]
    state.groups.gather(None)
    may_write.set()
    path = writing.finish()
    outcome["after"] = sorted(path.name for path in out.iterdir()), writing.progress

    state, layout = fresh_state(folder, {})
    checkpoint.load(state, path)
    train(state, layout, range(SAVED, STEPS))
    outcome["resumed"] = whole_weights(state)
    return outcome


def test_a_checkpoint_holds_the_state_of_its_step_though_training_went_on(
    model: Path, tmp_path: Path
) -> None:
    for outcome in run_ranks(saved_beside_training, 2, model, tmp_path / "out"):
        assert outcome["staged"]
        assert outcome["progress"] == "writing"
        assert outcome["there"] == [f".{OLDER}.partial"], "no name before all is written"
        assert outcome["after"] == (["latest", OLDER], "written")
        for name, weight in outcome["through"].items():
            assert torch.equal(outcome["resumed"][name], weight), name


def saver_outcomes(folder: Path, out: Path) -> dict[str, Any]:
    """Save four checkpoints in the background: the second fails on the last rank, the last is given up."""
    state, layout = fresh_state(folder, {})
    train(state, layout, range(1))
    groups, said, outcome = state.groups, [], dict[str, Any]()
    saver = Saver(out, CheckpointConfig(asynchronous=True), groups, said.append)

    def there() -> list[str]:
        groups.gather(None)
        return [*sorted(path.name for path in out.iterdir()), (out / "latest").read_text().strip()]

    saver.save(state, {"step": 1}, best=None, waits=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if groups.rank == groups.world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    saver.save(state, {"step": 2}, best=None)
    while saver.progress == "writing":
        time.sleep(0.01)
    outcome["progress"] = groups.gather(saver.progress)
    with pytest.raises(OSError, match="File too large"):
        saver.settle(outcome["progress"])
    outcome["failed"] = there()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.save(state, {"step": 3}, best=None)
    saver.save(state, {"step": 4}, best=None)
    outcome["two"] = [name for name in there() if not name.startswith(".")]
    saver.close()
    outcome["closed"] = [name for name in there() if not name.startswith(".")]
    checkpoint.available_memory = lambda: 1000
    saver.save(state, {"step": 5}, best=None)
    outcome["full"] = there()
    return outcome | {"said": said, "idle": saver.progress}


def test_a_saver_keeps_what_is_complete(model: Path, tmp_path: Path) -> None:
    first, second = run_ranks(saver_outcomes, 2, model, tmp_path / "out")
    for outcome in (first, second):
        assert outcome["progress"] == ["written", "failed"]
        assert outcome["failed"] == ["latest", "step-000001", "step-000001"]
        assert outcome["two"] == ["latest", "step-000001", "step-000003", "step-000003"]
        assert outcome["closed"] == outcome["two"]
        assert [name for name in outcome["full"] if not name.startswith(".")] == [
            "latest",
            "step-000003",
            "step-000005",
            "step-000005",
        ]
        assert outcome["idle"] == "written"
    out = tmp_path / "out"
    assert [text for text in first["said"] if text.startswith("checkpoint ")] == [
        f"checkpoint {out / name}" for name in ("step-000001", "step-000003", "step-000005")
    ]
    (waiting,) = [text for text in first["said"] if not text.startswith("checkpoint ")]
    assert waiting.startswith("training waits for this checkpoint: copies in main memory need 0.0 GB on ")
    assert second["said"] == []


def poor_ranks(folder: Path, out: Path) -> dict[str, Any]:
    """Save twice in the background. Rank 1 has no memory for copies of the first, and no disk for the second, which
    rank 0 writes until it gets the request to stop."""
    state, layout = fresh_state(folder, {})
    train(state, layout, range(1))
    groups, said, outcome = state.groups, [], dict[str, Any]()
    saver = Saver(out, CheckpointConfig(asynchronous=True), groups, said.append)
    staged, write_part = checkpoint.staged, checkpoint.write_part
    if groups.rank == 1:
        checkpoint.staged = lambda boxes: {box: torch.empty(2**60, dtype=torch.uint8).clone for box in boxes}
    saver.save(state, {"step": 1}, best=None)
    outcome["written at once"] = saver.progress, (out / "step-000001").is_dir()
    checkpoint.staged = staged

    def until_given_up(*args: Any, is_given_up: Callable[[], bool], **settings: Any) -> Any:
        deadline = time.monotonic() + 60
        while not is_given_up() and time.monotonic() < deadline:
            time.sleep(0.01)
        outcome["given up"] = is_given_up()
        return write_part(*args, is_given_up=is_given_up, **settings)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if groups.rank == 0:
        checkpoint.write_part = until_given_up
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    saver.save(state, {"step": 2}, best=None)
    while groups.rank == 1 and saver.progress == "writing":
        time.sleep(0.01)
    outcome["progress"] = groups.gather(saver.progress)
    with pytest.raises(OSError, match="File too large"):
        saver.settle(outcome["progress"])
    groups.gather(None)
    return outcome | {"left": sorted(path.name for path in out.iterdir()), "said": said}


def test_a_rank_without_memory_or_disk_does_not_make_others_wait(model: Path, tmp_path: Path) -> None:
    first, second = run_ranks(poor_ranks, 2, model, tmp_path / "out")
    for outcome in (first, second):
        assert outcome["written at once"] == ("written", True), "not in the background"
        assert outcome["progress"] == ["writing", "failed"]
        assert outcome["left"] == ["latest", "step-000001"]
    assert first["given up"], "rank 0 stops writing when rank 1 has failed"
    assert first["said"][0].startswith(
        "training waits for this checkpoint, because it could not be copied to main memory: rank 1 on "
    )
    assert second["said"] == []


# ---------------------------------------------------------------------------------------------------------------
# The optimizer


def recorded_steps(cases: dict[str, tuple[Path, dict[str, Any]]]) -> dict[str, list[Outcome]]:
    """Record for each step: whole gradients before clipping, their reported norm and rate, and whole weights after the
    step."""
    results = {}
    for name, (folder, settings) in cases.items():
        state, layout = fresh_state(folder, settings)
        rows = []
        for step in range(STEPS):
            gradients(state, layout, step)
            parameters: dict[str, Any] = {**state.parameters()}
            grads = {name: parameter.main_grad for name, parameter in parameters.items()}
            row: Outcome = {"grads": {name: g.clone() for name, g in gather_hf(state, grads).items()}}
            row["norm"], row["rate"] = apply_gradients(state)
            rows.append(row | {"weights": whole_weights(state)})
        results[name] = rows
    return results


# With the distributed optimizer, a rank has whole gradients only where the data-parallel and context-parallel size is
# 1.
OPTIMIZER_LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}, "one_replicated_optimizer": {"distributed_optimizer": False}},
    2: {
        "tp2": {"tensor": 2, "distributed_optimizer": False},
        "tp2_sp": {"tensor": 2, "sequence_parallel": True},
        "pp2": {"pipeline": 2},
        "cp2": {"context": 2, "distributed_optimizer": False},
    },
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_is_torch_adamw_with_clipping_and_schedule(
    model: Path, tmp_path: Path, world_size: int
) -> None:
    """torch's own clip_grad_norm_ and AdamW get our gradients of each step and must reach the same weights."""
    models = {"untied": model, "tied": save_qwen2(tmp_path, tied=True)}
    cases = {
        f"{layout}, {kind}": (folder, settings)
        for layout, settings in OPTIMIZER_LAYOUTS[world_size].items()
        for kind, folder in models.items()
    }
    (first, *_) = run_ranks(recorded_steps, world_size, cases)
    for name, rows in first.items():
        follow_with_torch(load_file(cases[name][0] / "model.safetensors"), rows, name)


def follow_with_torch(start: dict[str, torch.Tensor], rows: list[Outcome], what: str) -> None:
    weights = {name: weight.double().requires_grad_() for name, weight in start.items()}
    plain = [weight for name, weight in weights.items() if name.endswith("bias") or "norm" in name]
    matrices = [weight for name, weight in weights.items() if not (name.endswith("bias") or "norm" in name)]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    for step, (row, rate) in enumerate(zip(rows, RATES, strict=True)):
        assert row["rate"] == pytest.approx(rate, rel=1e-12), f"{what}, step {step}"
        for name, weight in weights.items():
            weight.grad = row["grads"][name].double()
        for group in adam.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), OPTIM.clip_grad)
        assert norm > 2 * OPTIM.clip_grad, "the clip must do something"
        assert row["norm"] == pytest.approx(norm.item(), rel=1e-5), f"{what}, step {step}"
        adam.step()
        for name, weight in weights.items():
            error = (row["weights"][name].double() - weight).abs().max().item()
            assert error < 1e-6, f"{what}, step {step}: {name} off by {error:.1e}"


def one_step_without_gradient(folder: Path) -> dict[str, torch.Tensor]:
    state, _ = fresh_state(folder, {}, OptimConfig(lr=0.5, weight_decay=0.5))
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    apply_gradients(state)
    return whole_weights(state)


def test_weight_decay_leaves_norms_and_biases_alone(model: Path) -> None:
    (after,) = run_ranks(one_step_without_gradient, 1, model)
    before = load_file(model / "model.safetensors")
    assert sum("norm" in name for name in before) == 9
    assert sum(name.endswith("bias") for name in before) == 12
    for name, weight in before.items():
        # A matrix loses rate x decay, which is a quarter of itself.
        factor = 1.0 if "norm" in name or name.endswith("bias") else 0.75
        assert torch.equal(after[name], factor * weight), name
