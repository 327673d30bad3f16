"""Every sample is packed exactly once, within the budget and with its own targets, and ranks get nearly equal work."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_chord.data.packing import (
    Layout,
    PackedBatch,
    StepPlan,
    balanced_bins,
    columns_of,
    context_order,
    context_shard,
    dealt,
    held_targets,
    make_layout,
    pack,
    plan_step,
    token_counts,
)
from megatron_chord.records import Part, TrainSample

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


COLUMNS = {"sft": ("phase",), "policy": ("advantage", "rollout_logprob"), "unset": ()}
Row = tuple[int, str, int, tuple[tuple[str, float], ...]]


def random_samples(rng: np.random.Generator, count: int) -> list[TrainSample]:
    """Samples in which every trained token is unique: no other has its id and its constants.

    Their parts have one to three terms, which are mixed within the sample, in any order. Some parts are empty.
    """
    samples = []
    for index in range(count):
        length = int(rng.integers(2, 60))
        ids = 1000 * (index + 1) + np.arange(length)
        owner = rng.integers(0, 6, length) % rng.integers(1, 7)
        parts = [
            Part(term=term, positions=positions, constants=constants_of(term, index, ids[positions]))
            for number, term in enumerate(COLUMNS)
            if len(positions := np.flatnonzero((owner == number) & (np.arange(length) > 0)))
            or rng.random() < 0.3
        ]
        samples.append(TrainSample(token_ids=ids, parts=tuple(parts[i] for i in rng.permutation(len(parts)))))
    return samples


def constants_of(term: str, sample: int, ids: np.ndarray) -> dict[str, float | np.ndarray]:
    if term == "policy":
        return {"rollout_logprob": -ids.astype(np.float32), "advantage": sample + 0.5}
    return {"phase": sample * 2} if term == "sft" else {}


def sequences_of(batch: PackedBatch) -> list[np.ndarray]:
    return np.split(batch.token_ids, batch.cu_seqlens[1:-1])


def trained_rows(batch: PackedBatch) -> list[Row]:
    """Return (target, term, number of tokens of its part, constants) for each trained token."""
    return [
        (
            int(batch.targets[term.index[k]]),
            name,
            int(term.lengths[term.sequence[k]]),
            tuple(sorted((key, float(column[k])) for key, column in term.columns.items())),
        )
        for name, term in batch.terms.items()
        for k in range(len(term.index))
    ]


def expected_rows(samples: list[TrainSample]) -> list[Row]:
    return [
        (
            int(token),
            part.term,
            len(part.positions),
            tuple(
                sorted(
                    (key, float(value if isinstance(value, float | int) else value[k]))
                    for key, value in part.constants.items()
                )
            ),
        )
        for sample in samples
        for part in sample.parts
        for k, token in enumerate(sample.token_ids[part.positions])
    ]


def trained_sequences(*batches: PackedBatch) -> set[tuple[str, frozenset[int]]]:
    """Return the targets of each sequence of a term. The batches must number their sequences in the same way."""
    found: dict[tuple[str, int], set[int]] = {}
    for batch in batches:
        for name, term in batch.terms.items():
            for k, sequence in enumerate(term.sequence.tolist()):
                found.setdefault((name, sequence), set()).add(int(batch.targets[term.index[k]]))
    return {(name, frozenset(targets)) for (name, _), targets in found.items()}


def expected_sequences(samples: list[TrainSample]) -> set[tuple[str, frozenset[int]]]:
    return {
        (part.term, frozenset(sample.token_ids[part.positions].tolist()))
        for sample in samples
        for part in sample.parts
        if len(part.positions)
    }


def batches_of(plan: StepPlan) -> list[PackedBatch]:
    return [batch for rank in plan.micro_batches for batch in rank]


def check_terms(batch: PackedBatch) -> None:
    """Check that every trained token is in exactly one term, and that columns have the right shape and dtype."""
    index = [term.index for term in batch.terms.values()]
    assert np.sort(np.concatenate([np.zeros(0, np.int64), *index])).tolist() == list(
        range(len(batch.targets))
    )
    assert len(batch.loss_positions) == len(batch.targets)
    assert (np.diff(batch.loss_positions) > 0).all()
    for term in batch.terms.values():
        assert {term.index.dtype, term.sequence.dtype} == {np.dtype("i8")}
        assert {term.lengths.dtype, *(column.dtype for column in term.columns.values())} == {np.dtype("f4")}
        assert {column.shape for column in term.columns.values()} <= {term.index.shape}
        assert term.sequence.shape == term.index.shape
        assert np.isin(term.sequence, np.arange(len(term.lengths))).all()


def check_travels(batch: PackedBatch) -> None:
    """Check that a rank receives the same arrays with the same dtypes."""
    received = pickle.loads(pickle.dumps(batch))
    for name in ("token_ids", "position_ids", "cu_seqlens", "loss_positions", "targets"):
        assert_equal(getattr(received, name), getattr(batch, name))
    if batch.teacher is not None:
        assert_equal(received.teacher.slots, batch.teacher.slots)
        assert_equal(received.teacher.batch.token_ids, batch.teacher.batch.token_ids)
    assert received.terms.keys() == batch.terms.keys()
    for there, here in zip(received.terms.values(), batch.terms.values(), strict=True):
        for name in ("index", "sequence", "lengths", "held"):
            assert_equal(getattr(there, name), getattr(here, name))
        assert there.columns.keys() == here.columns.keys()
        for name, column in here.columns.items():
            assert_equal(there.columns[name], column)


def assert_equal(there: np.ndarray, here: np.ndarray) -> None:
    assert there.dtype == here.dtype
    np.testing.assert_array_equal(there, here)


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
    types = {
        "token_ids": "i8",
        "position_ids": "i8",
        "cu_seqlens": "i4",
        "loss_positions": "i8",
        "targets": "i8",
    }
    assert {name: getattr(batch, name).dtype for name in types} == {n: np.dtype(t) for n, t in types.items()}
    check_terms(batch)


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
            check_travels(batch)
            real = [sequence[sequence != PAD] for sequence in sequences_of(batch)]
            held = [sequence.tolist() for sequence in real if len(sequence)]
            used = sum(-(-len(ids) // layout.sequence_multiple) * layout.sequence_multiple for ids in held)
            assert used <= max_tokens or len(held) == 1
            assert len(batch.token_ids) - used < layout.batch_multiple or not held
            found += held
        assert sorted(found) == [sample.token_ids.tolist() for sample in samples]
        batches = batches_of(plan)
        expected = expected_rows(samples)
        assert sorted(row for batch in batches for row in trained_rows(batch)) == sorted(expected)
        assert set().union(*(trained_sequences(batch) for batch in batches)) == expected_sequences(samples)
        assert plan.counts == Counter(term for _, term, _, _ in expected)
        # Every micro-batch has every term of the step with all of its columns, in the same order.
        shapes = [{name: list(term.columns) for name, term in batch.terms.items()} for batch in batches]
        assert all(list(shape.items()) == list(shapes[0].items()) for shape in shapes)
        assert {name: set(columns) for name, columns in shapes[0].items()} == {
            name: set(COLUMNS[name]) for name in plan.counts
        }


@pytest.mark.parametrize("name", LAYOUTS)
def test_teachers_have_the_tokens_of_their_micro_batch(name: str) -> None:
    """Half of the samples have a teacher. Each rank knows for each of its tokens which token of the micro-batch it
    is."""
    layout, context = LAYOUTS[name], CONTEXT.get(name, 1)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        samples = [
            replace(sample, teacher_ids=np.concatenate([-np.arange(1, 2 + index), sample.token_ids[1:]]))
            if index % 2
            else sample
            for index, sample in enumerate(random_samples(rng, count=12))
        ]
        taught = {id_ for sample in samples if sample.teacher_ids is not None for id_ in sample.token_ids}
        plan = plan_step(samples, max_tokens=64, layout=layout, pad_id=PAD)
        seen: Counter[int] = Counter()
        for batch in batches_of(plan):
            assert batch.teacher is not None
            teacher = batch.teacher.batch
            check_well_formed(teacher, layout)
            check_travels(batch)
            assert len(teacher.token_ids) <= 64 or len(teacher.cu_seqlens) <= 3
            assert list(teacher.terms) == list(batch.terms)
            assert teacher.targets.tolist() == batch.targets[batch.teacher.slots].tolist()
            assert set(teacher.targets) == set(batch.targets) & taught
            for rank in range(context):
                slots = batch.teacher.slots[held_targets(teacher, context, rank)]
                assert context_shard(teacher, context, rank).targets.tolist() == batch.targets[slots].tolist()
                own = held_targets(batch, context, rank)
                assert context_shard(batch, context, rank).targets.tolist() == batch.targets[own].tolist()
                seen.update(slots.tolist())
        assert sum(seen.values()) == sum(
            len(part.positions)
            for sample in samples
            for part in sample.parts
            if sample.teacher_ids is not None
        )


def test_an_answer_that_differs_from_its_teachers_is_refused() -> None:
    part = Part(term="policy", positions=np.array([2, 3]))
    sample = TrainSample(
        token_ids=np.array([5, 6, 7, 8]), parts=(part,), teacher_ids=np.array([1, 5, 6, 7, 9])
    )
    with pytest.raises(AssertionError):
        plan_step([sample], max_tokens=64, layout=Layout(), pad_id=PAD)


@pytest.mark.parametrize("name", CONTEXT)
def test_context_shards_partition_tokens_and_loss_positions(name: str) -> None:
    layout, context = LAYOUTS[name], CONTEXT[name]
    for seed in range(20):
        samples = random_samples(np.random.default_rng(seed), count=5)
        batch = pack(samples, columns=columns_of(samples), layout=layout, pad_id=PAD)
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
        assert trained_sequences(*shards) == expected_sequences(samples)
        for shard in shards:
            check_terms(shard)
            assert list(shard.terms) == list(batch.terms)
            for name, term in shard.terms.items():
                assert term.lengths is batch.terms[name].lengths
            assert len(shard.token_ids) == len(batch.token_ids) // context
            assert shard.cu_seqlens is batch.cu_seqlens
            # The ids of a sample count up, so the token that predicts a target is the target minus one.
            assert (shard.token_ids[shard.loss_positions] == shard.targets - 1).all()


def test_routes_stay_with_their_tokens() -> None:
    """A token's route is made of its id and its layer. Each packed or sharded token still has its own."""

    def routed(ids: np.ndarray, length: int) -> np.ndarray:
        rows = np.stack([ids[:length] % 251, ids[:length] % 241], axis=1)
        return np.stack([rows, rows + 1], axis=1).astype(np.uint8)  # [tokens, 2 layers, 2 experts]

    for name, context in {"one": 1, **CONTEXT}.items():
        samples = random_samples(np.random.default_rng(3), count=6)
        lengths = [len(sample.token_ids) - 1 for sample in samples]
        lengths[1], lengths[4] = 0, lengths[4] // 2
        with_routes = [
            sample if number == 2 else replace(sample, routes=routed(sample.token_ids, length))
            for number, (sample, length) in enumerate(zip(samples, lengths, strict=True))
        ]
        batch = pack(with_routes, columns=columns_of(samples), layout=LAYOUTS[name], pad_id=PAD)
        batch = pickle.loads(pickle.dumps(batch))
        found: list[int] = []
        for rank in range(context):
            shard = context_shard(batch, context, rank)
            assert shard.routes is not None
            ids = shard.token_ids[shard.routes.positions]
            np.testing.assert_array_equal(shard.routes.experts, routed(ids, len(ids)))
            found += ids.tolist()
        wanted = [
            id_
            for number, (sample, length) in enumerate(zip(samples, lengths, strict=True))
            for id_ in sample.token_ids[:length].tolist()
            if number != 2
        ]
        assert sorted(found) == sorted(wanted), name
        assert pack(samples, columns=columns_of(samples), layout=LAYOUTS[name], pad_id=PAD).routes is None


