"""A timeline of some steps by torch's profiler, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

TRACES = "traces"
WARMUP_STEPS = 2
"""Of a start, untraced: they also load kernels and make buffers."""


class Tracer:
    """Of one rank. What other threads do (with ``rollout.asynchronous`` the sampling) is not in its trace."""

    def __init__(self, folder: Path, *, rank: int, first_step: int, count: int) -> None:
        """Trace ``count`` steps of a run that begins at ``first_step``, after its warm-up; none with 0."""
        self._path = folder / TRACES / f"rank-{rank}.json.gz"
        self._traced = range(first_step + WARMUP_STEPS, first_step + WARMUP_STEPS + count)
        self._profile: profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around each step, in order. The file is written after the last step to be traced."""
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
        """Write what has been traced so far, if anything."""
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
