"""Process groups that bring weights from trainer ranks to servers or to other ranks, with a deadline for each wait.

They are apart from torch.distributed's groups. One member, with rank 0, has the store through which the others join:

    store = SenderStore(host)                      host and port are told to the others
    group = store.form_group(others, ...)          on the first member
    group = join_sender_group(host, port, ...)     on each other member

Both calls end when the members are connected. Two things in them would otherwise wait without end. NCCL connects in the
first collective, inside of the call that starts it (ncclCommInitRank), and waits there for ever if a member is missing.
So all members first meet in the store, where a missing one is named at the deadline. Then they make a collective of one
byte in a thread of its own, which is given up at the deadline.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.network import address_towards, listener

_LOOK_S = (0.002, 0.5)
"""Shortest and longest pause between two looks into the store."""


def _never() -> bool:
    return False


class SenderGroup:
    """A process group that is separate from torch.distributed's default group. One rank sends, all others receive."""

    def __init__(self, group: Any, store: dist.Store) -> None:
        self._group = (
            group  # ProcessGroupGloo or ProcessGroupNCCL, which torch's stubs do not call a ProcessGroup
        )
        self._store = store  # kept: NCCL connects only at its first collective
        self._has_communicator = False
        self._is_closed = False

    def connect(
        self, device: torch.device, *, timeout_s: float, given_up: Callable[[], bool] = _never
    ) -> None:
        """Make the first collective, a broadcast of one byte from ``device``. Every member calls it.

        Raises:
            TimeoutError: it took longer than ``timeout_s``. A thread that waits inside of NCCL may remain.
            RuntimeError: a peer is gone, or ``given_up`` returned true.
        """
        failures: list[Exception] = []

        def broadcast() -> None:
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # each thread has a current device of its own
                byte = torch.zeros(1, dtype=torch.uint8, device=device)
                self.broadcast(byte, timeout_s=timeout_s, given_up=given_up)
            except Exception as error:
                failures.append(error)

        thread = Thread(target=broadcast, name="connect-weights", daemon=True)
        thread.start()
        end = time.monotonic() + timeout_s
        thread.join(_LOOK_S[1])
        while thread.is_alive():
            # Later than the broadcast's own deadline, which ends a kernel that waits for a peer.
            is_late = time.monotonic() > end + _LOOK_S[1]
            if is_late or given_up():
                text = "the process group for weights did not connect"
                raise TimeoutError(f"{text} within {timeout_s:.0f} s") if is_late else RuntimeError(text)
            thread.join(_LOOK_S[1])
        if failures:
            raise failures[0]

    def broadcast(
        self, buffer: Tensor, *, timeout_s: float, given_up: Callable[[], bool] = _never, root: int = 0
    ) -> None:
        """Copy the `buffer` of rank `root` of this group to every rank.

        After an error the group is closed.

        Raises:
            TimeoutError: it took longer than ``timeout_s``.
            RuntimeError: a peer is gone, or ``given_up`` returned true.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        end = time.monotonic() + timeout_s
        try:
            work = self._group.broadcast([buffer], options)
            self._has_communicator = True
            # Polled, because a wait() inside gloo or NCCL would not notice that the other side has given up.
            while not work.is_completed():
                if given_up():
                    raise RuntimeError("the receivers gave up during a broadcast of weights")
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"a broadcast of {buffer.nbytes} bytes took more than {timeout_s:.0f} s"
                    )
                time.sleep(0.0002)
            work.wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what is not finished, and release the communicator. May be called repeatedly, and waits for no peer.

        Only NCCL needs it. Its broadcast is a kernel, which runs on this GPU for ever if a peer has left: the next
        synchronisation with the device would not return, and NCCL's watchdog would end this process. NCCL's buffers on
        the GPU are not freed with the Python object, either. Nothing waits for a broadcast of gloo, and it ends at its
        timeout.
        """
        if self._group.name() == "nccl" and self._has_communicator and not self._is_closed:
            self._is_closed = True
            self._group.abort()


class SenderStore:
    """The store through which a process and others form a process group. It listens on one address only."""

    def __init__(self, host: str, timeout_s: float) -> None:
        """``timeout_s``: longest wait for an answer of the store."""
        own = listener(host, 0)
        self.host, self.port = host, own.getsockname()[1]
        self._store = dist.TCPStore(
            host,
            self.port,
            is_master=True,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=own.detach(),
        )

    def form_group(
        self,
        others: Sequence[str],
        device: torch.device,
        *,
        timeout_s: float,
        given_up: Callable[[], bool] = _never,
    ) -> SenderGroup:
        """Form and connect the group, as its rank 0.

        Args:
            others: names of the other members for error messages, in the order of their ranks.
            device: cuda: the group uses NCCL; else gloo.
            given_up: whether one of the others has failed, so that waiting for it is of no use.
        Raises:
            TimeoutError: a member, which is named, did not join within ``timeout_s``, or they did not connect.
            RuntimeError: a peer is gone, or ``given_up`` returned true.
        """
        members = ["this rank", *others]
        return _form(self._store, self.host, 0, members, device, timeout_s, given_up)


def join_sender_group(
    host: str, port: int, *, rank: int, members: Sequence[str], device: torch.device, timeout_s: float
) -> SenderGroup:
    """The others' side of ``SenderStore.form_group``, with the same errors.

    ``members``: names of all members for error messages.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return _form(store, address_towards(host), rank, members, device, timeout_s, _never)


def _form(
    store: dist.Store,
    own: str,
    rank: int,
    members: Sequence[str],
    device: torch.device,
    timeout_s: float,
    given_up: Callable[[], bool],
) -> SenderGroup:
    """``own`` is this process's address, on which gloo listens. NCCL chooses its interface itself."""
    end = time.monotonic() + timeout_s
    prefixed = dist.PrefixStore("megatron_chord.weights", store)
    _await_all(prefixed, rank, members, timeout_s, given_up)
    timeout, size = datetime.timedelta(seconds=timeout_s), len(members)
    if device.type != "cuda":
        gloo: Any = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue] (stubs lag behind)
        gloo._devices, gloo._timeout = [dist.ProcessGroupGloo.create_device(hostname=own)], timeout
        group = SenderGroup(dist.ProcessGroupGloo(prefixed, rank, size, gloo), store)
    else:
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        # NCCL's watchdog ends the whole process at its timeout. Our own deadline is shorter, so that it takes effect
        # first.
        options._timeout = 2 * timeout
        group = SenderGroup(dist.ProcessGroupNCCL(prefixed, rank, size, options), store)
    group.connect(device, timeout_s=max(end - time.monotonic(), 0.0), given_up=given_up)
    return group


def _await_all(
    store: dist.Store, rank: int, members: Sequence[str], timeout_s: float, given_up: Callable[[], bool]
) -> None:
    """Say in the store that this member is here, and wait for all others."""
    keys = [f"here/{place}" for place in range(len(members))]
    store.set(keys[rank], "")
    end, pause = time.monotonic() + timeout_s, _LOOK_S[0]
    while not store.check(keys):
        is_late = time.monotonic() > end
        if is_late or given_up():
            missing = [member for member, key in zip(members, keys, strict=True) if not store.check([key])]
            text = f"{', '.join(missing)} did not join the process group for weights"
            if is_late:
                raise TimeoutError(f"{text} within {timeout_s:.0f} s")
            raise RuntimeError(text)
        time.sleep(pause)
        pause = min(2 * pause, _LOOK_S[1])
