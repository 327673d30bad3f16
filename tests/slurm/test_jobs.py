"""Jobs on a real Slurm with several nodes survive disturbances: real Megatron-Core ranks over gloo, real vLLM servers.

Only the GPUs are not real. The nodes are daemons on one machine, each with its own address.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import httpx
import pytest

from megatron_chord.network import address_in, address_towards, held_port, interface_of
from megatron_chord.rollout.server import SERVER
from megatron_chord.runtime.heartbeat import EXIT_CODE
from tests.slurm.box import Box, address_of
from tests.slurm.jobs import EXAMPLE, Submitted, parent_of, rank_process, write_run
from tests.support.ranks import ROOT
from tests.support.task import metrics_of


def test_two_training_nodes_and_a_rollout_node(box: Box, tmp_path: Path) -> None:
    """A job loses its server, stops at the signal, goes back to the queue, resumes and finishes."""
    write_run(tmp_path, steps=400)
    job = Submitted(box, tmp_path, nodes=3, CHORD_ROLLOUT_NODES="1")
    job.wait_for(lambda: job.steps_done() >= 1)
    assert "preflight: 3 nodes, 2 ranks" in job.output
    check_security(job)

    kill_server(job, node=2)
    assert announced(job, 0)["life"] == 1
    assert announced(job, 0)["node"] == "n2"

    box.run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for(lambda: "goes back to the queue" in job.output)
    stopped_at = job.steps_done()
    assert (job.restart(0) / "outcome").read_text() == "75\n"
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == f"step-{stopped_at:06d}\n"

    # The restarted job reads the run's file again. This makes it end soon.
    write_run(tmp_path, steps=stopped_at + 2)
    assert job.wait() == ("COMPLETED", 0), job.output[-6000:]
    assert f"{stopped_at} of {stopped_at + 2} steps done" in job.output
    steps = [row for row in metrics_of(tmp_path / "out") if "loss" in row]
    assert [row["step"] for row in steps] == list(range(stopped_at + 2))
    assert all(row["logprob_gap"] < 1e-4 for row in steps), "each step was sampled by the weights it trained"
    logs = {path.name for path in (job.restart(1) / "logs").iterdir()}
    assert {"train-n0-rank0.log", "train-n1-rank1.log", "rollout-n2-server0-0.log"} <= logs
    assert (tmp_path / "out" / "policy" / "model.safetensors").is_file()
    assert job.left_behind() == []


def test_servers_beside_the_ranks_of_two_nodes(box: Box, tmp_path: Path) -> None:
    """Weights are cut over both nodes. The second node's rank gathers them and passes them on to its own server, which
    is replaced once."""
    write_run(tmp_path, steps=400, parallel={"tensor": 2})
    job = Submitted(box, tmp_path, nodes=2)
    job.wait_for(lambda: job.steps_done() >= 1)
    assert [announced(job, server)["node"] for server in (0, 1)] == nodes_of(job, 0)
    kill_server(job, node=1)
    assert announced(job, 1)["life"] == 1
    box.run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for(lambda: "goes back to the queue" in job.output)
    steps = [row for row in metrics_of(tmp_path / "out") if "loss" in row]
    assert all(row["logprob_gap"] < 1e-4 for row in steps), "each step was sampled by the weights it trained"
    box.run("scancel", job.id)
    assert job.left_behind() == []


def kill_server(job: Submitted, *, node: int) -> None:
    """Kill the only server of the node, and wait until the job has made a step with another one."""
    (server,) = job.processes(SERVER, f"--host {address_of(node)}")
    os.kill(server, signal.SIGKILL)
    job.wait_for(lambda: "rollout server is lost" in job.output)
    lost_at = job.steps_done()
    job.wait_for(lambda: job.steps_done() > lost_at)


def check_security(job: Submitted) -> None:
    """The server listens only on its node's address, and needs a key that only this user can read."""
    key_file = job.restart(0) / "key"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(job.restart(0).stat().st_mode) == 0o700
    key = key_file.read_text().strip()
    assert job.processes(key) == [], "the key stands on a command line"
    url = announced(job, 0)["url"]
    assert url.startswith(f"http://{address_of(2)}:")
    with httpx.Client(base_url=url, trust_env=False) as stranger:
        assert stranger.get("/health").status_code == 401
        assert stranger.get("/health", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    port = int(url.rpartition(":")[2])
    for elsewhere in ("127.0.0.1", address_of(0)):
        with socket.socket() as probe:
            assert probe.connect_ex((elsewhere, port)) != 0


def announced(job: Submitted, server: int, *, restart: int = 0) -> dict:
    return json.loads((job.restart(restart) / f"server-{server:03d}.json").read_text())


def test_a_lost_node(box: Box, tmp_path: Path) -> None:
    """A node stops responding. The run ends as frozen, but srun waits for the node. When Slurm notices that the node is
    lost, it requeues the job. On other nodes the job continues from its last checkpoint."""
    settings = {"mu": 1.0, "checkpoint": {"every": 20}, "watchdog": {"beat_s": 0.5, "silence_s": 15.0}}
    write_run(tmp_path, steps=4000, **settings)
    job = Submitted(box, tmp_path, nodes=2)
    latest = tmp_path / "out" / "checkpoints" / "latest"
    job.wait_for(latest.is_file)
    rank, lost = rank_process(job, 1), nodes_of(job, 0)[1]
    task = parent_of(rank)
    processes = (rank, task, parent_of(task), box.slurmd(int(lost[1:])))
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        job.wait_for(lambda: f"error: frozen: rank 1 on {lost} (process {rank})" in job.output)
        job.wait_for(lambda: "Exited with exit code 79" in job.output)
        # What Slurm does by itself after SlurmdTimeout.
        box.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
        job.wait_for(lambda: job.state() != "RUNNING")
        saved = int(latest.read_text().strip().removeprefix("step-"))
        write_run(tmp_path, steps=saved + 3, **settings)
        assert job.wait() == ("COMPLETED", 0), job.output[-6000:]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        box.run("scontrol", "update", f"nodename={lost}", "state=resume")
    assert box.job(job.id)["Restarts"] == "1"
    assert lost not in nodes_of(job, 1)
    assert f"{saved} of {saved + 3} steps done" in job.output
    assert [row["step"] for row in metrics_of(tmp_path / "out")] == list(range(saved + 3))
    assert job.left_behind() == []


def nodes_of(job: Submitted, restart: int) -> list[str]:
    """Return the job's nodes after the given restart, in rank order."""
    line = next(line for line in job.output.splitlines() if f", restart {restart}: " in line)
    return re.findall(r"(n\d+)=", line)


def test_a_preempted_job(box: Box, tmp_path: Path) -> None:
    """The job writes a checkpoint although Slurm also ends its server. Then it goes back to the queue."""
    write_run(tmp_path, steps=4000)
    job = Submitted(box, tmp_path, nodes=1, options=["--partition=spare"])
    job.wait_for(lambda: job.steps_done() >= 1)
    (node,) = nodes_of(job, 0)
    urgent = ["--partition=urgent", "--exclusive", f"--nodelist={node}", "--output=/dev/null"]
    box.run("sbatch", *urgent, "--wrap=sleep 1")
    job.wait_for(lambda: "goes back to the queue" in job.output)
    assert "which is a preemption" in job.output
    stopped_at = job.steps_done()
    assert (job.restart(0) / "outcome").read_text() == "75\n"
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == f"step-{stopped_at:06d}\n"
    job.wait_for(lambda: box.job(job.id)["Restarts"] == "1")
    box.run("scancel", job.id)
    assert job.left_behind() == []


def test_a_job_that_is_preempted_in_its_preflight(box: Box, tmp_path: Path) -> None:
    """Its nodes do not listen to SIGTERM yet."""
    write_run(tmp_path, steps=4000, mu=1.0)
    job = Submitted(box, tmp_path, nodes=2, options=["--partition=spare"])
    job.wait_for(lambda: len(job.processes("megatron_chord.cluster.preflight")) == 2)
    urgent = ["--partition=urgent", "--exclusive", f"--nodelist={nodes_of(job, 0)[0]}", "--output=/dev/null"]
    box.run("sbatch", *urgent, "--wrap=sleep 1")
    job.wait_for(lambda: "goes back to the queue" in job.output)
    assert "failed first" not in job.output
    job.wait_for(lambda: box.job(job.id)["Restarts"] == "1")
    box.run("scancel", job.id)
    assert job.left_behind() == []


def test_a_cancelled_job(box: Box, tmp_path: Path) -> None:
    """The job ends at once and does not wait for a checkpoint. Nobody could take its port before its ranks had it."""
    write_run(tmp_path, mu=1.0, steps=4000)
    with held_port(address_of(0)) as port:
        job = Submitted(box, tmp_path, nodes=1, options=["--nodelist=n0"], CHORD_PORT=str(port))
        job.wait_for(lambda: "preflight: 1 nodes" in job.output)
        with Taker(address_of(0), port) as taker:
            job.wait_for(lambda: job.steps_done() >= 1)
    assert taker.tries > 20
    assert not taker.has_it
    box.run("scancel", job.id)
    assert job.wait()[0] == "CANCELLED", job.output[-6000:]
    assert job.left_behind() == []
    assert not (tmp_path / "out" / "checkpoints" / "latest").exists()


class Taker:
    """Another program that tries to listen on a port all the time, in a thread."""

    def __init__(self, address: str, port: int) -> None:
        self._place = (address, port)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._try)
        self.tries = 0
        self.has_it = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _try(self) -> None:
        while not self._end.wait(0.02):
            self.tries += 1
            with contextlib.suppress(OSError), socket.create_server(self._place):
                self.has_it = True
                self._end.wait()


