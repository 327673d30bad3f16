"""The properties of a run's model that packing uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chord.config import EvaluationConfig, EvaluationSetConfig, ParallelConfig, PartialConfig
from megatron_chord.data.packing import plan_step
from megatron_chord.methods.table import method_of
from megatron_chord.records import Part, TrainSample
from megatron_chord.train.setup import coordinator_timeout_s, packing_layout, plan_lines
from tests.support.published import shape_of
from tests.support.tiny import tiny_run


def test_packing_knows_what_long_sequences_cost() -> None:
    """Qwen2.5-7B has 28 layers with 3584 channels in scores and as many in values, over 2 x 7.07 billion."""
    weights = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 152064 * 3584
    layout = packing_layout(shape_of("qwen2.5-7b"), ParallelConfig(tensor=2, sequence_parallel=True), 4)
    assert layout.attention_cost == pytest.approx(28 * 2 * 3584 / (2 * weights))
    assert (layout.data, layout.batch_multiple) == (4, 2)


def test_a_long_sequence_weighs_more_than_its_tokens() -> None:
    """One sequence of 32768 tokens is more work than 18 of 2048, so of two ranks its rank gets none of the short
    ones."""

    def sample(length: int) -> TrainSample:
        part = Part(term="sft", positions=np.arange(1, length), constants={})
        return TrainSample(token_ids=np.zeros(length, np.int64), parts=(part,))

    layout = packing_layout(shape_of("qwen2.5-7b"), ParallelConfig(), 2)
    samples = [sample(32768), *(sample(2048) for _ in range(18))]
    plan = plan_step(samples, max_tokens=65536, layout=layout, pad_id=0)
    tokens = [sum(len(batch.token_ids) for batch in batches) for batches in plan.micro_batches]
    # 32768 (1 + 1.42e-5 x 32768) counts as 48000 tokens, 2048 (1 + 1.42e-5 x 2048) as 2108: the 18 count as 37900.
    assert tokens == [32768, 18 * 2048]


@pytest.mark.parametrize(
    ("precision", "ratio_from", "expected"),
    [
        (
            "fp8_e2e",
            "current",
            "precision   fp8_e2e: the trainer's matrix products in e4m3 blockwise; micro-batches padded to multiples "
            "of 512 tokens; rollouts quantised by vLLM, fp8_per_block; corrected for by each token's weight, truncate",
        ),
        (
            "fp8_tensorwise",
            "rollout",
            "precision   fp8_tensorwise: the trainer's matrix products in hybrid tensorwise, first and last layer in "
            "BF16; micro-batches padded to multiples of 64 tokens; rollouts quantised by vLLM, fp8_per_tensor; the "
            "ratio corrects for it",
        ),
        ("bf16", "rollout", "precision   bf16: training in BF16; rollouts in BF16"),
    ],
)
def test_the_plan_says_what_a_precision_means(
    tmp_path: Path, precision: Any, ratio_from: Any, expected: str
) -> None:
    run = tiny_run(tmp_path, ratio_from=ratio_from, parallel={"tensor": 4, "sequence_parallel": True})
    run = replace(run, model=replace(run.model, dtype="bf16"), precision=precision)
    said: list[str] = []
    plan_lines(run, shape_of("qwen2.5-7b"), method_of(run), 4, said.append)
    assert [line for line in said if line.startswith("precision")] == [expected]


@pytest.mark.parametrize(
    ("unfinished", "ratio_from", "expected"),
    [
        (
            "carry",
            "rollout",
            "early stop  4 prompts are sampled until 3 are finished; unfinished answers are carried over to the next "
            "step; older weights are the denominator of the ratio",
        ),
        (
            "carry",
            "current",
            "early stop  4 prompts are sampled until 3 are finished; unfinished answers are carried over to the next "
            "step; older weights are corrected for by each token's weight, truncate",
        ),
        (
            "drop",
            "rollout",
            "early stop  4 prompts are sampled until 3 are finished; unfinished answers are dropped, so that prompts "
            "with long answers are trained on less often (rollout.partial.unfinished: drop)",
        ),
    ],
)
def test_the_plan_says_what_becomes_of_unfinished_prompts(
    tmp_path: Path, unfinished: Any, ratio_from: Any, expected: str
) -> None:
    run = tiny_run(tmp_path, ratio_from=ratio_from)
    run = replace(run, rollout=replace(run.rollout, partial=PartialConfig(unfinished=unfinished)))
    said: list[str] = []
    plan_lines(run, shape_of("qwen2.5-7b"), method_of(run), 1, said.append)
    assert [line for line in said if line.startswith("early stop")] == [expected]


def test_the_plan_has_lengths_evaluations_and_updates(tmp_path: Path) -> None:
    sets = (
        EvaluationSetConfig(name="amc", path=(Path("amc.jsonl"),), every=5, samples=8, temperature=0.6),
        EvaluationSetConfig(name="last", path=(Path("last.jsonl"),), every=0),
    )
    run = tiny_run(tmp_path)
    run = replace(run, steps=1, seed=7, evaluation=EvaluationConfig(sets=sets))
    run = replace(
        run,
        batch=replace(run.batch, updates_per_step=2, epochs=3),
        data=replace(run.data, max_prompt_tokens=99),
    )
    said: list[str] = []
    plan_lines(run, shape_of("qwen2.5-7b"), method_of(run), 1, said.append)
    assert said[0].startswith("run         1 step, seed 7; prompts of at most 99 tokens, answers of at most ")
    assert [line for line in said if line.startswith("evaluation")] == [
        "evaluation  amc: before the first step, every 5 steps and after the last; temperature 0.6, 8 answers to each "
        "problem; avg@8",
        "evaluation  last: before the first step and after the last; temperature 0.0, 1 answer to each problem; avg@1",
    ]
    (step,) = (line for line in said if line.startswith("one step"))
    assert "; 3 passes over the samples with 2 optimizer updates each; " in step


def test_ranks_wait_long_enough_for_an_evaluation_of_several_sets(tmp_path: Path) -> None:
    """The coordinator asks one set after the other, and each may take as long as the sampling of a step."""
    run = tiny_run(tmp_path)
    names = [f"set{index}" for index in range(9)]
    sets = tuple(EvaluationSetConfig(name=name, path=(Path(f"{name}.jsonl"),), every=1) for name in names)
    several = replace(run, evaluation=EvaluationConfig(sets=sets), data=replace(run.data, evaluation=None))
    longer = coordinator_timeout_s(several, method_of(several)) - coordinator_timeout_s(run, method_of(run))
    rounds = len(sets) - method_of(run).max_sampling_rounds(run.batch)
    assert longer >= rounds * run.timeouts.sampling_s
