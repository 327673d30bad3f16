"""What packing is told of a run's model."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_chord.config import ParallelConfig
from megatron_chord.data.packing import plan_step
from megatron_chord.records import Part, TrainSample
from megatron_chord.train.setup import layout_of
from tests.unit.plan.models import shape_of


def test_packing_knows_what_long_sequences_cost() -> None:
    """Qwen2.5-7B: 28 layers of 3584 channels in scores and as many in values, over 2 x 7.07 billion."""
    weights = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 152064 * 3584
    layout = layout_of(shape_of("qwen2.5-7b"), ParallelConfig(tensor=2, sequence_parallel=True), 4)
    assert layout.attention_cost == pytest.approx(28 * 2 * 3584 / (2 * weights))
    assert (layout.data, layout.batch_multiple) == (4, 2)


def test_a_long_sequence_weighs_more_than_its_tokens() -> None:
    """Two ranks: one sequence of 32768 tokens is more work than 18 of 2048, so it gets none of them beside it."""

    def sample(length: int) -> TrainSample:
        part = Part(term="expert", positions=np.arange(1, length), constants={})
        return TrainSample(token_ids=np.zeros(length, np.int64), parts=(part,))

    layout = layout_of(shape_of("qwen2.5-7b"), ParallelConfig(), 2)
    samples = [sample(32768), *(sample(2048) for _ in range(18))]
    plan = plan_step(samples, max_tokens=65536, layout=layout, pad_id=0)
    tokens = [sum(len(batch.token_ids) for batch in batches) for batches in plan.micro_batches]
    # 32768 (1 + 1.42e-5 x 32768) = 48000 tokens' worth, 2048 (1 + 1.42e-5 x 2048) = 2108: the 18 are 37900.
    assert tokens == [32768, 18 * 2048]
