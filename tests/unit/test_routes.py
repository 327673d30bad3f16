"""Slices and sums of routes that are on servers are those of the arrays."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from megatron_chord.data.packing import Layout, PackedBatch, PackedRoutes, pack
from megatron_chord.records import TrainSample
from megatron_chord.routes import KeptRoutes, RemoteRoutes, Routes, RouteShape, joined

SHAPE = RouteShape(layers=2, experts=200, chosen=3)
ARRAYS = {
    "a": np.arange(30, dtype=np.uint8).reshape(5, 2, 3),
    "b": np.arange(100, 124, dtype=np.uint8).reshape(4, 2, 3),
}


def remote(key: str) -> RemoteRoutes:
    return RemoteRoutes.of(
        KeptRoutes(
            url="http://127.0.0.1:1",
            store="s",
            key=key,
            num_tokens=len(ARRAYS[key]),
            dtype="uint8",
            checksum=0,
            shape=SHAPE,
        )
    )


def test_joined_slices() -> None:
    here = np.full((3, 2, 3), 77, np.uint8)
    whole = joined([remote("a"), here, remote("b")])
    expected = np.concatenate([ARRAYS["a"], here, ARRAYS["b"]])
    assert isinstance(whole, RemoteRoutes)
    assert len(whole) == 12
    assert [kept.key for kept in whole.kept()] == ["a", "b"]
    for start in range(12):
        for stop in range(start + 1, 13):
            part = whole[start:stop]
            assert len(part) == stop - start
            np.testing.assert_array_equal(part.here(ARRAYS), expected[start:stop])
            if stop - start > 2:
                np.testing.assert_array_equal(part[1:-1].here(ARRAYS), expected[start + 1 : stop - 1])
    assert len(whole[4:4]) == 0
    assert len(whole[20:]) == 0
    assert [kept.key for kept in whole[:5].kept()] == ["a"], "only what is needed is read"
    np.testing.assert_array_equal(whole[-2:].here(ARRAYS), expected[-2:])


def test_arrays_alone_stay_arrays() -> None:
    found = joined([ARRAYS["a"], ARRAYS["b"]])
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, np.concatenate([ARRAYS["a"], ARRAYS["b"]]))


def test_size_of_a_reference() -> None:
    (kept,) = remote("a").kept()
    assert kept.num_bytes == 5 * 2 * 3


@pytest.mark.parametrize("shares", [False, True])
def test_a_packed_batch_of_references_is_that_of_arrays(shares: bool) -> None:
    """Two answers to one prompt of two tokens, and a sample without routes."""

    def batch(first: Routes, second: Routes) -> PackedBatch:
        samples = [
            TrainSample(token_ids=np.array([1, 2, 3, 4, 5, 6]), parts=(), routes=first),
            TrainSample(token_ids=np.array([1, 2, 7, 8, 9]), parts=(), routes=second),
            TrainSample(token_ids=np.array([4, 4]), parts=()),
        ]
        layout = Layout(shares_prompts=shares, batch_multiple=4)
        return pack(samples, columns={}, layout=layout, pad_id=0)

    arrays, references = batch(ARRAYS["a"], ARRAYS["b"]), batch(remote("a"), remote("b"))
    assert arrays.routes is not None
    assert references.routes is not None
    assert isinstance(references.routes.experts, RemoteRoutes)
    found = references.routes.here(ARRAYS)
    np.testing.assert_array_equal(found.positions, arrays.routes.positions)
    np.testing.assert_array_equal(found.experts, arrays.routes.experts)
    assert found.here(ARRAYS) is found
    for sent in (arrays, references):
        received = pickle.loads(pickle.dumps(sent)).routes
        np.testing.assert_array_equal(received.positions, arrays.routes.positions)
        assert received.positions.dtype == np.int64
        np.testing.assert_array_equal(received.here(ARRAYS).experts, arrays.routes.experts)
    none = PackedRoutes(positions=np.zeros(0, np.int64), experts=ARRAYS["a"][:0])
    assert pickle.loads(pickle.dumps(none)).positions.shape == (0,)
