"""A Slurm job as its nodes see it: who is there, who trains, who samples, and where the job's files lie.

The batch script (slurm/lib/launch.sh) says all of it in environment variables, since a container on a node has no
Slurm commands. Nothing here is guessed from host names.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_chord.network import address_towards, is_loopback
from megatron_chord.rollout.sync import TransportName


@dataclass(frozen=True, kw_only=True)
class Node:
    name: str
    address: str
    """As Slurm knows it (NodeAddr): a name or an address, reachable from every other node."""


@dataclass(frozen=True, kw_only=True)
class Job:
    folder: Path
    """Of this restart of the job, on the shared file system; private to the user."""
    nodes: tuple[Node, ...]
    """All of the job's; training nodes first, then those that only sample."""
    index: int
    """Of this node."""
    port: int
    """On the first node: where the ranks meet. The one after it is the preflight's."""
    num_rollout_nodes: int
    """Nodes that only sample; 0 puts the servers beside the ranks, on every node."""
    ranks_per_node: int
    gpus: tuple[str, ...]
    """This node's, as entries of CUDA_VISIBLE_DEVICES; empty on a machine without CUDA."""
    servers_per_node: int | None
    """As asked for; None leaves it to the GPUs."""

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
        """The global rank of this node's first one."""
        return self.index * self.ranks_per_node

    @property
    def samples(self) -> bool:
        return self.num_rollout_nodes == 0 or not self.trains

    def num_servers_here(self, tensor: int) -> int:
        """Servers of ``tensor`` GPUs each on every node that samples. ValueError where they do not fit."""
        if self.servers_per_node is not None:
            count = self.servers_per_node
        else:
            count = len(self.gpus) // tensor if self.gpus else 1
        if count < 1 or (self.gpus and count * tensor > len(self.gpus)):
            raise ValueError(
                f"{count} rollout servers of rollout.tensor {tensor} do not fit on the {len(self.gpus)} GPUs of a node"
            )
        return count

    def num_servers(self, tensor: int) -> int:
        """Servers of the whole job."""
        nodes = self.num_rollout_nodes or len(self.nodes)
        return nodes * self.num_servers_here(tensor)

    def first_server(self, tensor: int) -> int:
        """The job-wide index of this node's first server."""
        place = self.index - (self.num_training_nodes if self.num_rollout_nodes else 0)
        return place * self.num_servers_here(tensor)

    def server_devices(self, server: int, tensor: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of this node's ``server``-th server; None without GPUs.

        Beside ranks the server also sees the node's other GPUs, after its own: it opens CUDA IPC handles of theirs.
        """
        if not self.gpus:
            return None
        own = self.gpus[server * tensor : (server + 1) * tensor]
        others = tuple(gpu for gpu in self.gpus if gpu not in own) if self.trains else ()
        return ",".join(own + others)

    def transport(self) -> TransportName:
        """How weights get from the ranks to the servers, where the run leaves it open."""
        if not self.gpus:
            return "file" if len(self.nodes) == 1 else "gloo"
        if self.num_rollout_nodes:
            return "broadcast"
        # NCCL refuses two ranks on one GPU, and CUDA IPC ends at the node.
        return "ipc" if len(self.nodes) == 1 else "gloo"

    def numeric_address(self) -> str:
        """This node's IPv4 address, for servers to listen on. OSError where a name cannot be resolved."""
        own = socket.gethostbyname(self.nodes[self.index].address)
        if len(self.nodes) > 1 and is_loopback(own):
            # Debian's /etc/hosts gives a machine's own name a loopback address, which its peers cannot reach.
            peer = socket.gethostbyname(self.nodes[1 if self.is_head else 0].address)
            if not is_loopback(peer):
                return address_towards(peer)
        return own


def job_of(environment: Mapping[str, str], *, num_gpus: int) -> Job:
    """The job that the batch script describes.

    Args:
        num_gpus: that CUDA finds on this node.

    Raises:
        ValueError: a variable is missing or makes no sense.
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
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(num_gpus)]
    return Job(
        folder=Path(_needed(environment, "CHORD_JOB")),
        nodes=nodes,
        index=names.index(name),
        port=_number("CHORD_PORT", _needed(environment, "CHORD_PORT")),
        num_rollout_nodes=num_rollout_nodes,
        ranks_per_node=_count(environment, "CHORD_RANKS_PER_NODE") or max(1, num_gpus),
        gpus=tuple(gpus[:num_gpus]),
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
