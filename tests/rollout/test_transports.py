"""A process group of a push ends what a peer has left unfinished, and staging memory can be shared."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_chord.rollout.transports import (
    SenderGroup,
    SenderStore,
    join_sender_group,
    without_expandable_segments,
)

CPU = torch.device("cpu")
TIMEOUT_S = 60.0


@dataclass
class LeftByPeer:
    """A stand-in for a process group of NCCL, which does not exist without a GPU. Its broadcasts never end."""

    calls: list[str] = field(default_factory=list)

    def name(self) -> str:
        return "nccl"

    def broadcast(self, *_: Any) -> LeftByPeer:
        return self

    def is_completed(self) -> bool:
        return False

    def abort(self) -> None:
        self.calls.append("abort")


@pytest.mark.parametrize(
    ("given_up", "timeout_s", "error"),
    [(True, TIMEOUT_S, RuntimeError), (False, 0.01, TimeoutError)],
    ids=["given up", "too late"],
)
def test_a_kernel_that_would_never_end_is_aborted(
    given_up: bool, timeout_s: float, error: type[Exception]
) -> None:
    left = LeftByPeer()
    group = SenderGroup(left, dist.HashStore())
    with pytest.raises(error):
        group.broadcast(torch.zeros(4), timeout_s=timeout_s, given_up=lambda: given_up)
    group.close()
    assert left.calls == ["abort"]


def test_a_group_of_gloo_works_until_it_is_closed() -> None:
    store = SenderStore("127.0.0.1", TIMEOUT_S)
    arrived = torch.zeros(1000, dtype=torch.uint8)

    def receive() -> None:
        group = join_sender_group(store.host, store.port, rank=1, size=2, device=CPU, timeout_s=TIMEOUT_S)
        group.broadcast(arrived, timeout_s=TIMEOUT_S)
        group.close()

    thread = threading.Thread(target=receive)
    thread.start()
    group = store.form_group(1, CPU)
    sent = torch.arange(1000).to(torch.uint8)
    group.broadcast(sent, timeout_s=TIMEOUT_S)
    thread.join()
    assert torch.equal(arrived, sent)
    group.close()


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
