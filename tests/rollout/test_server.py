"""A server that does not start says why, and no server outlives the process that started it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from megatron_chord.network import interface_of
from megatron_chord.rollout.server import (
    ServerError,
    ServerSettings,
    _environment,
    _session_processes,
    start_server,
)
from tests.rollout.helpers import START_S, make_model
from tests.support.listening import addresses

SETTINGS = ServerSettings(dtype="fp32", max_model_len=64, kv_cache_bytes=64 << 20, gpu_memory_utilization=0.1)
TRAINER = textwrap.dedent(
    """
    import json, sys, time
    from pathlib import Path
    from megatron_chord.rollout.server import ServerSettings, start_server

    model, log, ready = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "ready"
    settings = ServerSettings(
        dtype="fp32", max_model_len=64, kv_cache_bytes=64 << 20, gpu_memory_utilization=0.1, cpu_threads=2
    )
    server = start_server(model, settings, log=log, host=sys.argv[4])
    print(json.dumps({"pid": server.pid, "url": server.url}), flush=True)
    if ready:
        server.wait_until_ready(300)
        print("ready", flush=True)
    time.sleep(600)
    """
)


def start_trainer(
    model: Path, log: Path, wait_for: str, *, host: str = "127.0.0.1"
) -> tuple[subprocess.Popen[str], dict]:
    """Start a process that starts a server. Return when the server's process has started. With ``wait_for`` "ready"
    the trainer writes another line when the server answers."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(model), str(log), wait_for, host],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert trainer.stdout is not None
    return trainer, json.loads(trainer.stdout.readline())


def wait_until_gone(session: int, deadline_s: float) -> list[int]:
    end = time.monotonic() + deadline_s
    while (left := _session_processes(session)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def kill_session(session: int) -> None:
    for pid in _session_processes(session):
        os.kill(pid, signal.SIGKILL)


def check_engine_was_forked(session: int, log: str) -> None:
    """A forked engine has the environment with which its API server was started. A new interpreter would have two
    OpenMP threads in it, and would import for half a minute what the API server has already imported."""
    for pid in _session_processes(session):
        environment = b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
        assert b"\0OMP_NUM_THREADS=1\0" in environment, pid
        assert b"\0OMP_WAIT_POLICY=PASSIVE\0" in environment, pid
    assert "OMP_NUM_THREADS=2 is set; leaving Torch threads at 2" in log


def test_nobody_takes_a_port_and_no_server_survives_a_killed_trainer(
    model_folder: Path, tmp_path: Path
) -> None:
    host = "127.0.0.1" if interface_of("::1") is None else "::1"
    family = socket.AF_INET if host == "127.0.0.1" else socket.AF_INET6
    trainer, server = start_trainer(model_folder, tmp_path / "log", "ready", host=host)
    try:
        assert urlsplit(server["url"]).hostname == host
        place = urlsplit(server["url"]).hostname, urlsplit(server["url"]).port
        with pytest.raises(OSError, match="Address already in use"):
            # This is long before vLLM is imported. `create_server` sets SO_REUSEADDR, as most servers do.
            socket.create_server(place, family=family)
        with socket.socket(family) as client:
            assert client.connect_ex(place) == errno.ECONNREFUSED
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n", (tmp_path / "log").read_text()
        assert len(_session_processes(server["pid"])) >= 2
        if not torch.cuda.is_available():
            check_engine_was_forked(server["pid"], (tmp_path / "log").read_text())
        assert httpx.get(server["url"] + "/pause").status_code == 401
        assert addresses(_session_processes(server["pid"])) - {"127.0.0.1"} <= {host}, "gloo is on loopback"
        trainer.kill()
        trainer.wait()
        assert wait_until_gone(server["pid"], deadline_s=60) == []
    finally:
        trainer.kill()
        trainer.wait()
        kill_session(server["pid"])


def test_no_server_survives_a_trainer_killed_while_it_starts(model_folder: Path, tmp_path: Path) -> None:
    trainer, server = start_trainer(model_folder, tmp_path / "log", "started")
    try:
        trainer.kill()
        trainer.wait()
        # Python imports vLLM for some seconds before any code of this project runs.
        assert wait_until_gone(server["pid"], deadline_s=240) == []
    finally:
        kill_session(server["pid"])


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no readable config\.json in the model folder .*nowhere"):
        start_server(tmp_path / "nowhere", SETTINGS, log=tmp_path / "log")


def test_a_server_that_exits_while_starting_shows_its_log(model_folder: Path, tmp_path: Path) -> None:
    too_long = replace(SETTINGS, max_model_len=10**7)  # more than the model's number of positions
    log = tmp_path / "vllm.log"
    with start_server(model_folder, too_long, log=log) as server:
        assert not server.alive()
        with pytest.raises(ServerError, match="exited with code 1 while starting") as caught:
            server.wait_until_ready(START_S)
        assert str(log) in str(caught.value)
        assert "max_model_len" in str(caught.value)
        assert not server.alive()
    assert "command is deprecated" not in log.read_text()
    assert _session_processes(server.pid) == []


def test_a_server_that_takes_too_long(model_folder: Path, tmp_path: Path) -> None:
    server = start_server(model_folder, SETTINGS, log=tmp_path / "log")
    with pytest.raises(ServerError, match="was not ready after 0 s"):
        server.wait_until_ready(0.3)
    server.stop()
    assert _session_processes(server.pid) == []
    server.stop()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU build")
def test_heads_that_the_cpu_build_cannot_run_are_refused(tmp_path: Path) -> None:
    model = make_model(seed=0)
    model.config.num_attention_heads = 4
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="have 16 channels"):
        start_server(tmp_path, SETTINGS, log=tmp_path / "log")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU build")
@pytest.mark.parametrize("stated", [{}, {"rope_scaling": {"type": "linear", "factor": 2.0}}])
def test_latent_attention_that_the_cpu_build_computes_wrongly_is_refused(
    tmp_path: Path, stated: dict[str, Any]
) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 2, "kv_lora_rank": 512} | stated
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = "linear" if stated else "default"
    with pytest.raises(ValueError, match=f"latent attention and RoPE of type {kind}; without a GPU vLLM"):
        start_server(tmp_path, SETTINGS, log=tmp_path / "log")


def test_only_the_main_thread_may_start_one(model_folder: Path, tmp_path: Path) -> None:
    """The kernel kills the server when the thread that started it ends."""
    caught: list[BaseException] = []

    def start() -> None:
        try:
            start_server(model_folder, SETTINGS, log=tmp_path / "log")
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_the_launcher_s_variables_do_not_reach_the_server() -> None:
    inherited = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "a",
        "TORCHELASTIC_RUN_ID": "x",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PATH": "/bin",
    }
    environment = _environment(inherited, "the key")
    assert not (inherited.keys() - {"PATH"}) & environment.keys()
    assert environment["PATH"] == "/bin"
    assert environment["VLLM_API_KEY"] == "the key"