def test_a_killed_rank(box: Box, tmp_path: Path) -> None:
    """Ranks and server share one node. The job ends with the killed rank's exit code and names it, though its peer also
    fails."""
    write_run(tmp_path, steps=400)
    job = Submitted(box, tmp_path, nodes=1, CHORD_RANKS_PER_NODE="2")
    job.wait_for(lambda: job.steps_done() >= 1)
    assert job.processes(SERVER)
    os.kill(rank_process(job, 1), signal.SIGKILL)
    assert job.wait() == ("FAILED", 137), job.output[-6000:]
    assert f"failed first: rank 1 on {nodes_of(job, 0)[0]} was killed by SIGKILL" in job.output
    assert job.left_behind() == []


def test_a_rank_that_crashes_after_the_checkpoint(box: Box, tmp_path: Path) -> None:
    """It crashes when its process ends, as CUDA's or NCCL's libraries may. The stopped job still goes back to the
    queue."""
    customized = tmp_path / "customized"
    customized.mkdir()
    (customized / "sitecustomize.py").write_text(
        "import atexit, os, signal, time\n"
        "if os.environ.get('RANK') == '1' and 'CHORD_STOP_FILE' in os.environ:\n"
        "    atexit.register(lambda: (time.sleep(5), os.kill(os.getpid(), signal.SIGSEGV)))\n"
    )
    write_run(tmp_path, steps=4000, mu=1.0)
    path = os.pathsep.join([str(customized), *filter(None, [os.environ.get("PYTHONPATH")])])
    job = Submitted(box, tmp_path, nodes=2, PYTHONPATH=path)
    job.wait_for(lambda: job.steps_done() >= 1)
    box.run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for(lambda: "goes back to the queue" in job.output)
    assert "after the end of the run, rank 1 was killed by SIGSEGV" in job.output
    box.run("scancel", job.id)
    assert job.left_behind() == []


