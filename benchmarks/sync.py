"""A push of weights into a real vLLM server beside a plain copy of the same bytes in memory.

    python benchmarks/sync.py [--hidden 512 --layers 8 --vocab 32768] [--pushes 5] [--transport file]

A random Qwen2-shaped model is pushed again and again from this process to a server on the same machine, with other
numbers each time: paused, sent in buckets, each tensor's fingerprint checked as it arrives, finished, resumed. The copy
is torch's, of one buffer of as many bytes. Medians; the first push, which sets the transport up, is shown apart. On a
machine with GPUs the transport is ``broadcast`` (NCCL) unless told otherwise, and the server needs a GPU of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from shared import circumstances, save_qwen2

from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.server import ServerSettings, start_server
from megatron_chord.rollout.sync import SyncSettings, WeightSync

GB = 1e9


def main() -> int:
    arguments = parse()
    torch.set_num_threads(1)
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if has_cuda else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        model = save_qwen2(folder, hidden=arguments.hidden, layers=arguments.layers, vocab=arguments.vocab)
        weights = {name: parameter.detach().to(device) for name, parameter in model.named_parameters()}
        settings = ServerSettings(
            dtype="fp32",
            max_model_len=256,
            kv_cache_bytes=64 << 20,
            visible_devices="1" if has_cuda else None,
        )
        server = start_server(folder, settings, log=Path(name) / "server.log")
        try:
            server.wait_until_ready(600)
            client = RolloutClient(server.url, server.api_key)
            sync = WeightSync(
                [client],
                SyncSettings(
                    transport=arguments.transport or ("broadcast" if has_cuda else "file"), timeout_s=600
                ),
                exporters=[0],
                group=None,
                device=device,
            )
            seconds = []
            for version in range(arguments.pushes + 1):
                for tensor in weights.values():
                    tensor.add_(1e-3)
                report = sync.push(weights.items(), version)
                seconds.append(report.seconds)
            sync.close()
            client.close()
        finally:
            server.stop()
    copies = [copy_seconds(report.num_bytes, device) for _ in range(5)]
    show(report.num_bytes, seconds, statistics.median(copies))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A push of weights beside a copy in memory.")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--transport", choices=["file", "broadcast", "ipc"])
    return parser.parse_args()


def copy_seconds(num_bytes: int, device: torch.device) -> float:
    """Of one buffer into another whose pages are there already."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    start = time.perf_counter()
    target.copy_(source)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def show(num_bytes: int, seconds: list[float], copy: float) -> None:
    first, *others = seconds
    push = statistics.median(others)
    table = Table(title=f"{num_bytes / GB:.3f} GB of weights")
    for heading in ("what", "seconds", "GB/s", "of a copy's time"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for what, value in (("copy in memory", copy), ("push", push), ("first push, with set-up", first)):
        table.add_row(what, f"{value:.3f}", f"{num_bytes / GB / value:.2f}", f"{value / copy:.1f}")
    print(json.dumps({"seconds": seconds, "copy": copy, "bytes": num_bytes}), file=sys.stderr)
    Console(width=110).print(table, circumstances())


if __name__ == "__main__":
    sys.exit(main())
