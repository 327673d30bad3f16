"""The rendezvous of the ranks: how they connect, and on which addresses they listen.

A world of one has no store, but gloo still opens a socket, on loopback. On a single machine everything is on loopback.
Across machines rank 0 listens only on MASTER_ADDR. gloo listens on the address of the interface that leads to it.
"""

from __future__ import annotations

import datetime
import os

import torch.distributed as dist

from megatron_chord.network import address_towards, interface_of, is_loopback, listener, loopback, resolve
from megatron_chord.runtime.launcher import LISTENER_VARIABLE


def world_size_of_environment() -> int:
    """The number of processes of this run, from torchrun's variables; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def meet(backend: str, *, timeout_s: float) -> None:
    """Start torch.distributed by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them as a world of one.

    Sets ``GLOO_SOCKET_IFNAME`` of this process. Across machines an existing value is kept.

    Raises:
        ValueError: MASTER_ADDR is not an address of rank 0's machine, or other machines cannot reach it.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), world_size_of_environment()
    timeout = datetime.timedelta(seconds=timeout_s)
    _choose_interface(world_size)
    store = _store(rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _choose_interface(world_size: int) -> None:
    """Set the interface on which gloo listens. By default gloo would use the address of the host's name."""
    own = address_towards(_master()) if world_size > 1 else loopback()
    interface = interface_of(own)
    if interface is None:
        return
    if is_loopback(own):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The store through which ranks exchange addresses. Rank 0 listens; under torchrun its agent does, on all
    addresses."""
    if world_size == 1:
        return dist.HashStore()
    port = int(os.environ["MASTER_PORT"])
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        _master(),
        port,
        world_size,
        is_master=listens,
        timeout=timeout,
        master_listen_fd=_listening(port, world_size) if listens else None,
    )
    return dist.PrefixStore("megatron_chord", store)


def _listening(port: int, world_size: int) -> int:
    inherited = os.environ.pop(LISTENER_VARIABLE, None)
    if inherited is not None:
        return int(inherited)
    name, address = os.environ["MASTER_ADDR"], _master()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if is_loopback(address) and name != address and local < world_size:
        raise ValueError(
            f"MASTER_ADDR {name} is {address} on rank 0's machine, where {local} of the {world_size} ranks run: the "
            "others cannot reach it. Set MASTER_ADDR to an address that all machines reach"
        )
    try:
        return listener(address, port).detach()
    except OSError as error:
        raise ValueError(
            f"rank 0 cannot listen on MASTER_ADDR {name} ({address}), MASTER_PORT {port}: {error.strerror}"
        ) from error


def _master() -> str:
    """MASTER_ADDR as a numeric address."""
    name = os.environ["MASTER_ADDR"]
    try:
        return resolve(name)
    except OSError as error:
        raise ValueError(f"MASTER_ADDR {name} cannot be resolved: {error}") from error
