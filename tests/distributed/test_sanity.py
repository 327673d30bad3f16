"""An update with non-finite numbers is left out on all ranks, and no checkpoint or export ever holds such a number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config import OptimConfig, ParallelConfig, RunConfig
from megatron_chord.data.packing import plan_step
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.model.forward import unwrapped
from megatron_chord.records import TrainSample
from megatron_chord.train import checkpoint
from megatron_chord.train.coordinator import StepInputs
from megatron_chord.train.export import export_policy
from megatron_chord.train.halt import Halted, halting
from megatron_chord.train.health import Health
from megatron_chord.train.sanity import MARK, check_finite
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.state import TrainState
from megatron_chord.train.step import Trained, train_step
from megatron_chord.train.update import Update
from tests.distributed.steps import build
from tests.support.ranks import run_ranks
from tests.support.task import make_task, metrics_of, run_cli
from tests.support.tiny import make_samples, save_qwen2, terms_of, tiny_run

ALLOWED = 2


def with_constants(samples: list[TrainSample], **constants: float) -> list[TrainSample]:
    """Set constants of all tokens of the first rollout."""
    first = samples[0].parts[0]
    part = replace(first, constants={**first.constants, **constants})
    return [replace(samples[0], parts=(part,)), *samples[1:]]


class Training:
    def __init__(self, folder: Path, output: Path, axes: dict[str, Any]) -> None:
        parallel = ParallelConfig(**axes)
        run = tiny_run(folder, parallel=axes, max_tokens=40)
        self.run: RunConfig = replace(
            run,
            output=output,
            rollout=replace(run.rollout, max_logprob_gap=1e9, max_probability_error=1e9),
            optim=OptimConfig(lr=1e-3, skip_nonfinite=ALLOWED),
        )
        self.state: TrainState = build(folder, parallel, self.run.optim)
        self.health = Health()
        self.steps = 0

    def step(self, advantage: float, **constants: float) -> Trained:
        terms, state = terms_of(self.run), self.state
        samples = with_scales(with_constants(make_samples(), advantage=advantage, **constants), terms)
        layout = packing_layout(state.shape, self.run.parallel, state.groups.data.size)
        plan = plan_step(samples, max_tokens=40, layout=layout, pad_id=0)
        inputs = StepInputs(
            updates=(Update(weights={"policy": 0.7, "sft": 0.3}, counts=plan.counts),),
            mu=0.3,
            stats={},
            seconds={},
            num_tokens=1,
            squared_tokens=1,
            weight_version=self.steps,
        )
        self.steps += 1
        return train_step(
            self.run,
            state,
            terms,
            inputs,
            [plan.micro_batches[state.groups.data.rank]],
            step=self.steps - 1,
            mu_gradient=None,
            health=self.health,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.state.weights().items()}


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def left_out(folder: Path, output: Path, axes: dict[str, Any]) -> dict[str, Any]:
    training = Training(folder, output, axes)
    before = training.weights()
    found: dict[str, Any] = {}
    lost = training.step(float("nan"))
    found["skipped"] = (lost.num_skipped, lost.grad_norm, same(before, training.weights()))
    good = training.step(1.0)
    found["good"] = (good.num_skipped, same(before, training.weights()), training.health.skipped_in_a_row)
    # The loss is finite. The gradient of one parameter on the last rank is not.
    before = training.weights()
    parameter = next(iter(training.state.parameters().values()))
    is_last = training.state.groups.rank == training.state.groups.world_size - 1
    hook = parameter.register_hook(lambda grad: grad * (torch.nan if is_last else 1.0))
    found["gradient"] = (training.step(1.0).num_skipped, same(before, training.weights()))
    training.step(1.0)
    found["one too many"] = error_of(lambda: training.step(1.0))
    found["still"] = same(before, training.weights())
    hook.remove()
    # The health record is saved as JSON in a checkpoint.
    health = Health()
    health.restore(json.loads(json.dumps(training.health.to_json())))
    found["health"] = health == training.health
    found["norms"] = len(health.norms)
    training.step(1.0)
    found["kinds"] = {
        f"{kind} {value}": skipped(training, kind, value)
        for kind in ("activation", "rollout_logprob")
        for value in (torch.nan, torch.inf, -torch.inf)
        # A rollout's log-prob of -inf is a ratio of infinity, which is clipped.
        if (kind, value) != ("rollout_logprob", -torch.inf)
    }
    return found


def skipped(training: Training, kind: str, value: float) -> tuple[int, bool, int]:
    """Run an update with one broken activation on the last rank, or with a broken log-prob. Then run a good one.

    Return the number of skipped updates, whether the weights stayed the same, and the number of the good one's.
    """
    before, groups = training.weights(), training.state.groups
    if kind == "activation":
        modules = dict(unwrapped(training.state.chunks[-1]).named_modules())
        name = max(name for name in modules if name.endswith(".mlp"))
        is_last = groups.rank == groups.world_size - 1
        hook = modules[name].register_forward_hook(lambda *args: broken(args[-1], value) if is_last else None)
        lost = training.step(1.0)
        hook.remove()
    else:
        lost = training.step(1.0, **{kind: value})
    stays = same(before, training.weights())
    check_finite(training.state, "not exported")
    return lost.num_skipped, stays, training.step(1.0).num_skipped


def broken(output: tuple[torch.Tensor, Any], value: float) -> tuple[torch.Tensor, Any]:
    """Replace one number of the hidden state of the third token."""
    hidden, bias = output
    hidden = hidden.clone()
    hidden[2, 0, 5] = value
    return hidden, bias


def never_saved(folder: Path, output: Path, axes: dict[str, Any]) -> dict[str, Any]:
    training = Training(folder, output, axes)
    state, groups, found = training.state, training.state.groups, {}
    training.step(1.0)
    name, weight = list(state.parameters().items())[-1]
    is_last = groups.rank == groups.world_size - 1

    def save(step: int) -> None:
        checkpoint.save(state, {"step": step}, output / "checkpoints", keep=5)

    def everything() -> list[str]:
        return groups.once(lambda: sorted(path.name for path in output.glob("*/*")))

    save(1)
    kept = weight.data.flatten()[0].clone()
    weight.data.flatten()[0] = torch.nan if is_last else kept
    found["name"] = groups.gather(name)[-1]
    found["weight"] = (
        error_of(lambda: save(2)),
        error_of(lambda: export_policy(state, folder, output / "policy")),
    )
    found["after"] = everything()
    # Write a checkpoint without the check, as an older version did. Only the first data-parallel rank's weights are
    # written.
    weight.data.flatten()[0] = torch.nan if is_last or not axes else kept
    check = checkpoint.check_finite
    checkpoint.check_finite = lambda *args, **kwargs: None
    save(3)
    checkpoint.check_finite = check
    groups.once(lambda: unmark(output / "checkpoints" / "step-000003"))
    said: list[str] = []
    found["found"] = checkpoint.find(output / "checkpoints", said.append, groups)
    found["said"] = groups.once(lambda: said)
    weight.data.flatten()[0] = kept
    # A moment that is not finite would break the next update.
    inner = state.optimizer.chained_optimizers[0].optimizer
    moment = next(iter(inner.state.values()))["exp_avg"]
    moment.flatten()[0] = torch.inf if is_last else 0.0
    found["moment"] = error_of(lambda: save(4))
    found["at last"] = everything()
    return found


def unmark(folder: Path) -> None:
    path, manifest = folder / checkpoint.RUN_STATE, folder / checkpoint.MANIFEST
    state = json.loads(path.read_text())
    assert state.pop(MARK) is True
    path.write_text(json.dumps(state))
    import hashlib

    digests = json.loads(manifest.read_text())
    digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(digests))


LAYOUTS = [(1, {}), (2, {"tensor": 2}), (2, {})]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("model"), layers=2)


@pytest.mark.parametrize(("ranks", "axes"), LAYOUTS, ids=str)
def test_an_update_that_is_not_finite_is_left_out(
    model: Path, tmp_path: Path, ranks: int, axes: dict[str, Any]
) -> None:
    for found in run_ranks(left_out, ranks, model, tmp_path, axes):
        assert found["skipped"] == (1, None, True)
        assert found["good"] == (0, False, 0)
        assert found["gradient"] == (1, True)
        where = tmp_path / "nonfinite" / "step-000004-update-0"
        assert found["one too many"] == (
            "NonFiniteGradient: step 4: the gradient norm is nan; no weight has been changed by it, after 2 skipped "
            f"updates (optim.skip_nonfinite is 2). The batch is in {where}"
        )
        assert found["still"]
        assert (found["health"], found["norms"]) == (True, 1)
        assert found["kinds"] == dict.fromkeys(found["kinds"], (1, True, 0))
        assert len(found["kinds"]) == 5
    folders = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert folders == [f"step-{step:06d}-update-0" for step in (0, 2, 3, 4, 6, 8, 10, 12, 14)]
    files = sorted((tmp_path / "nonfinite" / folders[0]).iterdir())
    assert len(files) == (ranks if not axes else 1), "one of each data-parallel rank"
    batches = [batch for file in files for batch in json.loads(file.read_text())["micro_batches"]]
    # Every token of every sample is in the dump, and NaN is written as "nan".
    sent = sorted(token for sample in make_samples() for token in sample.token_ids.tolist())
    assert sorted(token for batch in batches for token in batch["token_ids"] if token) == sent
    advantages = [a for batch in batches for a in batch["terms"]["policy"]["constants"]["advantage"]]
    assert advantages.count("nan") == len(make_samples()[0].parts[0].positions)
    for batch in batches:
        for term in batch["terms"].values():
            assert all(0 < place < len(batch["token_ids"]) for place in term["positions"])


@pytest.mark.parametrize(("ranks", "axes"), LAYOUTS, ids=str)
def test_what_is_not_finite_is_never_saved_nor_resumed(
    model: Path, tmp_path: Path, ranks: int, axes: dict[str, Any]
) -> None:
    for found in run_ranks(never_saved, ranks, model, tmp_path, axes):
        saved, exported = found["weight"]
        assert saved.startswith("NonFiniteWeights: not all numbers are finite in ")
        assert found["name"] in saved
        assert saved.endswith("; no checkpoint was written; --resume auto continues from the previous one")
        assert exported.endswith(f"; {tmp_path / 'policy'} was not written")
        assert found["after"] == ["latest", "step-000001"]
        assert found["found"] == tmp_path / "checkpoints" / "step-000001"
        (said,) = found["said"]
        assert "step-000003 is damaged and was skipped: not all numbers are finite in " in said
        assert found["moment"].startswith(
            "NonFiniteWeights: not all numbers are finite in the optimizer's exp_avg"
        )
        assert found["at last"] == ["latest", "step-000001", "step-000003"]


def test_a_run_of_broken_weights_ends_with_a_message(tmp_path: Path) -> None:
    """Both updates of the run are left out. Then the weights cannot be saved."""
    from safetensors.torch import load_file, save_file

    data = {
        "prompts": "train.jsonl",
        "demonstrations": "train.jsonl",
        "max_prompt_tokens": 64,
        "max_response_tokens": 12,
    }
    config = make_task(tmp_path, data=data, method={"mu": {"peak": 1.0}}, steps=2)
    path = tmp_path / "policy" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    result = run_cli("train", str(config))
    assert result.returncode == 70, result.stdout + result.stderr
    assert (
        "error: NonFiniteWeights: not all numbers are finite in decoder.final_layernorm.weight"
        in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert result.stdout.count("1 update(s) skipped: not finite") == 2
    rows = metrics_of(tmp_path / "out")
    assert [(row["skipped_updates"], "loss" in row["not_finite"]) for row in rows] == [(1, True)] * 2
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))
    assert not list((tmp_path / "out").glob("*policy*"))


def test_every_stop_that_is_listed_has_an_exit_code() -> None:
    from megatron_chord.train import halt
    from tests.support.ranks import ROOT

    text = (ROOT / "docs" / "running.md").read_text()
    for kinds, code in ((halt._NUMBERS, 70), (halt._SERVICE, 69), (halt.ALONE, 79)):
        for kind in kinds:
            with pytest.raises(Halted, match=f"^{kind.__name__}: what$") as caught, halting():
                raise kind("what")
            assert caught.value.exit_code == code
            (row,) = [
                line for line in text.splitlines() if line.startswith("| `") and f"`{kind.__name__}`" in line
            ]
            assert f"| {code} |" in row


def test_spikes_are_measured_against_the_median_of_the_steps_before() -> None:
    health = Health()
    assert [health.norm_ratio(norm) for norm in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0)] == [None] * 8
    assert health.norm_ratio(45.0) == 10.0  # the median of 1 to 7 and 100 is 4.5
    for _ in range(100):
        health.norm_ratio(0.0)
    assert health.norm_ratio(1.0) is None, "of nothing but zeros there is no ratio"
