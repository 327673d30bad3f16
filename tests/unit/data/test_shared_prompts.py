"""Samples with the same prompt are packed with one copy of it."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from megatron_chord.data.packing import Layout, PackedBatch, columns_of, pack, plan_step
from megatron_chord.data.shared_prompts import groups_by_prompt, prompt_tokens
from megatron_chord.records import Part, TrainSample

SHARED = Layout(shares_prompts=True)


def answer(prompt: list[int], response: list[int], term: str = "policy") -> TrainSample:
    ids = np.array([*prompt, *response])
    return TrainSample(
        token_ids=ids, parts=(Part(term=term, positions=np.arange(len(prompt), len(ids)), constants={}),)
    )


def packed(samples: list[TrainSample], layout: Layout = SHARED) -> PackedBatch:
    return pack(samples, columns=columns_of(samples), layout=layout, pad_id=1)


def test_three_answers_by_hand() -> None:
    # The prompt 5 6 7: the tokens 5 6 stand once, and 7 predicts the first token of each answer.
    samples = [answer([5, 6, 7], [8, 9]), answer([5, 6, 7], [10]), answer([2, 6, 7], [11], "sft")]
    batch = packed(samples)
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 7, 10, 2, 6, 7, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 7, 11]
    assert batch.prompts.tolist() == [-1, 0, 0, -1]
    assert batch.loss_positions.tolist() == [2, 3, 5, 9]
    assert batch.targets.tolist() == [8, 9, 10, 11]
    assert batch.terms["policy"].index.tolist() == [0, 1, 2]
    assert batch.terms["policy"].sequence.tolist() == [0, 0, 1]
    assert batch.terms["policy"].lengths.tolist() == [2.0, 1.0]
    assert batch.terms["sft"].index.tolist() == [3]


def test_routes_follow_their_tokens() -> None:
    """Routes of one layer and one expert, whose number is the token's id. The first answer has none of its own, the
    last token of an answer never has one, and the shared prompt has those of the first answer that has any."""

    def routed(sample: TrainSample, count: int) -> TrainSample:
        return replace(sample, routes=sample.token_ids[:count, None, None].astype(np.uint8))

    batch = packed(
        [
            answer([5, 6, 7], [8, 9]),
            routed(answer([5, 6, 7], [10, 11]), 4),
            routed(answer([5, 6, 7], [12]), 3),
            routed(answer([2, 3], [4]), 2),
        ]
    )
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 7, 10, 11, 7, 12, 2, 3, 4]
    assert batch.routes is not None
    assert batch.routes.positions.tolist() == [0, 1, 5, 6, 8, 10, 11]
    assert batch.routes.experts[:, 0, 0].tolist() == batch.token_ids[batch.routes.positions].tolist()


def test_a_rank_receives_the_same_batch() -> None:
    batch = packed(
        [answer([5, 6, 7], [8, 9]), answer([5, 6, 7], [10])], Layout(shares_prompts=True, batch_multiple=8)
    )
    received = pickle.loads(pickle.dumps(batch))
    for name in ("token_ids", "position_ids", "cu_seqlens", "prompts", "loss_positions", "targets"):
        there, here = getattr(received, name), getattr(batch, name)
        assert there.dtype == here.dtype
        assert there.tolist() == here.tolist()


def test_nothing_is_shared_unless_the_layout_says_so() -> None:
    samples = [answer([5, 6, 7], [8, 9]), answer([5, 6, 7], [10])]
    batch = packed(samples, Layout())
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 10]
    assert batch.prompts.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [([5], 0), ([5, 6], 1)],
)
def test_the_token_that_predicts_the_answer_is_not_shared(prompt: list[int], shared: int) -> None:
    samples = [answer(prompt, [8]), answer(prompt, [9])]
    assert prompt_tokens(samples[0]) == shared
    assert len(packed(samples).token_ids) == shared + 2 * (len(prompt) - shared + 1)


def test_other_prompts_and_other_lengths_are_not_shared() -> None:
    samples = [answer([5, 6, 7], [8]), answer([5, 6], [7, 8]), answer([5, 4, 7], [8])]
    assert (packed(samples).prompts == -1).all()
    untrained = TrainSample(token_ids=np.array([5, 6, 7, 8]), parts=())
    assert prompt_tokens(untrained) == 0


def test_groups_are_divided_by_their_number_of_tokens() -> None:
    # Each answer has 2 own tokens and 4 shared ones: two answers are 8 tokens, three 10.
    samples = [answer([5, 6, 7, 8, 9], [number]) for number in range(10, 15)]
    assert list(groups_by_prompt(samples, max_tokens=8)) == [[0, 1], [2, 3], [4]]
    assert list(groups_by_prompt(samples, max_tokens=10)) == [[0, 1, 2], [3, 4]]
    assert list(groups_by_prompt(samples, max_tokens=3)) == [[0], [1], [2], [3], [4]]
    two = [samples[0], answer([2, 3, 4], [5]), samples[1]]
    assert list(groups_by_prompt(two, max_tokens=100)) == [[0, 2], [1]]


@pytest.mark.parametrize("data", [1, 3])
@pytest.mark.parametrize("max_tokens", [12, 40, 1000])
def test_plans_of_random_groups(data: int, max_tokens: int) -> None:
    """Every trained token is there once, with the tokens before it, and no micro-batch is too long."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        samples = list[TrainSample]()
        for _ in range(int(rng.integers(1, 6))):
            prompt = rng.integers(2, 90, int(rng.integers(1, 7))).tolist()
            samples += [
                answer(prompt, rng.integers(2, 90, int(rng.integers(1, 5))).tolist())
                for _ in range(int(rng.integers(1, 5)))
            ]
        plan = plan_step(
            samples, max_tokens=max_tokens, layout=Layout(data=data, shares_prompts=True), pad_id=1
        )
        batches = [batch for rank in plan.micro_batches for batch in rank]
        assert len({len(rank) for rank in plan.micro_batches}) == 1
        assert all(len(batch.token_ids) <= max_tokens for batch in batches)
        found = sorted(context for batch in batches for context in contexts_of(batch))
        assert found == sorted(
            tuple(sample.token_ids[: position + 1].tolist())
            for sample in samples
            for position in sample.parts[0].positions
        )
        alone = plan_step(samples, max_tokens=max_tokens, layout=Layout(data=data), pad_id=1)
        assert sum(len(batch.token_ids) for batch in batches) <= sum(
            len(batch.token_ids) for rank in alone.micro_batches for batch in rank
        )


