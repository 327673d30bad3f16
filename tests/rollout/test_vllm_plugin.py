"""vLLM's API server forks its engine only if that is safe, and the engine does not share the server's signals. It
inspects a model without another interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_chord.rollout.vllm_plugin import DIE_WITH_PARENT

THREAD = """
import ctypes, threading, time
from megatron_chord.rollout.vllm_plugin import _can_fork

def wait() -> None:
    ctypes.CDLL(None).prctl(15, NAME)  # PR_SET_NAME
    named.set()
    time.sleep(60)

named = threading.Event()
if NAME:
    threading.Thread(target=wait, daemon=True).start()
    named.wait()
print(_can_fork(0.05))
"""
FORK = """
import ctypes, os, signal, socket
from megatron_chord.rollout import vllm_plugin

ours, theirs = socket.socketpair()
theirs.setblocking(False)
signal.set_wakeup_fd(theirs.fileno())
os.environ[vllm_plugin.DIE_WITH_PARENT] = str(os.getpid())
os.register_at_fork(after_in_child=vllm_plugin._begin_forked)
if os.fork() == 0:
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    is_own = os.environ[vllm_plugin.DIE_WITH_PARENT] == str(os.getpid())
    print(number.value == signal.SIGKILL, signal.set_wakeup_fd(-1), is_own, flush=True)
    os._exit(0)
os.wait()
"""

INSPECT = """
import sys
from megatron_chord.rollout import vllm_plugin

vllm_plugin.register()
from vllm.model_executor.models.registry import ModelRegistry

programs = []
sys.addaudithook(lambda event, arguments: programs.append(arguments[0]) if event == "subprocess.Popen" else None)
print(ModelRegistry.models["Qwen2ForCausalLM"].inspect_model_cls().is_text_generation_model, programs)
"""


def printed(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(("name", "can"), [(b"", "True"), (b"ZMQbg/IO/0", "True"), (b"python", "False")])
def test_a_process_with_threads_of_its_own_is_not_forked(name: bytes, can: str) -> None:
    assert printed(f"NAME = {name!r}\n{THREAD}") == can


def test_a_forked_process_dies_with_its_parent_and_keeps_its_signals() -> None:
    assert printed(FORK) == "True -1 True"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, vLLM inspects models in another process")
def test_a_model_is_inspected_without_another_interpreter(tmp_path: Path) -> None:
    environment = {DIE_WITH_PARENT: str(os.getpid()), "VLLM_CACHE_ROOT": str(tmp_path)}
    assert printed(INSPECT, **environment) == "True []"
