"""A timeline of some steps by torch's profiler, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

TRACES = "traces"
WARMUP_STEPS = 2
"""Number of steps before tracing starts. They also load kernels and allocate buffers."""


class Tracer:
    """Traces one rank. The trace does not include other threads (with ``rollout.asynchronous`` these sample)."""

    def __init__(self, folder: Path, *, rank: int, first_step: int, count: int) -> None:
        """Trace ``count`` steps (0: none) after the warm-up steps of a run that begins at ``first_step``."""
        self._path = folder / TRACES / f"rank-{rank}.json.gz"
        self._traced = range(first_step + WARMUP_STEPS, first_step + WARMUP_STEPS + count)
        self._profile: profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Context manager around each step, in order. The file is written after the last traced step."""
        if step == self._traced.start and self._traced:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        with record_function(f"step {step}"):
            yield
        if step + 1 == self._traced.stop:
            self.close()

    def close(self) -> None:
        """Write the steps traced so far, if any."""
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
