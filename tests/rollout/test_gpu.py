"""Weights reach a server on GPUs through every transport, and rollouts are computed in FP8.

The transports are IPC within one GPU and between two of a node, gloo through main memory, and NCCL between two GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from megatron_chord.families.table import read_shape
from megatron_chord.precision import Precision, preset
from megatron_chord.rollout.buckets import describe
from megatron_chord.rollout.checksum import fingerprint
from megatron_chord.rollout.sender_group import SenderGroup
from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server
from megatron_chord.rollout.sync import SyncSettings, TransportName, WeightSync
from megatron_chord.rollout.transports import CudaImports, IpcTransport
from megatron_chord.weights.reader import HFReader
from megatron_chord.weights.sums import part_sum
from tests.rollout.helpers import (
    START_S,
    VOCAB,
    assert_routes,
    client_of,
    largest_gap,
    make_model,
    mean_gap,
    requests,
    weights_of,
)
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
"""For tests that start a server. The other tests need only a GPU."""
TOLERANCE = 2e-2  # kernels differ, and vLLM may use TF32; other weights differ by more than 1


PLACES: dict[str, tuple[TransportName, str | None]] = {
    "ipc": ("ipc", None),
    "ipc from another GPU": ("ipc", "1,0"),
    "gloo": ("gloo", None),
    "relay": ("relay", None),
    "broadcast": ("broadcast", "1"),
}
"""The transport, and the server's CUDA_VISIBLE_DEVICES. The weights are on GPU 0."""
SHARED = ("ipc", "relay")
"""Transports to servers on the trainer's GPU, which sleep between pushes."""


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> tuple[TransportName, str | None]:
    transport, visible = PLACES[request.param]
    if visible is not None and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return transport, visible


@pytest.fixture
def transport(place: tuple[TransportName, str | None]) -> TransportName:
    return place[0]


@pytest.fixture(scope="module")
def server(
    place: tuple[TransportName, str | None], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RolloutServer]:
    settings = ServerSettings(
        dtype="fp32",
        max_model_len=512,
        gpu_memory_utilization=0.2,
        sleep_mode=place[0] in SHARED,
        visible_devices=place[1],
    )
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    with start_server(model_folder, settings, log=log) as server:
        server.wait_until_ready(2 * START_S)
        yield server


def test_fingerprints_and_sums_are_the_same_on_a_gpu() -> None:
    for tensor in (
        torch.randn(700, 1001),
        torch.randn(3, 5).bfloat16(),
        torch.randn(0, 4),
        torch.randn(7).half(),
    ):
        assert fingerprint("a", tensor.cuda()) == fingerprint("a", tensor)
        assert part_sum(tensor.cuda(), row=3, column=5).item() == part_sum(tensor, row=3, column=5).item()


@needs_vllm
def test_weights_arrive(server: RolloutServer, transport: TransportName) -> None:
    device = torch.device("cuda", 0)
    client = client_of(server)
    sync = WeightSync(
        [client],
        SyncSettings(transport=transport, timeout_s=120, bucket_bytes=60_000),
        exporters=[0],
        group=None,
        device=device,
    )
    for version in (0, 1, 2):
        model = make_model(version)
        if transport in SHARED and version:
            client.sleep(level=2)
            client.wake_up(tags=["weights"])
        sync.push([(name, tensor.to(device)) for name, tensor in weights_of(model)], version)
        if transport in SHARED and version:
            client.wake_up(tags=["kv_cache"])
        asked = requests()
        assert largest_gap(model, asked, client.generate(asked, version=version, deadline_s=60)) < TOLERANCE
    sync.close()


def test_a_staging_buffer_is_exported_once_to_each_worker() -> None:
    """Buckets of 4, 4, 2, 4, 9 and 4 MiB use two buffers in turn. A buffer is exported again only after it has
    grown."""
    transport = IpcTransport(0, 2, torch.device("cuda", 0))
    fields = []
    for mib in (4, 4, 2, 4, 9, 4):
        bucket = [("weight", torch.ones(mib << 18, device="cuda"))]
        fields.append(transport.publish(bucket, describe(bucket)).fields)
    handles = [field["handles"] for field in fields]
    assert [len(field) for field in handles] == [2] * 6
    assert (
        len({field["slot"] for field in fields[::2]}) == len({field["slot"] for field in fields[1::2]}) == 1
    )
    assert handles[2] is handles[0]
    assert handles[5] is handles[3] is handles[1]
    assert handles[4][0] != handles[0][0]


def read_another_process(handles: list[dict]) -> list[int]:
    """Return what a process that did not start this buffer's owner reads of it."""
    device = torch.device("cuda", 0)
    return [int(CudaImports().copy((0, 0), handle, 4, device).sum()) for handle in handles]


def test_staging_memory_is_opened_by_another_process_with_expandable_segments() -> None:
    before = torch._C._accelerator_getAllocatorSettings()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    try:
        torch.empty(1 << 26, device="cuda")  # the allocator has a free expandable block
        parcel = IpcTransport(0, 1, torch.device("cuda", 0)).make_room(1 << 22)
        parcel.memory.fill_(3)
        torch.cuda.synchronize()
        assert run_ranks(read_another_process, 1, parcel.fields["handles"]) == [[12]]
    finally:
        torch._C._accelerator_setAllocatorSettings(before)


