"""Buckets arrive unchanged, and a receiver reads them only from the run's folder."""

from __future__ import annotations

import os
import tempfile
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
from megatron_chord.rollout.transports import BucketFiles, FileTransport, _make_mapped_file


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


def test_file_round_trips(tmp_path: Path) -> None:
    """Two buffers are used in turn and stay mapped after their names are removed. A larger bucket gets a larger
    buffer."""
    transport, files = FileTransport(tmp_path, sender=1), BucketFiles(tmp_path)
    seen = set()
    for size in (5, 5, 5, 3, 70, 70, 5):
        bucket = [*make_bucket(), ("last", torch.randn(size, 100))]
        infos = describe(bucket)
        parcel = transport.publish(bucket, infos)
        path = Path(parcel.fields["path"])
        received = unflatten(infos, files.find(path, parcel.fields["buffer"], flat_size(infos)))
        verify(infos, received)
        assert all(torch.equal(sent, got) for (_, sent), got in zip(bucket, received, strict=True))
        parcel.release()
        assert list(tmp_path.iterdir()) == []
        seen.add((path, parcel.fields["buffer"], received[0].data_ptr()))
    assert len(seen) == 4, "two buffers, and two larger ones"
    assert {buffer for _, buffer, _ in seen} == {2, 3}


def test_the_previous_bucket_keeps_its_buffer(tmp_path: Path) -> None:
    transport, files = FileTransport(tmp_path, sender=0), BucketFiles(tmp_path)
    under_way = []
    for _ in range(4):
        bucket = make_bucket()
        infos = describe(bucket)
        fields = transport.publish(bucket, infos).fields
        under_way.append((infos, files.find(Path(fields["path"]), fields["buffer"], flat_size(infos))))
        for told, buffer in under_way[-2:]:
            verify(told, unflatten(told, buffer))
    with pytest.raises(ValueError, match="arrived damaged"):
        verify(under_way[0][0], unflatten(*under_way[0]))


def test_a_file_elsewhere_or_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    outside = tmp_path / "weights-0"
    outside.write_bytes(bytes(100))
    (tmp_path / "run" / "link").symlink_to(outside)
    files = BucketFiles(tmp_path / "run")
    for path in (outside, tmp_path / "run" / ".." / outside.name, tmp_path / "run" / "link"):
        with pytest.raises(ValueError, match="does not lie in the run's folder"):
            files.find(path, 0, 100)
    inside = tmp_path / "run" / "weights-0"
    inside.write_bytes(bytes(100))
    assert files.find(inside, 0, 100).numel() == 100
    with pytest.raises(ValueError, match="has 100 bytes, but 101 were announced"):
        files.find(inside, 0, 101)
    assert inside.stat().st_size == 100


def test_no_space_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A full disk is an OSError, not a SIGBUS at the first write to a page that does not fit."""
    huge = 2 * os.statvfs("/dev/shm").f_frsize * os.statvfs("/dev/shm").f_blocks
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with pytest.raises(OSError, match="No space left"):
            _make_mapped_file(Path(folder), "weights-", huge)
        assert os.listdir(folder) == []


def test_a_damaged_tensor_is_named() -> None:
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
