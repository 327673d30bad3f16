"""The description of a Slurm job for its nodes: which nodes it has, which of them train or sample, and its folder.

The batch script (slurm/lib/launch.sh) passes all of it in environment variables, because a container on a node has no
Slurm commands. Nothing is guessed from host names.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_chord.network import address_towards, host_and_port, is_loopback, listener, resolve
from megatron_chord.plan.push import job_transport
from megatron_chord.rollout.server import named_gpus, number_of_servers, visible_to_server
from megatron_chord.rollout.sync import TransportName


@dataclass(frozen=True, kw_only=True)
class Node:
    name: str
    address: str
    """Slurm's NodeAddr: a name or an address that every other node can reach."""


@dataclass(frozen=True, kw_only=True)
class Job:
    folder: Path
    """The folder of this restart of the job, on the shared file system; private to the user."""
    nodes: tuple[Node, ...]
    """All nodes of the job: first those that train, then those that only sample."""
    index: int
    """Index of this node in ``nodes``."""
    port: int
    """Port on the first node for the rendezvous of the ranks. The preflight uses the next port."""
    num_rollout_nodes: int
    """Number of nodes that only sample. 0: every node has both ranks and servers."""
    ranks_per_node: int
    gpus: tuple[str, ...]
    """The GPUs of this node, as entries of CUDA_VISIBLE_DEVICES; empty on a machine without CUDA."""
    servers_per_node: int | None
    """Number of servers that the user requested; None: as many as fit on the GPUs."""

    @property
    def name(self) -> str:
        return self.nodes[self.index].name

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def is_head(self) -> bool:
        return self.index == 0

    @property
    def num_training_nodes(self) -> int:
        return len(self.nodes) - self.num_rollout_nodes

    @property
    def trains(self) -> bool:
        return self.index < self.num_training_nodes

    @property
    def world_size(self) -> int:
        return self.num_training_nodes * self.ranks_per_node

    @property
    def first_rank(self) -> int:
        """The global rank of this node's first rank."""
        return self.index * self.ranks_per_node

    @property
    def samples(self) -> bool:
        return self.num_rollout_nodes == 0 or not self.trains

    def num_servers_here(self, tensor: int) -> int:
        """Number of servers, with ``tensor`` GPUs each, on this node if it samples. Raises ValueError if they do not
        fit."""
        count = number_of_servers(self.servers_per_node, num_gpus=len(self.gpus), tensor=tensor)
        if count < 1:
            raise ValueError(
                f"{self.servers_per_node or 0} rollout servers of rollout.tensor {tensor} do not fit on the "
                f"{len(self.gpus)} GPUs of a node"
            )
        return count

    def num_servers(self, tensor: int) -> int:
        """Number of servers of the whole job."""
        nodes = self.num_rollout_nodes or len(self.nodes)
        return nodes * self.num_servers_here(tensor)

    def first_server(self, per_node: int) -> int:
        """The job-wide index of this node's first server, with ``per_node`` servers on each node that samples."""
        place = self.index - (self.num_training_nodes if self.num_rollout_nodes else 0)
        return place * per_node

    def server_devices(self, server: int, tensor: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of this node's ``server``-th server; None without GPUs."""
        return visible_to_server(self.gpus, server, tensor, with_ranks=self.trains)

    def transport(self) -> TransportName:
        """The transport of weights from ranks to servers with ``rollout.transport: auto``."""
        colocated = self.num_rollout_nodes == 0
        if self.gpus:
            return job_transport(nodes=len(self.nodes), colocated=colocated)
        if len(self.nodes) == 1:
            return "file"
        return "relay" if colocated else "gloo"

    def numeric_address(self) -> str:
        """The address of this node on which servers listen. Raises OSError if a name cannot be resolved."""
        own = resolve(self.nodes[self.index].address)
        if len(self.nodes) > 1 and is_loopback(own):
            # Debian's /etc/hosts gives a machine's own name a loopback address, which its peers cannot reach.
            peer = resolve(self.nodes[1 if self.is_head else 0].address)
            if not is_loopback(peer):
                return address_towards(peer)
        return own

    def head_address(self) -> str:
        """The first node's address, for this node. On the first node its name could be that of loopback."""
        return self.numeric_address() if self.is_head else self.head.address

    def listener(self, port: int) -> socket.socket:
        """A socket that listens on this node's address and on ``port``; 0: any port. Raises OSError if it cannot."""
        address = self.numeric_address()
        try:
            return listener(address, port)
        except OSError as error:
            remedy = "; set CHORD_PORT to a free pair of ports" if port else ""
            reason = os.strerror(error.errno or 0)
            raise OSError(
                error.errno, f"cannot listen on {host_and_port(address, port)}: {reason}{remedy}"
            ) from error


def job_of(environment: Mapping[str, str], *, num_gpus: int) -> Job:
    """Read the job's description from the variables that the batch script sets.

    Args:
        num_gpus: number of GPUs that CUDA finds on this node.

    Raises:
        ValueError: a variable is missing or invalid.
    """
    nodes = _nodes(_needed(environment, "CHORD_NODES"))
    name = environment.get("SLURMD_NODENAME", "")
    names = [node.name for node in nodes]
    if name not in names:
        raise ValueError(f"this node, SLURMD_NODENAME {name!r}, is not among CHORD_NODES {', '.join(names)}")
    num_rollout_nodes = _count(environment, "CHORD_ROLLOUT_NODES") or 0
    if num_rollout_nodes >= len(nodes):
        raise ValueError(
            f"CHORD_ROLLOUT_NODES is {num_rollout_nodes}, but of {len(nodes)} nodes at least one must train"
        )
    return Job(
        folder=Path(_needed(environment, "CHORD_JOB")),
        nodes=nodes,
        index=names.index(name),
        port=_number("CHORD_PORT", _needed(environment, "CHORD_PORT")),
        num_rollout_nodes=num_rollout_nodes,
        ranks_per_node=_count(environment, "CHORD_RANKS_PER_NODE") or max(1, num_gpus),
        gpus=named_gpus(environment, num_gpus),
        servers_per_node=_count(environment, "CHORD_SERVERS_PER_NODE"),
    )


def _nodes(text: str) -> tuple[Node, ...]:
    """``n0=10.0.0.1 n1=10.0.0.2`` -> nodes in that order."""
    pairs = [entry.partition("=") for entry in text.split()]
    if not pairs or not all(name and address for name, _, address in pairs):
        raise ValueError(f"CHORD_NODES must list NAME=ADDRESS of every node, it is {text!r}")
    return tuple(Node(name=name, address=address) for name, _, address in pairs)


def _needed(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name)
    if not value:
        raise ValueError(f"{name} is not set; start this through the scripts in slurm/")
    return value


def _count(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    return _number(name, text) if text else None


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{name} must be a number, it is {text!r}")
    return int(text)