def test_one_context_rank_holds_the_batch_itself() -> None:
    batch = pack(random_samples(np.random.default_rng(0), 3), columns=COLUMNS, layout=Layout(), pad_id=PAD)
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


def two_samples() -> list[TrainSample]:
    """Two samples: the first has three "sft" tokens around a "policy" token, the second two "policy" tokens."""
    first = TrainSample(
        token_ids=np.array([5, 6, 7, 8, 9]),
        parts=(
            Part(term="policy", positions=np.array([2]), constants={"advantage": -0.5}),
            Part(
                term="sft",
                positions=np.array([1, 3, 4]),
                constants={"weight": np.array([1, 2, 3], np.float32), "scale": 0.25},
            ),
            Part(term="empty", positions=np.zeros(0, np.int64), constants={"anything": 1.0}),
        ),
    )
    second = TrainSample(
        token_ids=np.array([10, 11, 12]),
        parts=(Part(term="policy", positions=np.array([1, 2]), constants={"advantage": 0.75}),),
    )
    return [first, second]


def columns_in(batch: PackedBatch) -> dict[str, dict[str, list[float]]]:
    return {
        name: {
            "index": term.index.tolist(),
            "sequence": term.sequence.tolist(),
            "lengths": term.lengths.tolist(),
        }
        | {key: column.tolist() for key, column in term.columns.items()}
        for name, term in batch.terms.items()
    }


