"""Functions for several benchmarks: a random model, processes as ranks, the memory of a process, and the machine and
versions of a result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chord.network import held_port


def circumstances(*packages: str) -> str:
    """Return the day, the machine with its load of the last 5 minutes, the versions of torch, megatron-core and
    ``packages``, and the command."""
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core", *packages)
    ]
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[1]
    machine = f"{platform.machine()}, {cores} cores, load {load:.1f}"
    return "; ".join([time.strftime("%Y-%m-%d"), machine, ", ".join(versions), " ".join(sys.argv)])


def in_ranks(command: Sequence[str], ranks: int) -> list[dict[str, Any]]:
    """Run the command in so many processes with torchrun's variables. Return the JSON of each last line, by rank."""
    with held_port() as port:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        running = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=os.environ | place | {"RANK": str(rank)}
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{' '.join(command)} failed; out of memory?")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def save_qwen2(folder: Path, *, hidden: int, layers: int, vocab: int) -> Any:
    """Save a random FP32 model of Qwen2's shape in Hugging Face format. Return it as Transformers' module."""
    return save_model(folder, qwen2_config(hidden=hidden, layers=layers, vocab=vocab))


def qwen2_config(*, hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    """Return a config.json of Qwen2's family. The hidden size decides the other widths."""
    return {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def save_model(folder: Path, config: Mapping[str, Any], dtype: str = "fp32") -> Any:
    """Save a random model with this config.json in Hugging Face format. Return it as Transformers' module.

    Args:
        dtype: of the weights, fp32 or bf16, in memory while they are made and on disk.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=wanted)
    model.save_pretrained(folder)
    return model


def reset_high_water_mark() -> None:
    """Reset VmHWM to the present resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")
