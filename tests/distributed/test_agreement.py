"""The agreement check accepts an engine with the right weights, in BF16 too, and rejects one with a wrong tensor within
one step.

The engine is Transformers with weights of its own. It samples token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig
from megatron_chord.data.packing import plan_step
from megatron_chord.families.table import read_shape
from megatron_chord.losses.aggregate import MIN_COMPARED_TOKENS, drop_zero_gradient_parts, with_scales
from megatron_chord.records import Part, TrainSample
from megatron_chord.train.agreement import LogprobMismatch
from megatron_chord.train.coordinator import StepInputs
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.state import TrainState, build_state
from megatron_chord.train.step import Trained, train_step
from megatron_chord.train.update import Update
from tests.distributed.steps import gather_hf, start_groups
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCAB, save_qwen2, terms_of, tiny_run

PROMPT, ANSWER, ROLLOUTS = 4, 20, 48
MU = 0.3
WRONG = "model.layers.2.mlp.down_proj.weight"


@dataclass
class Pair:
    """A trainer and the engine that samples for it."""

    run: RunConfig
    state: TrainState
    engine: Any
    generator: torch.Generator

    def push(
        self, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights
    ) -> None:
        weights = {
            name: tensor.clone() for name, tensor in gather_hf(self.state, self.state.weights()).items()
        }
        self.engine.load_state_dict(change(weights))

    def sample(self) -> list[TrainSample]:
        """Sample rollouts of zero advantage and draw random demonstrations."""
        ids = torch.randint(3, VOCAB, (ROLLOUTS, PROMPT), generator=self.generator)
        logprobs = []
        with torch.no_grad():
            for _ in range(ANSWER):
                logits = self.engine(ids).logits[:, -1].float()
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=self.generator)
                logprobs.append(logits.log_softmax(-1).gather(1, chosen))
                ids = torch.cat([ids, chosen], 1)
        where = np.arange(PROMPT, PROMPT + ANSWER)
        found = [
            Part(term="policy", positions=where, constants={"advantage": 0.0, "rollout_logprob": row.numpy()})
            for row in torch.cat(logprobs, 1)
        ]
        samples = [
            TrainSample(token_ids=row.numpy(), parts=(part,)) for row, part in zip(ids, found, strict=True)
        ]
        demonstrations = torch.randint(3, VOCAB, (2, 12), generator=self.generator).numpy()
        return samples + [
            TrainSample(token_ids=row, parts=(Part(term="sft", positions=np.arange(4, 12)),))
            for row in demonstrations
        ]

    def step(self, number: int) -> Trained:
        terms = terms_of(self.run)
        kept = drop_zero_gradient_parts(with_scales(self.sample(), terms), terms)
        plan = plan_step(
            kept,
            max_tokens=400,
            layout=packing_layout(self.state.shape, self.run.parallel, self.state.groups.data.size),
            pad_id=0,
        )
        inputs = StepInputs(
            updates=(Update(weights={"policy": 1 - MU, "sft": MU}, counts=plan.counts),),
            mu=MU,
            stats={},
            seconds={},
            num_tokens=1,
            squared_tokens=1,
            weight_version=number,
        )
        mine = plan.micro_batches[self.state.groups.data.rank]
        return train_step(self.run, self.state, terms, inputs, [mine], step=number, mu_gradient=None)


def make_pair(folder: Path, dtype: Any, axes: dict[str, Any], lr: float = 3e-4) -> Pair:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    parallel = ParallelConfig(distributed_optimizer=False, **axes)
    model = ModelConfig(path=folder, dtype=dtype)
    run = replace(tiny_run(folder), model=model, parallel=parallel)
    state = build_state(
        read_shape(folder), model, parallel, OptimConfig(lr=lr), groups=start_groups(parallel), steps=40
    )
    engine = AutoModelForCausalLM.from_pretrained(
        folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    )
    return Pair(run=run, state=state, engine=engine, generator=torch.Generator().manual_seed(3))


def thirty_steps(folders: dict[str, Path]) -> dict[str, list[dict[str, float]]]:
    """Return, for each model in BF16, what each step measured. The demonstrations move the weights."""
    found = {}
    for name, folder in folders.items():
        pair, found[name] = make_pair(folder, "bf16", {}), []
        for number in range(30):
            pair.push()
            result = pair.step(number).result
            found[name].append({**result.means, **result.compared})
    return found


def wrong_tensors(folders: dict[str, Path], axes: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return, for each model and dtype, what the steps say: of an engine with one wrong tensor, and of a right one."""
    said = {}
    for name, folder in folders.items():
        for dtype in ("bf16", "fp32"):
            said[f"{name} in {dtype}"] = wrong_tensor(make_pair(folder, dtype, axes, lr=0.1))
    return said


def wrong_tensor(pair: Pair) -> dict[str, str]:
    said = {}

    def attempt(name: str, number: int) -> None:
        try:
            pair.step(number)
            said[name] = "nothing"
        except LogprobMismatch as error:
            said[name] = str(error)

    pair.push(lambda weights: weights | {WRONG: weights[WRONG].roll(1, 0)})
    attempt("permuted", 0)
    before = gather_hf(pair.state, pair.state.weights())[WRONG].clone()
    pair.push()
    attempt("right", 0)
    pair.push(lambda weights: weights | {WRONG: before})
    attempt("stale", 1)
    pair.push()
    attempt("right again", 1)
    return said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models: in one the sampled tokens' logits are around 2, in the other mostly between 16 and 32. BF16 numbers
    there are multiples of 0.125."""
    from safetensors.torch import load_file, save_file

    folders = {}
    for name, factor in {"small logits": 1.0, "large logits": 8.0}.items():
        folders[name] = save_qwen2(tmp_path_factory.mktemp("model"))
        tensors = load_file(folders[name] / "model.safetensors")
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * factor
        save_file(tensors, folders[name] / "model.safetensors", {"format": "pt"})
    return folders


def test_equal_rewards_in_bf16_for_thirty_steps(models: dict[str, Path]) -> None:
    (found,) = run_ranks(thirty_steps, 1, models)
    for name, rows in found.items():
        assert len(rows) == 30
        for row in rows:
            assert MIN_COMPARED_TOKENS <= row["tokens"] < MIN_COMPARED_TOKENS + ANSWER
            assert 16 < row["logit"] / row["tokens"] < 32 or name == "small logits"
    # A fixed limit of 0.05, which ignores the size of the logits, would have stopped this run.
    assert min(row["logprob_gap"] for row in found["large logits"]) > 0.05


@pytest.mark.parametrize("axes", [{}, {"tensor": 2}], ids=str)
def test_a_wrong_tensor_is_noticed_within_one_step(models: dict[str, Path], axes: dict[str, Any]) -> None:
    for rank in run_ranks(wrong_tensors, 2 if axes else 1, models, axes):
        for name, said in rank.items():
            assert (said["right"], said["right again"]) == ("nothing", "nothing"), name
            for wrong, step in {"permuted": 0, "stale": 1}.items():
                assert said[wrong].startswith(f"step {step}: trainer and rollout log-probs of the same "), (
                    f"{name}: {said}"
                )