def test_a_frozen_rank(box: Box, tmp_path: Path) -> None:
    """One of two ranks freezes. The other names it. The job goes back to the queue and resumes."""
    settings = {"mu": 1.0, "checkpoint": {"every": 5}, "watchdog": {"beat_s": 0.5, "silence_s": 15.0}}
    write_run(tmp_path, steps=4000, **settings)
    job = Submitted(box, tmp_path, nodes=2)
    latest = tmp_path / "out" / "checkpoints" / "latest"
    job.wait_for(latest.is_file)
    frozen = rank_process(job, 1)
    os.kill(frozen, signal.SIGSTOP)
    job.wait_for(lambda: "a process froze; the job goes back to the queue" in job.output)
    assert f"failed first: frozen: rank 1 on {nodes_of(job, 0)[1]} (process {frozen})" in job.output
    saved = int(latest.read_text().strip().removeprefix("step-"))
    write_run(tmp_path, steps=saved + 1, **settings)
    assert job.wait() == ("COMPLETED", 0), job.output[-6000:]
    assert box.job(job.id)["Restarts"] == "1"
    assert f"{saved} of {saved + 1} steps done" in job.output
    assert job.left_behind() == []


def test_a_frozen_rank_that_is_alone(box: Box, tmp_path: Path) -> None:
    """No other rank can name the frozen rank. The node's program names it and makes it print its stacks. If it freezes
    again before there is a checkpoint, the job ends with the code for a freeze."""
    write_run(tmp_path, steps=4000, mu=1.0, watchdog={"beat_s": 0.5, "silence_s": 15.0})
    job = Submitted(box, tmp_path, nodes=1)
    for life in (0, 1):
        job.wait_for(lambda life=life: f", restart {life}: " in job.output)
        job.wait_for(lambda: job.steps_done() >= 1 and bool(job.processes("megatron_chord.cli", "train")))
        before = job.steps_done()
        job.wait_for(lambda before=before: job.steps_done() not in (0, before))
        frozen = rank_process(job, 0)
        os.kill(frozen, signal.SIGSTOP)
        named = f"rank 0 on {nodes_of(job, life)[0]} (process {frozen}) has been stopped (SIGSTOP)"
        if life == 0:
            job.wait_for(lambda: "a process froze; the job goes back to the queue" in job.output)
        else:
            assert job.wait() == ("FAILED", EXIT_CODE), job.output[-6000:]
        assert f"failed first: frozen: {named}" in job.output
    assert "a process froze again, and there was no new checkpoint in between" in job.output
    assert "(most recent call first)" in job.output, "the stacks"
    assert job.left_behind() == []


