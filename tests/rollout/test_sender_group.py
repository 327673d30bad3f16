"""A process group of a push ends what a peer has left unfinished, and names a member that does not come."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_chord.rollout.sender_group import SenderGroup, SenderStore, join_sender_group

CPU = torch.device("cpu")
TIMEOUT_S = 60.0


def join(store: SenderStore, *, timeout_s: float, members: tuple[str, ...] = ("a", "b")) -> SenderGroup:
    """Join as the member with rank 1."""
    return join_sender_group(store.host, store.port, rank=1, members=members, device=CPU, timeout_s=timeout_s)


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
        group = join(store, timeout_s=TIMEOUT_S)
        group.broadcast(arrived, timeout_s=TIMEOUT_S)
        group.close()

    thread = threading.Thread(target=receive)
    thread.start()
    group = store.form_group(["the receiver"], CPU, timeout_s=TIMEOUT_S)
    sent = torch.arange(1000).to(torch.uint8)
    group.broadcast(sent, timeout_s=TIMEOUT_S)
    thread.join()
    assert torch.equal(arrived, sent)
    group.close()


def test_a_member_that_never_joins_is_named_by_all_others() -> None:
    """Ranks 0 and 1 of three come. Without the meeting in the store gloo names an address at most, and NCCL waits
    without end."""
    store = SenderStore("127.0.0.1", TIMEOUT_S)
    members = ("rank 0 on n0", "rank 2 on n1", "rank 5 on n2")
    failures: dict[int, str] = {}

    def meet(rank: int) -> None:
        try:
            if rank == 0:
                store.form_group(members[1:], CPU, timeout_s=0.6)
            else:
                join(store, timeout_s=0.6, members=members)
        except TimeoutError as error:
            failures[rank] = str(error)

    begun = time.monotonic()
    threads = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    named = "rank 5 on n2 did not join the process group for weights within 1 s"
    assert failures == {0: named, 1: named}
    assert time.monotonic() - begun < 20


def test_nobody_waits_for_a_server_that_has_refused() -> None:
    store = SenderStore("127.0.0.1", TIMEOUT_S)
    begun = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"^worker 0 of http://n1 did not join the process group for weights$"
    ):
        store.form_group(["worker 0 of http://n1"], CPU, timeout_s=TIMEOUT_S, given_up=lambda: True)
    assert time.monotonic() - begun < 20


class Connecting:
    """A stand-in for a process group of NCCL, which does not exist without a GPU. Its first collective does not return
    while a peer is missing."""

    def __init__(self) -> None:
        self.arrived = threading.Event()

    def name(self) -> str:
        return "nccl"

    def broadcast(self, *_: Any) -> Any:
        self.arrived.wait()
        raise RuntimeError("a peer is gone")

    def abort(self) -> None:
        raise AssertionError("there is no communicator that could be aborted")


@pytest.mark.parametrize(
    ("given_up", "timeout_s", "error"),
    [(True, TIMEOUT_S, RuntimeError), (False, 0.1, TimeoutError)],
    ids=["given up", "too late"],
)
def test_a_first_collective_that_does_not_return(
    given_up: bool, timeout_s: float, error: type[Exception]
) -> None:
    connecting = Connecting()
    group = SenderGroup(connecting, dist.HashStore())
    begun = time.monotonic()
    with pytest.raises(error, match="the process group for weights did not connect"):
        group.connect(CPU, timeout_s=timeout_s, given_up=lambda: given_up)
    assert time.monotonic() - begun < 20
    group.close()
    connecting.arrived.set()
