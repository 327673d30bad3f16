"""The parts of a run, each with its time limit. The most useful come first: what every run uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.gpu.rows import CEILINGS

Need = Literal["a CUDA device", "a GPU of capability 9.0", "Transformer Engine"]
_EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    what: str
    limit: int
    """Seconds after which the part is stopped."""
    command: tuple[str, ...]
    """Arguments after ``python``. A module of this package also gets the file for its rows."""
    needs: tuple[Need, ...] = ()
    profiled: bool = False
    """Whether the part takes ``--profile FILE``."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def writes_rows(self) -> bool:
        return self.command[0] == "-m"


def _update(name: str, what: str, *options: str, limit: int, needs: tuple[Need, ...] = ()) -> Part:
    return Part(
        name=name,
        what=what,
        limit=limit,
        command=("-m", "benchmarks.gpu.update", *options),
        needs=needs,
        profiled=True,
        environment=_EXPANDABLE,
    )


def _checks(name: str, what: str, *options: str, limit: int, needs: tuple[Need, ...]) -> Part:
    return Part(
        name=name, what=what, limit=limit, command=("-m", "benchmarks.gpu.checks", *options), needs=needs
    )


_TE: tuple[Need, ...] = ("a CUDA device", "Transformer Engine")
_FP8: tuple[Need, ...] = ("a GPU of capability 9.0", "Transformer Engine")
_FULL = ("--recompute", "full", "--max-tokens")
PARTS: tuple[Part, ...] = (
    Part(
        name=CEILINGS,
        what="matrix products, copies, transfers: what all times are a share of",
        limit=60,
        command=("-m", "benchmarks.gpu.ceilings"),
    ),
    _checks(
        "parity",
        "a step beside float64 Transformers; the head's kernels",
        "tests/gpu/test_step.py",
        "tests/gpu/test_head.py",
        limit=240,
        needs=(),
    ),
    Part(
        name="head",
        what="the head at 7B and 70B shapes beside naive, checkpointed, TRL and Liger",
        limit=150,
        command=("-m", "benchmarks.gpu.head"),
    ),
    _update(
        "update-7b",
        "an update of the 7B shape, local layers; profile, planner, offload",
        "--local",
        limit=120,
    ),
    _update("update-7b-full", "the same, all recomputed, more layers", "--local", *_FULL, "16384", limit=90),
    _update(
        "update-70b",
        "an update of the 70B shape, all recomputed",
        *("--shape", "70b", "--local", *_FULL, "8192", "--micro-batches", "2"),
        limit=100,
    ),
    _checks(
        "memory",
        "offload's and the planner's tests",
        "tests/gpu/test_offload.py",
        "tests/gpu/test_plan.py",
        limit=150,
        needs=("a CUDA device",),
    ),
    _checks(
        "te-parity",
        "Transformer Engine's layers beside the local ones",
        "tests/gpu/test_step.py",
        "--only",
        "transformer_engine",
        limit=150,
        needs=_TE,
    ),
    _update("te-update", "the 7B update with Transformer Engine's layers", limit=120, needs=_TE),
    _update(
        "fp8-blocks", "the same in FP8, scales of blocks", "--precision", "fp8_e2e", limit=120, needs=_FP8
    ),
    _update(
        "fp8-tensors",
        "the same in FP8, scales of tensors",
        "--precision",
        "fp8_tensorwise",
        limit=120,
        needs=_FP8,
    ),
    Part(
        name="weights",
        what="fingerprints and staging buffers of a push",
        limit=60,
        command=("-m", "benchmarks.gpu.weights"),
    ),
    _checks(
        "weights-tests",
        "that these are right",
        "tests/rollout/test_gpu.py",
        "--only",
        "fingerprint or staging",
        limit=60,
        needs=("a CUDA device",),
    ),
    _checks(
        "fp8-tests", "FP8 follows BF16, resumes, and fits", "tests/gpu/test_fp8.py", limit=280, needs=_FP8
    ),
    _update("update-7b-mlp", "the 7B update, MLPs recomputed", "--local", "--recompute", "mlp", limit=90),
    _update(
        "update-70b-none",
        "the 70B update, nothing recomputed",
        *("--shape", "70b", "--local", "--max-tokens", "4096"),
        limit=90,
    ),
    Part(
        name="beside-plain",
        what="an update beside plain Transformers and AdamW (a table in its log)",
        limit=150,
        command=("benchmarks/step.py", "--shape", "7b", "--layers", "4", "--dtype", "bf16", "--tails"),
        needs=("a CUDA device",),
    ),
)
BY_NAME = {part.name: part for part in PARTS}