def read_from_the_other_gpu(handle: dict) -> tuple[int, int]:
    """What GPU 1 reads of a buffer on GPU 0, and by how many bytes the used memory of GPU 0 has grown."""
    device = torch.device("cuda", 1)
    torch.cuda.set_device(device)
    torch.ones(1, device=device)
    before = torch.cuda.device_memory_used(0)  # asks the driver (NVML) and creates no context
    imports = CudaImports()
    content = imports.copy((0, 0), handle, 4, device)
    return int(content.sum()), torch.cuda.device_memory_used(0) - before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_worker_on_another_gpu_needs_no_context_on_the_senders() -> None:
    """A context has 300 MB and more."""
    if not torch.cuda.can_device_access_peer(1, 0):
        pytest.skip("needs two GPUs that can access each other")
    parcel = IpcTransport(0, 1, torch.device("cuda", 0)).make_room(1 << 22)
    parcel.memory.fill_(3)
    torch.cuda.synchronize(0)
    ((content, grown),) = run_ranks(read_from_the_other_gpu, 1, parcel.fields["handles"][0])
    assert content == 12
    assert grown < 100e6


def connect_alone(timeout_s: float) -> tuple[str, float, float]:
    """Connect one of two members over NCCL. Return the error, its seconds, and a sum that the GPU computes after it."""
    device, store = torch.device("cuda", 0), dist.HashStore()
    torch.cuda.set_device(device)
    group = SenderGroup(dist.ProcessGroupNCCL(store, 0, 2, dist.ProcessGroupNCCL.Options()), store)
    begun, failure = time.monotonic(), ""
    try:
        group.connect(device, timeout_s=timeout_s)
    except TimeoutError as error:
        failure = str(error)
    seconds = time.monotonic() - begun
    group.close()
    return failure, seconds, float(torch.ones(4, device=device).sum())


def test_a_peer_that_never_connects_does_not_hold_this_process() -> None:
    """NCCL waits for it inside of the first collective, without a deadline."""
    ((failure, seconds, total),) = run_ranks(connect_alone, 1, 5.0, timeout_s=120)
    assert failure == "the process group for weights did not connect within 5 s"
    assert seconds < 15
    assert total == 4


@needs_vllm
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs capability 9.0"
)
@pytest.mark.parametrize("precision", ["fp8_rollout", "fp8_tensorwise"])
def test_weights_are_quantised_as_they_arrive(precision: Precision, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "vocab": VOCAB,
    }
    folders = [save_model("qwen2", tmp_path / str(seed), seed=seed, **sizes) for seed in (0, 1)]
    rollouts = preset(precision).rollouts
    assert rollouts is not None
    settings = ServerSettings(dtype="bf16", max_model_len=512, gpu_memory_utilization=0.2, fp8=rollouts)
    device = torch.device("cuda", 0)
    with start_server(folders[0], settings, log=tmp_path / "vllm.log") as server:
        server.wait_until_ready(2 * START_S)
        client = client_of(server)
        sync = WeightSync(
            [client],
            SyncSettings(transport="ipc", timeout_s=120, quantization=rollouts.quantization),
            exporters=[0],
            group=None,
            device=device,
        )
        gaps = {}
        for version, sent in enumerate((1, 0, 1)):
            reader = HFReader.of(folders[sent])
            tensors = ((name, reader.read(name).bfloat16().to(device)) for name in reader.names)
            sync.push(list(tensors), version)
            models = [Qwen2ForCausalLM.from_pretrained(folder).eval() for folder in folders]
            asked = requests()
            replies = client.generate(asked, version=version, deadline_s=120)
            gaps[version] = [mean_gap(model, asked, replies) for model in models]
            assert gaps[version][sent] < 0.1, "of the weights that were sent, but for FP8"
            assert gaps[version][1 - sent] > 5 * gaps[version][sent]
        sync.close()


@needs_vllm
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_routes_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """vLLM's Model Runner V2 returns them, so nothing of vLLM is adapted here."""
    folder = save_model(family, tmp_path / "policy", vocab=VOCAB)
    shape = read_shape(folder).routes
    assert shape is not None
    settings = ServerSettings(dtype="fp32", max_model_len=512, gpu_memory_utilization=0.2, routes=True)
    with start_server(folder, settings, log=tmp_path / "vllm.log") as server:
        server.wait_until_ready(2 * START_S)
        client = client_of(server)
        reader = HFReader.of(folder)
        sync = WeightSync(
            [client],
            SyncSettings(transport="ipc", timeout_s=120),
            exporters=[0],
            group=None,
            device=torch.device("cuda", 0),
        )
        sync.push([(name, reader.read(name).cuda()) for name in reader.names], 1)
        asked = [replace(request, routes=replace(shape, is_required=True)) for request in requests()]
        replies = client.generate(asked, version=1, deadline_s=120)
        sync.close()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_routes(model, shape, asked, replies, least=0.9)  # vLLM may use TF32
