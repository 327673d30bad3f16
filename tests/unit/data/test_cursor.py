"""A cursor gives the same items for any sizes of the portions and any number of saves and restores."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace

import pytest

from megatron_chord.data.cursor import Cursor, fingerprint
from megatron_chord.records import Demonstration, Prompt


def cursor(**changes) -> Cursor:
    return replace(Cursor(name="prompts", size=7, seed=3, data="abc"), **changes)


def test_order_is_the_one_defined() -> None:
    def key(epoch: int, item: int) -> bytes:
        return hashlib.blake2b(f"prompts/3/{epoch}/{item}".encode()).digest()

    expected = [item for epoch in (0, 1) for item in sorted(range(7), key=lambda i, e=epoch: key(e, i))]
    taken, after = cursor().take(14)
    assert taken == expected
    assert (after.position, after.epoch) == (14, 2)


def test_every_epoch_visits_every_item_once_in_another_order() -> None:
    taken, _ = cursor().take(70)
    epochs = [taken[start : start + 7] for start in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("seed", range(5))
def test_portions_and_resumes_do_not_change_the_order(seed: int) -> None:
    straight, _ = cursor().take(100)
    rng = random.Random(seed)
    at, taken = cursor(), []
    while len(taken) < 100:
        part, at = at.take(min(rng.randrange(0, 20), 100 - len(taken)))
        taken += part
        at = cursor().restored(json.loads(json.dumps(at.state())))
    assert taken == straight


def test_take_leaves_the_cursor_where_it_was() -> None:
    start = cursor()
    assert start.take(5) == start.take(5)
    assert start.position == 0


def test_seed_and_name_change_the_order() -> None:
    orders = {
        tuple(cursor(size=50, **change).take(50)[0])
        for change in ({}, {"seed": 4}, {"name": "demonstrations"})
    }
    assert len(orders) == 3


def test_one_item_is_repeated_in_every_epoch() -> None:
    assert cursor(size=1).take(4)[0] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 8}, r"another number of usable rows: size was 7 and is 8"),
        ({"seed": 4}, r"another seed: seed was 3 and is 4"),
        ({"data": "xyz"}, r"chat template or its token limits have changed: data was 'abc' and is 'xyz'"),
        ({"name": "demonstrations"}, r"another cursor's: name was 'prompts' and is 'demonstrations'"),
    ],
)
def test_state_of_something_else_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cursor(**change).restored(cursor(position=5).state())


@pytest.mark.parametrize("position", [-1, 1.5, "3", True, None])
def test_impossible_position_is_refused(position: object) -> None:
    with pytest.raises(ValueError, match="whole number >= 0"):
        cursor().restored(cursor().state() | {"position": position})


def test_incomplete_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a cursor's state, got the fields \['position'\]"):
        cursor().restored({"position": 1})


def test_an_empty_data_set() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        cursor(size=0)


def test_fingerprint_depends_on_every_field_and_on_the_order() -> None:
    message = {"role": "user", "content": "q"}
    first = Prompt(id="a", messages=(message,), truth="1", token_ids=(1, 2))
    second = Prompt(id="b", messages=(message,), truth="1", token_ids=(1, 2))
    demonstration = Demonstration(id="a", token_ids=(1, 2), trainable=(False, True))
    seen = [
        [first, second],
        [second, first],
        [first],
        [replace(first, truth="2")],
        [replace(first, token_ids=(1, 3))],
        [replace(first, token_ids=(1, 2, 2))],
        [replace(first, fields={"level": 1})],
        [replace(first, fields={"level": 2})],
        [demonstration],
        [replace(demonstration, trainable=(True, True))],
    ]
    assert len({fingerprint(records) for records in seen}) == len(seen)
    assert fingerprint([first, second]) == fingerprint([replace(first), replace(second)])
