"""Buckets come out as they went in, and only from where they may."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_chord.rollout.buckets import (
    TensorInfo,
    describe,
    flat_size,
    flatten,
    in_buckets,
    unflatten,
    verify,
)
from megatron_chord.rollout.transports import FileTransport, read_bucket_file

CPU = torch.device("cpu")


def make_bucket() -> list[tuple[str, torch.Tensor]]:
    fused = torch.randn(12, 5)
    return [
        ("q", fused[:8]),
        ("k", fused[8:].t()),
        ("odd", torch.randn(3).bfloat16()),
        ("one", torch.randn(1, 1).half()),
        ("again", fused),
    ]


def test_no_bucket_is_larger_than_allowed_but_for_one_large_tensor() -> None:
    sizes = [3, 4, 5, 40, 1, 9, 2]
    named = [(str(i), torch.zeros(size, dtype=torch.float32)) for i, size in enumerate(sizes)]
    buckets = list(in_buckets(named, max_bytes=40))
    assert [[name for name, _ in bucket] for bucket in buckets] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4", "5"],
        ["6"],
    ]
    assert list(in_buckets([], max_bytes=40)) == []


def test_flat_buffer_round_trip() -> None:
    bucket = make_bucket()
    infos = [TensorInfo.from_json(info.to_json()) for info in describe(bucket)]
    buffer = torch.full((flat_size(infos),), 77, dtype=torch.uint8)
    flatten((tensor for _, tensor in bucket), out=buffer)
    received = unflatten(infos, buffer)
    for (_, sent), tensor in zip(bucket, received, strict=True):
        assert torch.equal(sent, tensor)
        assert sent.dtype == tensor.dtype
    verify(infos, received)


def test_file_round_trip(tmp_path: Path) -> None:
    bucket = make_bucket()
    infos = describe(bucket)
    transport = FileTransport(tmp_path, sender=0)
    parcel = transport.publish(bucket, infos)
    path = Path(parcel.fields["path"])
    received = read_bucket_file(path, tmp_path, infos, CPU)
    verify(infos, received)
    parcel.release()
    assert list(tmp_path.iterdir()) == []
    verify(infos, received)


def test_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    outside = tmp_path / "weights-0.safetensors"
    outside.touch()
    (tmp_path / "run" / "link").symlink_to(outside)
    for path in (outside, tmp_path / "run" / ".." / outside.name, tmp_path / "run" / "link"):
        with pytest.raises(ValueError, match="does not lie in the run's folder"):
            read_bucket_file(path, tmp_path / "run", [], CPU)


def test_damage_is_named() -> None:
    bucket = make_bucket()
    infos = describe(bucket)
    received = [tensor.clone() for _, tensor in bucket]
    received[2][1] += 1
    with pytest.raises(ValueError, match="1 of 5 tensors arrived damaged: odd"):
        verify(infos, received)


def test_only_floating_point_weights_travel() -> None:
    with pytest.raises(ValueError, match=r"ids is torch.int64"):
        describe([("ids", torch.zeros(3, dtype=torch.int64))])
    with pytest.raises(ValueError, match="not the description of a tensor"):
        TensorInfo.from_json({"name": "a", "dtype": "load", "shape": [1], "fingerprint": ""})