def test_two_samples_by_hand() -> None:
    # Sequences are padded to a multiple of 4 and batches to a multiple of 8: three pads after 9, one after 12, then the
    # rest.
    samples = two_samples()
    layout = Layout(sequence_multiple=4, batch_multiple=8)
    batch = pack(samples, columns=columns_of(samples), layout=layout, pad_id=1)
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 1, 1, 1, 10, 11, 12, 1, 1, 1, 1, 1]
    assert batch.position_ids.tolist() == [*range(8), *range(4), *range(4)]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.loss_positions.tolist() == [0, 1, 2, 3, 8, 9]
    assert batch.targets.tolist() == [6, 7, 8, 9, 11, 12]
    assert columns_in(batch) == {
        "sft": {
            "index": [0, 2, 3],
            "sequence": [0, 0, 0],
            "lengths": [3.0],
            "weight": [1.0, 2.0, 3.0],
            "scale": [0.25] * 3,
        },
        "policy": {
            "index": [1, 4, 5],
            "sequence": [0, 1, 1],
            "lengths": [1.0, 2.0],
            "advantage": [-0.5, 0.75, 0.75],
        },
    }


def test_context_shards_by_hand() -> None:
    samples = two_samples()
    layout = Layout(sequence_multiple=4, batch_multiple=4)
    batch = pack(samples, columns=columns_of(samples), layout=layout, pad_id=1)
    # Rank 0 holds tokens 0 1 6 7 and 8 11, rank 1 holds those between.
    outer, inner = context_shard(batch, 2, 0), context_shard(batch, 2, 1)
    assert outer.token_ids.tolist() == [5, 6, 1, 1, 10, 1]
    assert inner.token_ids.tolist() == [7, 8, 9, 1, 11, 12]
    assert outer.position_ids.tolist() == [0, 1, 6, 7, 0, 3]
    # The rank that holds the token before a target trains the target.
    assert (outer.loss_positions.tolist(), outer.targets.tolist()) == ([0, 1, 4], [6, 7, 11])
    assert (inner.loss_positions.tolist(), inner.targets.tolist()) == ([0, 1, 4], [8, 9, 12])
    assert columns_in(outer) == {
        "sft": {"index": [0], "sequence": [0], "lengths": [3.0], "weight": [1.0], "scale": [0.25]},
        "policy": {"index": [1, 2], "sequence": [0, 1], "lengths": [1.0, 2.0], "advantage": [-0.5, 0.75]},
    }
    assert columns_in(inner) == {
        "sft": {
            "index": [0, 1],
            "sequence": [0, 0],
            "lengths": [3.0],
            "weight": [2.0, 3.0],
            "scale": [0.25] * 2,
        },
        "policy": {"index": [2], "sequence": [1], "lengths": [1.0, 2.0], "advantage": [0.75]},
    }