def test_settings_that_will_not_do(box: Box, tmp_path: Path) -> None:
    """The preflight refuses the settings before anything starts. Nodes get the job's variables, whatever sbatch
    exports."""
    write_run(tmp_path)
    names = "CHORD_HOME,CHORD_PYTHON,CHORD_JOBS,CHORD_RUN,CHORD_RANKS_PER_NODE"
    job = Submitted(box, tmp_path, "parallel.tensor=3", nodes=1, options=[f"--export={names}"])
    assert job.wait() == ("FAILED", 2), job.output
    assert "parallel" in job.output.partition("failed first")[2]
    assert not (tmp_path / "out").exists()
    assert job.left_behind() == []


def test_a_port_that_is_taken(box: Box, tmp_path: Path) -> None:
    write_run(tmp_path, mu=1.0)
    with socket.create_server((address_of(0), 0)) as taken:
        port = taken.getsockname()[1]
        job = Submitted(box, tmp_path, nodes=1, options=["--nodelist=n0"], CHORD_PORT=str(port))
        assert job.wait() == ("FAILED", 78), job.output
    assert f"n0: cannot listen on {address_of(0)}:{port}" in job.output


def test_a_network_of_the_user_s_choice(box: Box, tmp_path: Path) -> None:
    """Slurm has other addresses for the nodes, those of loopback. All of them are this machine."""
    try:
        own = address_towards("203.0.113.7")
    except OSError:
        pytest.skip("this machine has no network")
    write_run(tmp_path, mu=1.0, steps=1)
    network = str(interface_of(own))
    job = Submitted(box, tmp_path, nodes=2, CHORD_NETWORK=network)
    assert job.wait() == ("COMPLETED", 0), job.output
    nodes = [f"{node}={address_in(network)}" for node in nodes_of(job, 0)]
    assert f"restart 0: {' '.join(nodes)};" in job.output
    job = Submitted(box, tmp_path, nodes=1, options=["--nodelist=n1"], CHORD_NETWORK="10.99.0.0/16")
    assert job.wait() == ("FAILED", 2), job.output
    assert (
        "n1: CHORD_NETWORK: no address in the network 10.99.0.0/16; this machine has lo 127.0.0.1"
        in job.output
    )


