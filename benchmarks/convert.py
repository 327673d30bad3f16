"""Compare tools/convert.py with a plain copy of the same bytes: GB/s of each direction, and peak memory.

    python benchmarks/convert.py [--gb 10] [--folder /var/tmp]

The program makes a Llama-shaped model of random BF16 weights of about ``--gb`` (10^9 bytes) in shards of 2 GB. Then it
copies the folder, converts it to Megatron-Core's torch_dist and back, and verifies the result. Each of these runs in a
process of its own. Peak memory is the highest resident set of the process. It includes the program, the libraries, and
the mapped pages of the files that it reads, which the system can take back. The disk must have room for four times the
size. Every file is flushed to disk before the clock stops. All reads may come from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from shared import circumstances

from megatron_chord.families.table import read_shape
from megatron_chord.weights.writer import finish_folder, write_shards

TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert.py"
GB = 1e9
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 128256


def main() -> int:
    parser = argparse.ArgumentParser(description="Conversion beside a plain copy of the same bytes.")
    parser.add_argument("--gb", type=float, default=10.0, help="size of the model (default 10)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--copy", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.copy:
        shutil.copytree(*arguments.copy)
        return 0
    if arguments.make:
        make_model(arguments.make, arguments.gb)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        # A child makes the model. Each child starts as a copy of this process, so this process must stay small.
        made = [sys.executable, __file__, "--make", str(folder / "hf"), "--gb", str(arguments.gb)]
        subprocess.run(made, check=True)
        size = sum(file.stat().st_size for file in (folder / "hf").glob("*.safetensors"))
        tool = [sys.executable, str(TOOL)]
        commands = {
            "copy": [sys.executable, __file__, "--copy", str(folder / "hf"), str(folder / "copy")],
            "hf-to-megatron": [*tool, "hf-to-megatron", str(folder / "hf"), str(folder / "megatron")],
            "megatron-to-hf": [*tool, "megatron-to-hf", str(folder / "megatron"), str(folder / "back")],
            "verify": [*tool, "verify", str(folder / "hf"), str(folder / "back")],
        }
        report(size, {name: measured(command) for name, command in commands.items()})
    return 0


def make_model(folder: Path, gb: float) -> None:
    per_layer = 2 * HIDDEN * (2 * HIDDEN + 2 * HIDDEN * KV_HEADS // HEADS + 3 * FFN + 2)
    layers = max(1, round((gb * GB - 4 * VOCAB * HIDDEN) / per_layer))
    folder.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    source = folder.with_name("config")
    shutil.copytree(folder, source)
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str) -> torch.Tensor:
        kv = HIDDEN * KV_HEADS // HEADS
        rows = {"k_proj": kv, "v_proj": kv, "gate_proj": FFN, "up_proj": FFN}.get(name.split(".")[-2], HIDDEN)
        if "norm" in name:
            return torch.ones(HIDDEN, dtype=torch.bfloat16)
        if "embed" in name or "lm_head" in name:
            rows = VOCAB
        columns = FFN if "down_proj" in name else HIDDEN
        numbers = torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16, generator=generator)
        return numbers.bitwise_and_(-32257).view(
            torch.bfloat16
        )  # without the top bits of the exponent, so that numbers are finite

    names = read_shape(folder).weights.hf_names()
    placed = write_shards(
        ((name, tensor(name)) for name in names), folder, prefix="model", shard_bytes=2 * 10**9
    )
    finish_folder(folder, source, placed, dtype=torch.bfloat16)
    os.sync()


def measured(command: list[str]) -> tuple[float, float]:
    """Run a child process. Return the seconds until its files are on disk, and its peak memory in bytes."""
    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024


def report(size: int, results: dict[str, tuple[float, float]]) -> None:
    table = Table(title=f"a model of {size / GB:.1f} GB")
    for heading in ("what", "seconds", "GB/s", "of a copy's speed", "peak memory GB"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    copy_s = results["copy"][0]
    for name, (seconds, peak) in results.items():
        speed = f"{size / GB / seconds:.2f}"
        table.add_row(name, f"{seconds:.1f}", speed, f"{copy_s / seconds:.2f}", f"{peak / GB:.2f}")
    Console().print(table, circumstances())


if __name__ == "__main__":
    sys.exit(main())
