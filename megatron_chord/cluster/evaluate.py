"""The program that an evaluation job runs as one task on each node: it runs the node's vLLM servers.

On the first node it also runs `megatron-chord evaluate`, which says in the job's folder which servers the nodes start,
and sends its requests to all of them. Its exit code becomes that of the job.

The file ``stop`` and a preemption (``cluster.sigterm``) end the evaluation. Its answers are kept, and the job goes back
to the queue.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import torch

from megatron_chord.cluster.caches import make_own_caches
from megatron_chord.cluster.job import Job, job_of
from megatron_chord.cluster.node import STOP_FILE
from megatron_chord.cluster.outcome import exit_code_of, has_outcome, write_outcome
from megatron_chord.cluster.servers import NodeServers
from megatron_chord.cluster.sigterm import PREEMPTED_FILE, Sigterms
from megatron_chord.cluster.watching import run_watched
from megatron_chord.processes import die_with_parent
from megatron_chord.rollout.registry import JobNodes, Registry
from megatron_chord.train.stop import EXIT_CODE

_LOOK_S = 0.2
_GRACE_S = 10.0
"""Seconds between the SIGTERM and the SIGKILL of an evaluation that must end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one node's part. ``argv``: the arguments of `megatron-chord evaluate`."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # CHORD_ROLLOUT_NODES is for training jobs. It may be set in the shell that submits both.
    job = job_of(os.environ | {"CHORD_ROLLOUT_NODES": ""}, num_gpus=torch.cuda.device_count())
    return _Node(job, sys.argv[1:] if argv is None else argv).run()


class _Node:
    def __init__(self, job: Job, arguments: Sequence[str]) -> None:
        self._job = dataclasses.replace(job, num_rollout_nodes=len(job.nodes))  # no node trains
        self._arguments = arguments
        self._sigterms = Sigterms(job.folder)
        self._registry = Registry(job.folder)
        self._evaluation: subprocess.Popen[bytes] | None = None
        self._servers: NodeServers | None = None
        self._is_stopped = False

    def run(self) -> int:
        """Run until the evaluation has ended. Returns the exit code."""
        self._sigterms.listen()
        return run_watched(self._job, start=self._start, watch=self._watch, end=self._end, pause_s=_LOOK_S)

    def _start(self) -> None:
        make_own_caches(os.environ)
        if self._job.is_head:
            self._evaluation = self._start_evaluation()

    def _start_evaluation(self) -> subprocess.Popen[bytes]:
        nodes = JobNodes(folder=self._job.folder, count=len(self._job.nodes))
        parent = os.getpid()
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_chord.cli", "evaluate", *self._arguments],
            env=os.environ | nodes.to_variables(),
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: die_with_parent(parent),
        )

    def _watch(self) -> int | None:
        """Look at the evaluation and the servers. Returns the exit code when it is known, else None."""
        folder, meaning = self._job.folder, self._sigterms.meaning() if self._sigterms else None
        if meaning == "end":
            return 128 + signal.SIGTERM
        if meaning == "preemption":
            (folder / PREEMPTED_FILE).touch()
        if not self._is_stopped and (meaning == "preemption" or (folder / STOP_FILE).exists()):
            self._is_stopped = True
            if self._evaluation is not None:
                self._evaluation.terminate()
        if not self._sigterms and not self._is_stopped:
            self._look_after_servers()
        if self._evaluation is None:
            return 0 if has_outcome(folder) else None
        status = self._evaluation.poll()
        if status is None or (status != 0 and meaning == "not known yet"):
            return None
        # An evaluation that was complete at the signal is complete.
        write_outcome(folder, EXIT_CODE if self._is_stopped and status != 0 else exit_code_of(status))
        return 0

    def _look_after_servers(self) -> None:
        if self._servers is not None:
            self._servers.watch()
            return
        order = self._registry.ordered()
        if order is not None:
            self._servers = NodeServers(self._job, order, say=self._say)

    def _end(self) -> None:
        if self._evaluation is not None and self._evaluation.poll() is None:
            self._evaluation.terminate()
            try:
                self._evaluation.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._evaluation.kill()
                self._evaluation.wait()
        if self._servers is not None:
            self._servers.stop()

    def _say(self, text: str) -> None:
        print(f"[{self._job.name}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
