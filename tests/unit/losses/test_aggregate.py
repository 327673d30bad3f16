"""The scale of each token for the four averages, for pools of one and of two terms, compared with hand arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_chord.config_methods import Aggregation
from megatron_chord.losses.aggregate import ENTROPY_SCALE, SCALE, drop_zero_gradient_parts, with_scales
from megatron_chord.losses.terms import Term, TermOutput
from megatron_chord.records import Part, TrainSample


def part(term: str, tokens: int, *, start: int = 1, **constants: float | np.ndarray) -> Part:
    return Part(term=term, positions=np.arange(start, start + tokens), constants=constants)


def sample(*parts: Part) -> TrainSample:
    return TrainSample(token_ids=np.arange(20), parts=parts)


def term(pool: str, aggregation: Aggregation = "token-mean", length: int = 1) -> Term:
    def loss(*_: Any) -> TermOutput:
        raise NotImplementedError

    return Term(loss=loss, pool=pool, aggregation=aggregation, aggregation_length=length)


def scales(samples: list[TrainSample], terms: dict[str, Term]) -> list[list[tuple[str, Any]]]:
    return [
        [(part.term, part.constants[SCALE]) for part in sample.parts]
        for sample in with_scales(samples, terms)
    ]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Three sequences of 1, 3 and 4 tokens; the constant length is 5.
        ("token-mean", [1 / 8, 1 / 8, 1 / 8]),
        ("seq-mean-token-mean", [1 / 3, 1 / 9, 1 / 12]),
        ("seq-mean-token-sum", [1 / 3, 1 / 3, 1 / 3]),
        ("seq-mean-token-sum-norm", [1 / 15, 1 / 15, 1 / 15]),
    ],
)
def test_four_aggregations(aggregation: Aggregation, expected: list[float]) -> None:
    samples = [sample(part("policy", tokens)) for tokens in (1, 3, 4)]
    found = scales(samples, {"policy": term("policy", aggregation, 5)})
    assert found == [[("policy", pytest.approx(scale, rel=1e-15))] for scale in expected]


def test_the_entropy_is_one_average_over_all_terms_that_have_it() -> None:
    """Sequences of 1 and 3 tokens and one of 4 of another term; a third term has no entropy bonus."""
    terms = {
        "policy": replace(term("policy", length=5), entropy_bonus=0.1),
        "sft": replace(term("sft", length=5), entropy_bonus=0.1),
        "other": term("other"),
    }
    samples = [sample(part("policy", 1)), sample(part("policy", 3)), sample(part("sft", 4))]
    samples.append(sample(part("other", 2)))
    for aggregation, expected in {
        "token-mean": [1 / 8, 1 / 8, 1 / 8],
        "seq-mean-token-mean": [1 / 3, 1 / 9, 1 / 12],
        "seq-mean-token-sum-norm": [1 / 15, 1 / 15, 1 / 15],
    }.items():
        chosen: Any = {name: replace(one, entropy_aggregation=aggregation) for name, one in terms.items()}
        constants = [scaled.parts[0].constants for scaled in with_scales(samples, chosen)]
        assert [found.get(ENTROPY_SCALE) for found in constants] == [*map(pytest.approx, expected), None]
        assert [found[SCALE] for found in constants] == [1 / 4, 1 / 4, 1 / 4, 1 / 2]


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_the_weights_of_a_mean_add_up_to_1(aggregation: Aggregation) -> None:
    rng = np.random.default_rng(0)
    samples = [sample(part("policy", int(rng.integers(0, 9)))) for _ in range(50)]
    scaled = with_scales(samples, {"policy": term("policy", aggregation)})
    weights = [np.broadcast_to(p.constants[SCALE], p.positions.shape) for s in scaled for p in s.parts]
    assert np.concatenate(weights).sum() == pytest.approx(1, rel=1e-12)


def test_terms_of_different_pools_do_not_meet() -> None:
    samples = [sample(part("policy", 2)), sample(part("sft", 5)), sample(part("policy", 6))]
    terms = {"policy": term("policy"), "sft": term("sft", "seq-mean-token-mean"), "unused": term("sft")}
    assert scales(samples, terms) == [[("policy", 1 / 8)], [("sft", 1 / 5)], [("policy", 1 / 8)]]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # One pool of sequences of 2, 6 and 4 tokens.
        ("token-mean", [1 / 12, 1 / 12, 1 / 12]),
        ("seq-mean-token-mean", [1 / 6, 1 / 18, 1 / 12]),
        ("seq-mean-token-sum", [1 / 3, 1 / 3, 1 / 3]),
        ("seq-mean-token-sum-norm", [1 / 30, 1 / 30, 1 / 30]),
    ],
)
def test_two_terms_of_one_pool(aggregation: Aggregation, expected: list[float]) -> None:
    samples = [sample(part("policy", 2)), sample(part("policy", 6)), sample(part("demonstration", 4))]
    terms = {name: term("shared", aggregation, 10) for name in ("policy", "demonstration")}
    names = ["policy", "policy", "demonstration"]
    assert scales(samples, terms) == [
        [(name, pytest.approx(scale, rel=1e-15))] for name, scale in zip(names, expected, strict=True)
    ]


def test_each_part_of_a_sample_is_a_sequence() -> None:
    samples = [sample(part("prefix", 2), part("policy", 3, start=5)), sample(part("policy", 4))]
    apart = {"prefix": term("prefix", "seq-mean-token-mean"), "policy": term("policy", "seq-mean-token-mean")}
    assert scales(samples, apart) == [[("prefix", 1 / 2), ("policy", 1 / 6)], [("policy", 1 / 8)]]
    together = {name: term("shared", "seq-mean-token-mean") for name in apart}
    assert scales(samples, together) == [[("prefix", 1 / 6), ("policy", 1 / 9)], [("policy", 1 / 12)]]


@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
)
def test_empty_parts_are_dropped_and_do_not_count(aggregation: Aggregation) -> None:
    terms = {"policy": term("policy", aggregation, 7), "sft": term("policy", aggregation, 7)}
    full = [sample(part("policy", 2)), sample(part("sft", 3))]
    with_empty = [
        sample(part("sft", 0), part("policy", 2)),
        sample(part("policy", 0)),
        sample(part("sft", 3)),
        sample(),
    ]
    first, second = scales(full, terms)
    assert scales(with_empty, terms) == [first, [], second, []]


def test_nothing_at_all() -> None:
    assert with_scales([], {"policy": term("policy")}) == []
    assert scales([sample(part("policy", 0))], {"policy": term("policy", "seq-mean-token-mean")}) == [[]]


def test_idle_parts_are_left_out_but_counted() -> None:
    terms = {"policy": replace(term("policy"), zero_gradient_column="advantage"), "sft": term("sft")}
    samples = [
        sample(part("policy", 3, advantage=0.0)),
        sample(part("policy", 2, advantage=-1.0)),
        sample(part("policy", 2, advantage=np.array([0.0, 0.5]))),
        sample(part("policy", 1, advantage=np.zeros(1)), part("sft", 4, advantage=0.0)),
    ]
    kept = drop_zero_gradient_parts(with_scales(samples, terms), terms, min_tokens=4)
    assert [[(part.term, len(part.positions), part.constants[SCALE]) for part in s.parts] for s in kept] == [
        [("policy", 2, 1 / 8)],
        [("policy", 2, 1 / 8)],
        [("sft", 4, 1 / 4)],
    ]


def test_a_sample_ends_after_its_last_trained_token() -> None:
    """Prompt of 3 tokens, prefix of 2 and continuation of 4. With advantage 0 the continuation does not pass, neither
    in the sample nor after the teacher's longer prompt. A prefix that is not trained is the continuation's context."""
    terms = {"policy": replace(term("policy"), zero_gradient_column="advantage"), "sft": term("sft")}
    prefix = Part(term="sft", positions=np.arange(3, 5))
    idle = Part(term="policy", positions=np.arange(5, 9), constants={"advantage": 0.0})
    trained = replace(idle, constants={"advantage": 0.5})
    whole = TrainSample(
        token_ids=np.arange(9),
        parts=(prefix, idle),
        routes=np.arange(8 * 2, dtype=np.uint8).reshape(8, 2, 1),
        teacher_ids=np.array([20, 21, 22, 23, 3, 4, 5, 6, 7, 8]),
    )
    samples = [
        whole,
        replace(whole, parts=(idle, prefix), routes=None, teacher_ids=None),
        replace(whole, parts=(prefix, trained)),
        replace(whole, parts=(replace(prefix, term="policy", constants={"advantage": 0.0}), trained)),
    ]
    first, second, third, fourth = drop_zero_gradient_parts(with_scales(samples, terms), terms, min_tokens=0)
    assert first.token_ids.tolist() == second.token_ids.tolist() == [0, 1, 2, 3, 4]
    assert [part.term for part in (*first.parts, *second.parts)] == ["sft", "sft"]
    assert isinstance(first.routes, np.ndarray)
    assert first.routes.ravel().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert first.teacher_ids is not None
    assert first.teacher_ids.tolist() == [20, 21, 22, 23, 3, 4]
    assert (second.routes, second.teacher_ids) == (None, None)
    assert len(third.token_ids) == len(fourth.token_ids) == 9
    assert [part.term for part in fourth.parts] == ["policy"]
    assert first.parts[0].constants[SCALE] == 1 / 6, (
        "of three prefixes; what is left out counts in its own average"
    )
    assert fourth.parts[0].constants[SCALE] == 1 / 18, (
        "of four continuations, and of a prefix of the same term"
    )


@pytest.mark.parametrize(
    ("enough", "expected"),
    [
        (0, []),
        (1, [1]),  # each sequence would do, and the shortest costs least
        (4, [4]),
        (5, [12]),  # 5 of 20 are a larger share than 4 of 18 or 1 of 12, so they are the best for their cost
        (13, [4, 12]),
        (17, [4, 12, 1]),
        (100, [4, 12, 1]),
    ],
)
def test_of_idle_parts_alone_enough_tokens_stay(enough: int, expected: list[int]) -> None:
    terms = {"policy": replace(term("policy"), zero_gradient_column="advantage"), "sft": term("sft")}
    samples = [
        TrainSample(token_ids=np.arange(length), parts=(part("policy", tokens, advantage=0.0),))
        for tokens, length in ((4, 18), (12, 20), (1, 12))
    ]
    kept = drop_zero_gradient_parts(
        with_scales([*samples, sample(part("sft", 5))], terms), terms, min_tokens=enough
    )
    assert [len(part.positions) for s in kept for part in s.parts if part.term == "policy"] == expected
    assert [len(part.positions) for s in kept for part in s.parts if part.term == "sft"] == [5]


def test_idle_parts_stay_beside_too_few_others() -> None:
    terms = {"policy": replace(term("policy"), zero_gradient_column="advantage")}
    samples = [sample(part("policy", tokens, advantage=a)) for tokens, a in ((3, 1.0), (5, 0.0), (4, 0.0))]
    for enough, expected in ((3, [3]), (4, [3, 5]), (8, [3, 5]), (9, [3, 5, 4])):
        kept = drop_zero_gradient_parts(with_scales(samples, terms), terms, min_tokens=enough)
        assert [len(s.parts[0].positions) for s in kept] == expected
        assert {s.parts[0].constants[SCALE] for s in kept} == {1 / 12}


def test_the_rest_of_a_sample_stays() -> None:
    columns = np.array([1.0, 2.0], np.float32)
    before = sample(part("policy", 2, advantage=0.5, rollout_logprob=columns))
    (after,) = with_scales([before], {"policy": term("policy")})
    assert after.token_ids is before.token_ids
    assert after.parts[0].positions is before.parts[0].positions
    assert after.parts[0].constants == {"advantage": 0.5, "rollout_logprob": columns, SCALE: 0.5}
    assert SCALE not in before.parts[0].constants