def contexts_of(batch: PackedBatch) -> list[tuple[int, ...]]:
    """Return each trained token with all tokens that its hidden state attends to before it."""
    found = []
    for position, target in zip(batch.loss_positions.tolist(), batch.targets.tolist(), strict=True):
        sequence = int(np.searchsorted(batch.cu_seqlens, position, side="right")) - 1
        before = batch.token_ids[batch.cu_seqlens[sequence] : position + 1].tolist()
        prompt = int(batch.prompts[sequence])
        if prompt >= 0:
            before = (
                batch.token_ids[batch.cu_seqlens[prompt] : batch.cu_seqlens[prompt + 1]].tolist() + before
            )
        assert batch.position_ids[position] == len(before) - 1
        found.append((*before, target))
    return found


def taught(sample: TrainSample, prompt: list[int]) -> TrainSample:
    own = int(sample.parts[0].positions[0])
    return replace(sample, teacher_ids=np.array([*prompt, *sample.token_ids[own:]]))


def test_teachers_share_their_prompt_by_hand() -> None:
    prompt = [1, 2, 3, 4]
    samples = [taught(answer([5, 6, 7], [8, 9]), prompt), taught(answer([5, 6, 7], [10]), prompt)]
    plan = plan_step(samples, max_tokens=64, layout=SHARED, pad_id=0)
    ((batch,),) = plan.micro_batches
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 7, 10]
    assert batch.teacher is not None
    assert batch.teacher.batch.token_ids.tolist() == [1, 2, 3, 4, 8, 9, 4, 10]
    assert batch.teacher.batch.targets.tolist() == batch.targets.tolist() == [8, 9, 10]
    assert batch.teacher.slots.tolist() == [0, 1, 2]


def test_a_group_is_divided_where_its_teachers_do_not_fit() -> None:
    shown = [list(range(100 * i, 100 * i + 20)) for i in (1, 2, 3)]
    samples = [taught(answer([5, 6, 7], [8, 9 + i]), prompt) for i, prompt in enumerate(shown)]
    plan = plan_step(samples, max_tokens=50, layout=SHARED, pad_id=0)
    teachers = [batch.teacher for (rank,) in [plan.micro_batches] for batch in rank]
    sizes = [len(teacher.batch.token_ids) for teacher in teachers if teacher is not None]
    assert sorted(sizes) == [22, 44]
    assert sum(len(teacher.slots) for teacher in teachers if teacher is not None) == 6