def test_terms_and_counts_of_a_step() -> None:
    samples = two_samples()
    assert columns_of(samples) == {"sft": ("weight", "scale"), "policy": ("advantage",)}
    assert list(columns_of(samples)) == list(columns_of(samples[::-1])) == ["policy", "sft"]
    assert token_counts(samples) == {"sft": 3, "policy": 3}
    assert columns_of([]) == token_counts([]) == {}
    # There is one micro-batch for each sample. That of the second sample has no demonstration token.
    plan = plan_step(samples, max_tokens=5, layout=Layout(data=2), pad_id=PAD)
    assert plan.counts == {"sft": 3, "policy": 3}
    (first,), (second,) = plan.micro_batches
    assert second.token_ids.tolist() == [10, 11, 12]
    assert columns_in(first)["policy"] == {
        "index": [1],
        "sequence": [0],
        "lengths": [1.0],
        "advantage": [-0.5],
    }
    assert columns_in(second) == {
        "sft": {"index": [], "sequence": [], "lengths": [], "weight": [], "scale": []},
        "policy": {"index": [0, 1], "sequence": [0, 0], "lengths": [2.0], "advantage": [0.75, 0.75]},
    }


def test_parts_of_a_term_have_the_same_constants() -> None:
    first, second = two_samples()
    part = Part(term="policy", positions=np.array([1]), constants={"advantage": 0.0, "age": 1.0})
    odd = TrainSample(token_ids=first.token_ids, parts=(part,))
    with pytest.raises(AssertionError, match="parts of policy with different constants"):
        columns_of([first, odd, second])
    with pytest.raises(AssertionError, match="different constants"):
        plan_step([odd, second], max_tokens=100, layout=Layout(), pad_id=PAD)


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_with_nothing_to_do_get_padding_without_a_trained_token(name: str) -> None:
    layout = LAYOUTS[name]
    sample = random_samples(np.random.default_rng(1), 1)
    plan = plan_step(sample, max_tokens=64, layout=layout, pad_id=PAD)
    used = [batch for batch in batches_of(plan) if batch.token_ids.any()]
    empty = [batch for batch in batches_of(plan) if not batch.token_ids.any()]
    assert len(used) == 1
    assert len(empty) == layout.data * layout.count_multiple - 1
    assert used[0].terms
    for batch in empty:
        check_well_formed(batch, layout)
        assert trained_rows(batch) == []
        assert {name: set(term.columns) for name, term in batch.terms.items()} == {
            name: set(term.columns) for name, term in used[0].terms.items()
        }
        assert all(len(term.lengths) == 0 for term in batch.terms.values())
        assert len(batch.token_ids) == max(layout.sequence_multiple, layout.batch_multiple)


