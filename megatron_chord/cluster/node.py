"""What a job runs on each of its nodes, one task a node: this node's ranks and rollout servers, and their end.

One task a node, which starts the ranks itself, rather than one task a rank or torchrun. A rank's exit code is then read
by its own parent (torchrun turns every one into 1, and srun reports the highest, which is that of a rank it ended
itself); servers can be replaced without a step of their own; a signal sent to the step ends at one process, which
decides what it means; and what a container costs is paid once a node.

When a rank fails, this writes down which and when, ends everything on this node and exits with its code; srun
(--kill-on-bad-exit) then ends the other nodes the same way. SIGUSR1 is ignored here and, by inheritance, in vLLM:
ranks take it for the wish to stop, and a file says it too (``train.stop``).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from megatron_chord.cluster.job import Job, job_of
from megatron_chord.cluster.outcome import (
    described,
    exit_code_of,
    has_outcome,
    record_failure,
    write_outcome,
)
from megatron_chord.cluster.ranks import Rank, start_ranks
from megatron_chord.cluster.servers import NodeServers, ServerLost, count_servers
from megatron_chord.config import RunConfig
from megatron_chord.config_io import load_config
from megatron_chord.rollout.registry import JobRollout
from megatron_chord.runtime import heartbeat
from megatron_chord.runtime.launcher import RANK_OF_LAUNCHER
from megatron_chord.train import stop
from megatron_chord.train.setup import check_run

STOP_FILE = "stop"
_HEARTBEATS = "heartbeats"
_POLL_S = 0.05
_OUTCOME_POLL_S = 1.0
_RANK_GRACE_S = 12.0
"""After SIGTERM. Slurm itself waits 30 s (KillWait) between its SIGTERM and SIGKILL."""
_REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_chord.cluster.node", description=__doc__)
    parser.add_argument("config", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    job = job_of(os.environ, num_gpus=torch.cuda.device_count())
    try:
        run = load_config(args.config, args.overrides)
        _, method = check_run(run, job.world_size)
        num_servers = count_servers(job, run, method)
    except ValueError as error:
        record_failure(job.folder, f"{job.name}-settings", _REFUSED, str(error))
        return _REFUSED
    return _Node(job, run, [str(args.config), *args.overrides], num_servers).run()


class _Node:
    def __init__(self, job: Job, run: RunConfig, arguments: Sequence[str], num_servers: int) -> None:
        self._job = job
        self._run = run
        self._arguments = arguments
        self._num_servers = num_servers
        self._ranks: list[Rank] = []
        self._servers: NodeServers | None = None
        self._terminated = False
        self._next_look = 0.0

    def run(self) -> int:
        """Until this node's part is over, one way or the other; its exit code."""
        signal.signal(signal.SIGTERM, self._on_terminate)
        try:
            self._start()
            while True:
                code = self._watch()
                if code is not None:
                    return code
                time.sleep(_POLL_S)
        except ServerLost as error:
            record_failure(self._job.folder, f"server{error.server}", 1, str(error), error.log)
            return 1
        except Exception as error:
            message = f"{self._job.name}: {type(error).__name__}: {error}"
            record_failure(self._job.folder, f"node-{self._job.name}", 1, message)
            raise
        finally:
            self._stop()

    def _start(self) -> None:
        job = self._job
        if job.samples and self._num_servers:
            self._servers = NodeServers(job, self._run, say=self._say)
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
            self._ranks = start_ranks(job, command, name="train", environment=environment)

    def _watch(self) -> int | None:
        """The exit code, once it is known."""
        if self._terminated:
            return 128 + signal.SIGTERM
        if self._servers is not None:
            self._servers.watch()
        if self._job.trains:
            return self._watch_ranks()
        return self._look_for_outcome()

    def _watch_ranks(self) -> int | None:
        statuses = [rank.status for rank in self._ranks]
        for rank, status in zip(self._ranks, statuses, strict=True):
            if status not in (None, 0, stop.EXIT_CODE, stop.EXIT_CODE_IDLE):
                message = f"rank {rank.number} on {self._job.name} {described(status)}"
                rank.complete_log()
                verdict = heartbeat.read_verdict(self._job.folder / _HEARTBEATS)
                if status == heartbeat.EXIT_CODE and verdict is not None:
                    message = verdict["text"]
                record_failure(
                    self._job.folder, f"rank{rank.number}", exit_code_of(status), message, rank.log
                )
                return exit_code_of(status)
        if None in statuses:
            return None
        if self._job.is_head:
            write_outcome(self._job.folder, max(status for status in statuses if status is not None))
        # A stop is no failure: with a code other than 0, srun would end nodes that are still saving.
        return 0

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

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def _say(self, text: str) -> None:
        print(f"[{self._job.name}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