def test_srun_starts_ranks_by_itself(box: Box, tmp_path: Path) -> None:
    """srun in an allocation starts one task for each rank, without this project's launcher."""
    write_run(tmp_path, mu=1.0, steps=2)
    train = [sys.executable, "-m", "megatron_chord.cli", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=1", *train],
        env=box.environment | {"MASTER_ADDR": address_of(0), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout
    assert len(metrics_of(tmp_path / "out")) == 2


def test_conversion(box: Box, tmp_path: Path) -> None:
    script, target = ROOT / "slurm" / "convert.sh", tmp_path / "megatron"
    arguments = ("hf-to-megatron", str(EXAMPLE / "policy"), str(target))
    job = Submitted(box, tmp_path, *arguments, nodes=1, script=script)
    assert job.wait() == ("COMPLETED", 0), job.output
    assert (target / ".metadata").is_file()
    again = Submitted(box, tmp_path, *arguments, nodes=1, script=script)
    assert again.wait() == ("FAILED", 2), "the target exists"


def test_evaluation_on_two_nodes(box: Box, tmp_path: Path) -> None:
    """The job's time is nearly over while the servers load. The job goes back to the queue. Then it evaluates with a
    server on each node."""
    script, out = ROOT / "slurm" / "evaluate.sh", tmp_path / "evaluation"
    arguments = (str(EXAMPLE / "policy"), "--suite", "arithmetic", "--output", str(out), "problems=2")
    job = Submitted(box, tmp_path, *arguments, nodes=2, script=script)
    job.wait_for(lambda: bool(list((job.restart(0) / "logs").glob("rollout-*"))))
    box.run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for(lambda: "goes back to the queue" in job.output)
    assert (job.restart(0) / "outcome").read_text() == "75\n"
    assert job.wait() == ("COMPLETED", 0), job.output
    results = json.loads((out / "results.json").read_text())
    assert results["benchmarks"]["heldout"]["answers"] == 8
    assert "starting 1 vLLM server on each of 2 nodes" in job.output
    for index, node in enumerate(nodes_of(job, 1)):
        server = announced(job, index, restart=1)
        assert server["node"] == node
        assert server["url"].startswith(f"http://{address_of(int(node[1:]))}:")
        assert f"[{node}] rollout server {index} on {node} is ready" in job.output
    assert job.left_behind() == []


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
@pytest.mark.parametrize(
    "gpus",
    [(), ("--gres=gpu:h100:8",), ("--gpus-per-node=8",), ("--gres=none", "--gpus-per-node=h100:8")],
    ids=["as it is", "gres with a type", "gpus-per-node", "gpus-per-node with a type"],
)
def test_slurm_accepts_every_script(box: Box, script: Path, gpus: tuple[str, ...]) -> None:
    """Slurm also accepts the scripts where a site wants another form of the request for GPUs (docs/cluster.md)."""
    done = box.run("sbatch", "--test-only", *gpus, str(script), check=False)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr
