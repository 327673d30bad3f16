"""Staging memory can be shared, and opened without a CUDA context on the sender's GPU."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_chord.rollout.sync import SyncSettings, WeightSync
from megatron_chord.rollout.transports import CudaImports, IpcTransport, without_expandable_segments


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        (
            "max_split_size_mb:512,expandable_segments:True,roundup_power2_divisions:[256:1,512:2]",
            "max_split_size_mb:512,expandable_segments:False,roundup_power2_divisions:[256:1,512:2]",
        ),
        ("max_split_size_mb:512", "max_split_size_mb:512"),
    ],
)
def test_expandable_segments_are_off_for_staging_memory_alone(settings: str, within: str) -> None:
    """torch forgets every setting that is not named when it gets new ones, so all of them are given again."""
    before = torch._C._accelerator_getAllocatorSettings()
    torch._C._accelerator_setAllocatorSettings(settings)
    found = []
    try:
        with without_expandable_segments():
            found.append(torch._C._accelerator_getAllocatorSettings())
        assert found == [within]
        assert torch._C._accelerator_getAllocatorSettings() == settings
    finally:
        torch._C._accelerator_setAllocatorSettings(before)


@pytest.mark.parametrize(
    ("worker", "has_access", "opened_on"), [(0, True, 0), (1, True, 1), (1, False, 0), (0, False, 0)]
)
def test_a_buffer_is_opened_in_the_address_space_of_the_workers_own_gpu(
    worker: int, has_access: bool, opened_on: int
) -> None:
    """GPU 0 has exported a buffer. torch creates a context on the GPU that it is told to open the buffer on. Only CUDA
    is replaced here; tests/rollout/test_gpu.py measures the memory on two GPUs."""
    asked: list[Any] = []

    def open_buffer(*arguments: Any) -> torch.UntypedStorage:
        asked.extend(arguments)
        return torch.UntypedStorage(4)

    handle = dict.fromkeys(("handle", "counter", "event"), base64.b64encode(b"x").decode())
    with (
        mock.patch("torch.cuda.device_count", return_value=2),
        mock.patch("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu {index}")),
        mock.patch("torch.cuda.can_device_access_peer", lambda own, other: has_access and own != other),
        mock.patch("torch.cuda.synchronize"),
        mock.patch.object(torch.UntypedStorage, "_new_shared_cuda", open_buffer),
        pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"),  # the copy to a GPU
    ):
        CudaImports().copy(
            (0, 0),
            handle | {"gpu": "gpu 0", "size": 4, "offset": 0, "counter_offset": 0},
            4,
            torch.device("cuda", worker),
        )
    assert asked[0] == opened_on
    assert asked[-1] is False, "an event of the sender's GPU is not opened"


def test_a_new_connection_uses_the_staging_buffers_of_the_one_before_it() -> None:
    """A killed worker never returns a buffer, so new ones would take memory at each replacement. Only the export, which
    needs CUDA, is replaced here."""
    exported: list[int] = []

    def export(buffer: torch.Tensor) -> dict:
        exported.append(buffer.data_ptr())
        return {"export": len(exported)}

    settings = SyncSettings(transport="ipc", timeout_s=1.0)
    client: Any = SimpleNamespace()
    sync = WeightSync([client], settings, exporters=[0], group=None, device=torch.device("cpu"))
    servers: Any = {"workers": [2]}
    with mock.patch("megatron_chord.rollout.transports.export_cuda_buffer", export):
        parcels = []
        for _ in range(2):
            transport: Any = sync._make_transport(None, servers, [], [])
            assert isinstance(transport, IpcTransport)
            parcels.append([transport.make_room(num_bytes) for num_bytes in (100, 200, 100)])
            sync._disconnect()
        (first, second, again), (new_first, new_second, _) = parcels
        assert again.fields == first.fields, "exported once in a connection"
        for old, new in ((first, new_first), (second, new_second)):
            assert new.memory is old.memory
            assert new.fields["handles"] != old.fields["handles"], "exported anew"
        assert len(exported) == 2 * 2 * 2, "for two connections, buffers and workers"
        grown = sync._make_transport(None, servers, [], []).make_room(300)  # type: ignore[attr-defined]
        assert grown.memory.numel() == 300
        assert sync._staging[grown.fields["slot"]] is grown.memory, "the next connection uses the larger one"
    sync.close()
    assert sync._staging == [None, None]