def bins_of(lengths: list[int], **settings: int) -> list[list[int]]:
    return balanced_bins(lengths, lengths, **settings)


def test_a_sample_above_the_budget_is_alone() -> None:
    assert bins_of([3, 50, 4, 60], capacity=10) == [[3], [1], [0, 2]]
    assert bins_of([50], capacity=10, multiple=2, rank_multiple=2) == [[0], [], [], []]
    assert bins_of([], capacity=10, multiple=3) == [[], [], []]


def test_exactly_full_bins() -> None:
    assert sorted(bins_of([10, 10, 10], capacity=10)) == [[0], [1], [2]]
    assert sorted(bins_of([6, 4, 5, 5], capacity=10)) == [[0, 1], [2, 3]]


def test_bins_are_balanced_by_work_within_their_room() -> None:
    # By tokens alone the bins are 8 | 4 4. With n + n^2 / 4, the 8 counts 24 and each 4 counts 8, so the bins stay, and
    # both 2s (3 each) go to the 4s.
    lengths = [8, 4, 4, 2, 2]
    work = [n + n * n / 4 for n in lengths]
    assert sorted(balanced_bins(lengths, work, capacity=16, multiple=2)) == [[0], [1, 2, 3, 4]]
    # If that bin has no room, they go to the other.
    assert sorted(balanced_bins(lengths, work, capacity=10, multiple=2)) == [[0, 4], [1, 2, 3]]


def test_samples_are_dealt_forwards_and_then_backwards() -> None:
    assert dealt([9, 8, 7, 6, 5, 4], 2) == [[9, 6, 5], [8, 7, 4]]
    assert dealt([9, 8, 7], 3) == [[9], [8], [7]]


@pytest.mark.parametrize("data", [1, 8])
def test_balance_of_long_tails(data: int) -> None:
    """Lengths like those of reasoning models (6k tokens on average, at most 16k), with a 7B model's attention cost."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(5000), 0.75, 512) + 200, 300, 16384).astype(int).tolist()
    assert 5500 < np.mean(lengths) < 6700
    work = [length + 1.5e-5 * length**2 for length in lengths]
    bins = balanced_bins(lengths, work, capacity=32768, multiple=data)
    assert max(sum(lengths[i] for i in members) for members in bins) <= 32768
    assert sum(lengths) / (len(bins) * 32768) > 0.95
    ranks = [sum(work[i] for members in hand for i in members) for hand in dealt(bins, data)]
    assert max(ranks) / np.mean(ranks) < 1.02


@pytest.mark.parametrize(("data", "max_tokens"), [(1, 4096), (4, 4096), (8, 2048)])
def test_balance_on_lengths_like_gsm8k(data: int, max_tokens: int) -> None:
    """192 samples with a median of 260 tokens. The longest has three to five times as many, and a bin holds 6 to 15
    samples."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        prompt = rng.lognormal(np.log(90), 0.35, 192)
        response = rng.lognormal(np.log(160), 0.5, 192)
        lengths = np.clip(prompt + response, 40, 1500).astype(int).tolist()
        bins = balanced_bins(lengths, lengths, capacity=max_tokens, multiple=data)
        sums = np.array([sum(lengths[i] for i in members) for members in bins])
        assert sums.max() <= max_tokens
        assert sums.max() / sums.mean() < 1.1
        ranks = np.array([sums[rank::data].sum() for rank in range(data)])
        assert ranks.max() / ranks.mean() < 1.03
        # The bins are hardly more than the tokens need: the next multiple of the ranks, or the one after it.
        assert len(bins) <= (-(-sum(lengths) // (max_tokens * data)) + 1) * data
