"""The program that a job runs as one task on each node: it starts, watches and ends the node's ranks and servers.

It starts the ranks itself, instead of one Slurm task for each rank or torchrun, for these reasons. The parent of a rank
reads its exit code; torchrun would turn every code into 1, and srun reports the highest code, which may be that of a
rank that it ended itself. Servers can be replaced without a Slurm step of their own. A signal to the step reaches one
process, which decides what to do. And a container is started once for each node.

The preflight (``cluster.preflight``) runs before, as a process of its own, which leaves no memory and no CUDA context
behind. This program holds the job's ports meanwhile.

If a rank fails, this program records which and when, ends all processes on its node and exits with the rank's code.
srun (--kill-on-bad-exit) then ends the other nodes in the same way. SIGUSR1 is ignored here, and vLLM inherits that.
Ranks take it as a stop request, and a file requests a stop, too (``train.stop``).

In a preemption (``cluster.sigterm``) the node requests a stop with a checkpoint. Before the ranks start there is
nothing to save: SIGTERM ends this program, and the batch script puts the job back into the queue.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_chord.cluster import preflight
from megatron_chord.cluster.address import set_nccl_network
from megatron_chord.cluster.caches import make_own_caches
from megatron_chord.cluster.job import Job, job_of
from megatron_chord.cluster.outcome import (
    described,
    exit_code_of,
    has_outcome,
    record_failure,
    recorded_end,
    write_outcome,
)
from megatron_chord.cluster.ports import Ports, hold_ports
from megatron_chord.cluster.ranks import Rank, start_ranks
from megatron_chord.cluster.servers import NodeServers, count_servers, order_of
from megatron_chord.cluster.sigterm import PREEMPTED_FILE, Sigterms
from megatron_chord.cluster.stopped import StoppedRank
from megatron_chord.cluster.watching import run_watched
from megatron_chord.config import RunConfig
from megatron_chord.config_io import load_config
from megatron_chord.processes import die_with_parent
from megatron_chord.rollout.registry import JobRollout
from megatron_chord.runtime import heartbeat
from megatron_chord.runtime.launcher import RANK_OF_LAUNCHER
from megatron_chord.train import stop
from megatron_chord.train.folder import CHECKPOINTS, LATEST
from megatron_chord.train.setup import check_run

STOP_FILE = "stop"
CHECKPOINT_FILE = "checkpoint"
"""The name of the newest checkpoint when a process froze. The batch script does not requeue a job that froze twice at
the same checkpoint."""
_HEARTBEATS = "heartbeats"
_POLL_S = 0.05
_OUTCOME_POLL_S = 1.0
_RANK_GRACE_S = 12.0
"""Seconds between the signal that ends a rank (``Rank.terminate``) and SIGKILL. Slurm itself waits 30 s (KillWait)."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_chord.cluster.node", description=__doc__)
    parser.add_argument("config", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    arguments = [str(args.config), *args.overrides]
    job = job_of(os.environ, num_gpus=torch.cuda.device_count())
    try:
        ports = hold_ports(job) if job.is_head else None
    except OSError as error:
        return preflight.fail(job, preflight.EXIT_CODE, [f"{job.name}: {error.strerror}"])
    code = _check_nodes(job, arguments, ports)
    if code != 0:
        return code
    try:
        run = load_config(args.config, args.overrides)
        _, method = check_run(run, job.world_size)
        num_servers = count_servers(job, run, method)
        set_nccl_network(os.environ, job.numeric_address())
    except ValueError as error:
        record_failure(job.folder, f"{job.name}-settings", preflight.REFUSED, str(error))
        return preflight.REFUSED
    return _Node(job, run, arguments, num_servers, ports).run()


def _check_nodes(job: Job, arguments: Sequence[str], ports: Ports | None) -> int:
    """Run the preflight with all nodes. Returns its exit code; it has recorded its failure."""
    parent = os.getpid()
    status = subprocess.run(
        [sys.executable, "-m", "megatron_chord.cluster.preflight", *arguments],
        env=os.environ | (ports.to_variable() if ports is not None else {}),
        pass_fds=ports.descriptors() if ports is not None else (),
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: die_with_parent(parent),
        check=False,
    ).returncode
    if status < 0:
        return preflight.fail_unless_preempted(job, exit_code_of(status), [f"{job.name} {described(status)}"])
    return status


class _Node:
    def __init__(
        self, job: Job, run: RunConfig, arguments: Sequence[str], num_servers: int, ports: Ports | None
    ) -> None:
        """``ports``: those of the job, on the first node. They are closed when its ranks have been started."""
        self._job = job
        self._run = run
        self._arguments = arguments
        self._num_servers = num_servers
        self._ports = ports
        self._ranks: list[Rank] = []
        self._stopped: StoppedRank | None = None
        self._servers: NodeServers | None = None
        self._sigterms = Sigterms(job.folder)
        self._is_preempted = False
        self._next_look = 0.0

    def run(self) -> int:
        """Run until the ranks and servers of this node have ended. Returns the exit code."""
        self._sigterms.listen()
        return run_watched(self._job, start=self._start, watch=self._watch, end=self._stop, pause_s=_POLL_S)

    def _start(self) -> None:
        make_own_caches(os.environ)
        job = self._job
        if job.samples and self._num_servers:
            self._servers = NodeServers(job, order_of(self._run, job), say=self._say)
        if job.trains:
            environment = {
                RANK_OF_LAUNCHER: str(os.getpid()),
                stop.FILE_VARIABLE: str(job.folder / STOP_FILE),
                heartbeat.FOLDER_VARIABLE: str(job.folder / _HEARTBEATS),
            }
            if self._num_servers:
                environment |= JobRollout(
                    folder=job.folder,
                    count=self._num_servers,
                    address=job.numeric_address(),
                    transport=job.transport(),
                ).to_variable()
            command = ["-m", "megatron_chord.cli", "train", *self._arguments, "--resume", "auto"]
            with self._ports or contextlib.nullcontext():
                self._ranks = start_ranks(
                    job,
                    command,
                    name="train",
                    environment=environment,
                    meeting_point=self._ports.ranks if self._ports is not None else None,
                )
            if job.world_size == 1 and self._run.watchdog.beat_s > 0:
                self._stopped = StoppedRank(
                    self._ranks[0].pid,
                    rank=0,
                    node=job.name,
                    beats=job.folder / _HEARTBEATS,
                    limit_s=self._run.watchdog.silence_s,
                )

    def _watch(self) -> int | None:
        """Check ranks and servers. Returns the exit code when it is known, else None."""
        if self._sigterms and self._must_end():
            return 128 + signal.SIGTERM
        # A job that stops needs no new servers.
        if self._servers is not None and not self._sigterms:
            self._servers.watch()
        if self._job.trains:
            return self._watch_ranks()
        return self._look_for_outcome()

    def _must_end(self) -> bool:
        """Decide what a SIGTERM means: True to end now. In a preemption, request a stop and return False."""
        folder, meaning = self._job.folder, self._sigterms.meaning()
        if meaning == "preemption" and not self._is_preempted:
            self._is_preempted = True
            if not (folder / PREEMPTED_FILE).exists():
                self._say(
                    "SIGTERM, which is a preemption: the run writes a checkpoint, and the job returns to the queue"
                )
            (folder / PREEMPTED_FILE).touch()
            (folder / STOP_FILE).touch()
            if self._servers is not None:
                # vLLM receives the SIGTERM, too. It ends its engine, and then waits for open requests that nobody
                # answers. So each node kills its own servers.
                self._servers.kill()
        return meaning == "end"

    def _watch_ranks(self) -> int | None:
        statuses = [rank.status for rank in self._ranks]
        if self._sigterms and -signal.SIGTERM in statuses:
            # The SIGTERM of a preemption came before the rank could ignore it, so before its first step.
            write_outcome(self._job.folder, stop.EXIT_CODE_IDLE)
            return 0
        failed = [
            (rank, status)
            for rank, status in zip(self._ranks, statuses, strict=True)
            if status not in (None, 0, stop.EXIT_CODE, stop.EXIT_CODE_IDLE)
        ]
        end = recorded_end(self._job.folder) if failed else None
        if failed and end is None:
            rank, status = failed[0]
            message = f"rank {rank.number} on {self._job.name} {described(status)}"
            verdict = heartbeat.read_verdict(self._job.folder / _HEARTBEATS)
            if status == heartbeat.EXIT_CODE and verdict is not None:
                message = verdict["text"]
            return self._failed(rank, exit_code_of(status), message)
        stopped = self._stopped.look(time.monotonic()) if self._stopped is not None else None
        if self._stopped is not None and stopped is not None:
            self._stopped.print_stacks()
            return self._failed(self._ranks[0], heartbeat.EXIT_CODE, stopped)
        if None in statuses:
            return None
        for rank, status in failed:
            self._say(f"warning: after the end of the run, rank {rank.number} {described(status)}")
        if self._job.is_head:
            code = max(status for status in statuses if status is not None) if end is None else end
            write_outcome(self._job.folder, code)
        # A stop is not a failure: with a code other than 0, srun would end nodes that are still saving.
        return 0

    def _failed(self, rank: Rank, code: int, message: str) -> int:
        """Record the failure of a rank of this node. Returns ``code``."""
        rank.complete_log()
        if code == heartbeat.EXIT_CODE:
            latest = self._run.output / CHECKPOINTS / LATEST
            with contextlib.suppress(OSError):
                name = latest.read_text() if latest.exists() else "none\n"
                (self._job.folder / CHECKPOINT_FILE).write_text(name)
        record_failure(self._job.folder, f"rank{rank.number}", code, message, rank.log)
        return code

    def _look_for_outcome(self) -> int | None:
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + _OUTCOME_POLL_S
        return 0 if has_outcome(self._job.folder) else None

    def _stop(self) -> None:
        deadline = time.monotonic() + _RANK_GRACE_S
        for rank in self._ranks:
            if rank.status is None:
                rank.terminate()
        if self._servers is not None:
            self._servers.stop()
        for rank in self._ranks:
            rank.end(deadline)

    def _say(self, text: str) -> None:
        print(f"[{self._job.name}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
