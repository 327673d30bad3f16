"""Every sample is packed once, where it fits, with targets of its own; and the ranks get equal shares."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from megatron_chord.data.packing import (
    Layout,
    PackedBatch,
    StepPlan,
    balanced_bins,
    context_order,
    context_shard,
    make_layout,
    pack,
    plan_step,
)
from megatron_chord.records import TrainSample

PAD = 0
LAYOUTS = {
    "one": make_layout(data=1, tensor=1, pipeline=1, context=1, sequence_parallel=False, virtual=False),
    "dp3": make_layout(data=3, tensor=2, pipeline=2, context=1, sequence_parallel=False, virtual=False),
    "tp4_sp": make_layout(data=2, tensor=4, pipeline=1, context=1, sequence_parallel=True, virtual=False),
    "pp2_vpp": make_layout(data=2, tensor=1, pipeline=2, context=1, sequence_parallel=False, virtual=True),
    "cp2": make_layout(data=1, tensor=1, pipeline=1, context=2, sequence_parallel=False, virtual=False),
    "cp3_tp2_sp_pp4_vpp": make_layout(
        data=2, tensor=2, pipeline=4, context=3, sequence_parallel=True, virtual=True
    ),
}
CONTEXT = {"cp2": 2, "cp3_tp2_sp_pp4_vpp": 3}


def random_samples(rng: np.random.Generator, count: int) -> list[TrainSample]:
    """Samples whose every trained token can be recognised: its id, advantage and log-prob are its own."""
    samples = []
    for index in range(count):
        length = int(rng.integers(2, 60))
        is_expert = bool(rng.random() < 0.5)
        trained = rng.random(length) < 0.6
        trained[0] = False
        ids = 1000 * (index + 1) + np.arange(length)
        samples.append(
            TrainSample(
                kind="expert" if is_expert else "policy",
                token_ids=ids,
                trained=trained,
                advantage=0.0 if is_expert else float(index + 1),
                rollout_logprobs=None if is_expert else np.where(trained, -ids, 0).astype(np.float32),
            )
        )
    return samples


def sequences_of(batch: PackedBatch) -> list[np.ndarray]:
    return np.split(batch.token_ids, batch.cu_seqlens[1:-1])


def trained_rows(batch: PackedBatch) -> list[tuple[int, bool, float, float]]:
    """(target, is expert, advantage, rollout log-prob) of each trained token."""
    columns = (batch.targets, batch.is_expert, batch.advantages, batch.rollout_logprobs)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def expected_rows(samples: list[TrainSample]) -> list[tuple[int, bool, float, float]]:
    return [
        (
            int(token),
            sample.kind == "expert",
            sample.advantage,
            0.0 if sample.kind == "expert" else -float(token),
        )
        for sample in samples
        for token in sample.token_ids[sample.trained]
    ]


def batches_of(plan: StepPlan) -> list[PackedBatch]:
    return [batch for rank in plan.micro_batches for batch in rank]


def check_well_formed(batch: PackedBatch, layout: Layout) -> None:
    length = len(batch.token_ids)
    starts = batch.cu_seqlens.tolist()
    assert starts[0] == 0
    assert starts[-1] == length > 0
    sizes = np.diff(starts)
    assert (sizes > 0).all()
    assert not (sizes % layout.sequence_multiple).any()
    assert length % layout.batch_multiple == 0
    assert batch.position_ids.tolist() == [position for size in sizes for position in range(size)]
    # The token after a loss position is its target, and belongs to the same sequence.
    assert batch.token_ids[batch.loss_positions + 1].tolist() == batch.targets.tolist()
    assert not np.isin(batch.loss_positions + 1, starts).any()
    types = {"token_ids": "i8", "position_ids": "i8", "cu_seqlens": "i4", "loss_positions": "i8"}
    types |= {"targets": "i8", "is_expert": "?", "advantages": "f4", "rollout_logprobs": "f4"}
    assert {name: getattr(batch, name).dtype for name in types} == {n: np.dtype(t) for n, t in types.items()}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("max_tokens", [20, 64, 1000])
def test_plans_of_random_steps(name: str, max_tokens: int) -> None:
    layout = LAYOUTS[name]
    for seed in range(25):
        rng = np.random.default_rng(seed)
        samples = random_samples(rng, count=int(rng.integers(0, 30)))
        plan = plan_step(samples, max_tokens=max_tokens, layout=layout, pad_id=PAD)
        counts = {len(rank) for rank in plan.micro_batches}
        assert len(plan.micro_batches) == layout.data
        assert len(counts) == 1
        assert counts.pop() % layout.count_multiple == 0
        assert plan.micro_batches[0]
        found = []
        for batch in batches_of(plan):
            check_well_formed(batch, layout)
            real = [sequence[sequence != PAD] for sequence in sequences_of(batch)]
            held = [sequence.tolist() for sequence in real if len(sequence)]
            used = sum(-(-len(ids) // layout.sequence_multiple) * layout.sequence_multiple for ids in held)
            assert used <= max_tokens or len(held) == 1
            assert len(batch.token_ids) - used < layout.batch_multiple or not held
            found += held
        assert sorted(found) == [sample.token_ids.tolist() for sample in samples]
        rows = [row for batch in batches_of(plan) for row in trained_rows(batch)]
        expected = expected_rows(samples)
        assert sorted(rows) == sorted(expected)
        assert plan.num_expert_tokens == sum(is_expert for _, is_expert, _, _ in expected)
        assert plan.num_policy_tokens == len(expected) - plan.num_expert_tokens


@pytest.mark.parametrize("name", CONTEXT)
def test_context_shards_partition_tokens_and_loss_positions(name: str) -> None:
    layout, context = LAYOUTS[name], CONTEXT[name]
    for seed in range(20):
        samples = random_samples(np.random.default_rng(seed), count=5)
        batch = pack(samples, layout=layout, pad_id=PAD)
        shards = [context_shard(batch, context, rank) for rank in range(context)]
        whole = Counter(zip(batch.token_ids.tolist(), batch.position_ids.tolist(), strict=True))
        parts = Counter(
            pair
            for shard in shards
            for pair in zip(shard.token_ids.tolist(), shard.position_ids.tolist(), strict=True)
        )
        assert parts == whole
        assert sorted(row for shard in shards for row in trained_rows(shard)) == sorted(
            expected_rows(samples)
        )
        for shard in shards:
            assert len(shard.token_ids) == len(batch.token_ids) // context
            assert shard.cu_seqlens is batch.cu_seqlens
            # A sample's ids count up, so the token that predicts a target is the target less one.
            assert (shard.token_ids[shard.loss_positions] == shard.targets - 1).all()


def test_one_context_rank_holds_the_batch_itself() -> None:
    batch = pack(random_samples(np.random.default_rng(0), 3), layout=Layout(), pad_id=PAD)
    assert context_shard(batch, 1, 0) is batch


def test_context_order_by_hand() -> None:
    # 12 tokens in 2 x 2 chunks of 3: rank 0 holds the outer two, rank 1 the inner two.
    assert context_order(12, 2, 0).tolist() == [0, 1, 2, 9, 10, 11]
    assert context_order(12, 2, 1).tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("context", [1, 2, 3, 4, 8])
def test_context_order_is_a_partition_with_equal_work(context: int) -> None:
    length = 6 * context
    held = [context_order(length, context, rank) for rank in range(context)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    # A token at position i attends to i + 1 tokens.
    assert len({int((positions + 1).sum()) for positions in held}) == 1


def test_two_samples_by_hand() -> None:
    expert = TrainSample(kind="expert", token_ids=np.array([5, 6, 7]), trained=np.array([False, True, True]))
    policy = TrainSample(
        kind="policy",
        token_ids=np.array([8, 9]),
        trained=np.array([False, True]),
        advantage=-0.5,
        rollout_logprobs=np.array([0, -1.5], np.float32),
    )
    # Sequences of a multiple of 2 in a batch of a multiple of 4: a pad after 7, and a tail of two.
    layout = Layout(sequence_multiple=2, batch_multiple=4)
    batch = pack([expert, policy], layout=layout, pad_id=1)
    assert batch.token_ids.tolist() == [5, 6, 7, 1, 8, 9, 1, 1]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.loss_positions.tolist() == [0, 1, 4]
    assert trained_rows(batch) == [(6, True, 0.0, 0.0), (7, True, 0.0, 0.0), (9, False, -0.5, -1.5)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_with_nothing_to_do_get_padding_without_a_trained_token(name: str) -> None:
    layout = LAYOUTS[name]
    sample = random_samples(np.random.default_rng(1), 1)
    plan = plan_step(sample, max_tokens=64, layout=layout, pad_id=PAD)
    used = [batch for batch in batches_of(plan) if batch.token_ids.any()]
    empty = [batch for batch in batches_of(plan) if not batch.token_ids.any()]
    assert len(used) == 1
    assert len(empty) == layout.data * layout.count_multiple - 1
    for batch in empty:
        check_well_formed(batch, layout)
        assert trained_rows(batch) == []
        assert len(batch.token_ids) == max(layout.sequence_multiple, layout.batch_multiple)


def test_a_sample_above_the_budget_is_alone() -> None:
    assert balanced_bins([3, 50, 4, 60], capacity=10) == [[3], [1], [0, 2]]
    assert balanced_bins([50], capacity=10, multiple=2, rank_multiple=2) == [[0], [], [], []]
    assert balanced_bins([], capacity=10, multiple=3) == [[], [], []]


def test_exactly_full_bins() -> None:
    assert sorted(balanced_bins([10, 10, 10], capacity=10)) == [[0], [1], [2]]
    assert sorted(balanced_bins([6, 4, 5, 5], capacity=10)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("data", "max_tokens"), [(1, 4096), (4, 4096), (8, 2048)])
def test_balance_on_lengths_like_gsm8k(data: int, max_tokens: int) -> None:
    """192 samples of 260 tokens in the median, the longest three to five times that; 6 to 15 of them to a bin."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        prompt = rng.lognormal(np.log(90), 0.35, 192)
        response = rng.lognormal(np.log(160), 0.5, 192)
        lengths = np.clip(prompt + response, 40, 1500).astype(int).tolist()
        bins = balanced_bins(lengths, capacity=max_tokens, multiple=data)
        sums = np.array([sum(lengths[i] for i in members) for members in bins])
        assert sums.max() <= max_tokens
        assert sums.max() / sums.mean() < 1.1
        ranks = np.array([sums[rank::data].sum() for rank in range(data)])
        assert ranks.max() / ranks.mean() < 1.03
        # Not many more bins than the tokens need: the next multiple of the ranks, or the one after.
        assert len(bins) <= (-(-sum(lengths) // (max_tokens * data)) + 1) * data
