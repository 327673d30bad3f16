"""The server's side of a weight update: receives buckets, verifies them, loads them, and checks that none is missing.

Each vLLM worker has one instance. Every worker receives every full tensor under its Hugging Face name; vLLM's own
loaders fuse and slice the tensors. Only vLLM imports this module (see ``vllm_plugin``).

vLLM loads layer by layer: it keeps a layer's tensors until it has all of them and then copies them. This has two
consequences. A tensor that vLLM keeps must be copied out of a buffer that the sender will overwrite. And an update that
failed, or whose trainer was killed, leaves tensors in incomplete layers, which must not be mixed with those of the next
update. The engine refuses further updates of the same connection. A new connection begins with an update that first
drops these tensors (``_drop_unfinished``).

A server started with --quantization receives the same BF16 tensors. An update restores each layer's unquantised
parameters, and vLLM quantises a layer again when it has all of its tensors, into the same memory as before
(model_loader/reload/layerwise.py, _layerwise_process).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.utils.nccl import unpinned_nccl_env

from megatron_chord.rollout.buckets import TensorInfo, flat_size, unflatten, verify
from megatron_chord.rollout.sender_group import SenderGroup, join_sender_group
from megatron_chord.rollout.transports import BucketFiles, CudaImports
from megatron_chord.rollout.vllm_plugin import ABANDON, UPDATE_LINE
from megatron_chord.timing import Timer

logger = init_logger("vllm.megatron_chord")  # the server's log shows only loggers below "vllm"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine. The transport determines which fields are used."""

    transport: str
    timeout_s: float
    folder: str | None = None
    """file: the run's private folder; a bucket outside of it is refused."""
    endpoints: list[list] = field(default_factory=list)
    """broadcast, gloo: host and port of each sender's store."""
    num_workers: int = 1
    """Number of workers of all servers together."""
    first_worker: int = 0
    """Index of this server's first worker among them."""
    quantization: str | None = None
    """The --quantization that the trainer expects of this server."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights: one bucket."""

    tensors: list[dict]
    source: int = 0
    """broadcast, gloo, ipc: index of the sender."""
    slot: int = 0
    """ipc: index of the buffer among the sender's buffers."""
    path: str | None = None
    """file: path of the buffer with the bucket."""
    buffer: int = 0
    """file: index of that buffer among the buffers of all senders."""
    handles: list[dict] | None = None
    """ipc: one export of the sender's buffer for each worker."""


class WeightEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, config, vllm_config, device, model) -> None:
        super().__init__(config, vllm_config, device, model)
        self._aliases = _aliases(model)
        self._init: InitInfo | None = None
        self._groups: list[SenderGroup] = []
        self._files: BucketFiles | None = None
        self._imports = CudaImports()
        self._expected: list[str] = []
        self._received: set[str] = set()
        self._loaded: set[str] = set()
        self._failed: str | None = None
        self._is_unfinished = False
        """True if an update of an earlier connection has left incomplete layers."""
        self._timer = Timer()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        if init_info.transport not in ("file", "gloo", "broadcast", "ipc"):
            raise ValueError(f"unknown weight transport {init_info.transport!r}")
        serves = self.model_config.quantization
        if serves != init_info.quantization:
            raise ValueError(
                f"this server was started with --quantization {serves}, but the trainer's precision expects "
                f"{init_info.quantization}"
            )
        self.shutdown()
        self._is_unfinished |= self._failed is not None
        self._failed = None
        self._init = init_info
        if init_info.transport == "file":
            if init_info.folder is None:
                raise ValueError("the initialisation names no folder for files")
            self._files = BucketFiles(Path(init_info.folder))
        # With VLLM_BATCH_INVARIANT vLLM sets NCCL's variables for the groups of its own workers. The trainer's ranks do
        # not have these values, and NCCL waits for ever if members of a group differ in them. They are read when NCCL
        # connects, which join_sender_group awaits.
        with unpinned_nccl_env():
            self._groups = [
                join_sender_group(
                    host,
                    port,
                    rank=1 + self._worker,
                    members=["the trainer", *(f"worker {index}" for index in range(init_info.num_workers))],
                    device=self._meeting_place,
                    timeout_s=init_info.timeout_s,
                )
                for host, port in init_info.endpoints
            ]

    def start_weight_update(self) -> None:
        if self._init is None:
            raise RuntimeError("no trainer has initialised the weight transfer")
        if self._failed:
            raise RuntimeError(
                f"an earlier weight update of this connection failed ({self._failed}); initialise the weight transfer "
                "again"
            )
        self._failed = "it was never finished"
        self._received, self._loaded = set(), set()
        self._timer = Timer()
        with self._timer.phase("start"):
            if self._is_unfinished:
                _drop_unfinished(self.model, self.model_config)
                self._is_unfinished = False
            if self.device.type == "cpu":
                _forget_expert_kernels(self.model)
            initialize_layerwise_reload(self.model)
        # Read now and not at the end: by then quantised layers also have scales, which are never sent.
        self._expected = [name for name, _ in self.model.named_parameters()]

    def update_weights(self, update_info: dict) -> None:
        # vLLM's own method calls torch.accelerator.synchronize(), which raises without an accelerator.
        try:
            if update_info == ABANDON:
                raise RuntimeError("a new trainer has abandoned it")
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            self._failed = f"{type(error).__name__}: {error}"
            raise

    def receive_weights(self, update_info: UpdateInfo) -> None:
        infos = [TensorInfo.from_json(tensor) for tensor in update_info.tensors]
        with self._timer.phase("read"):
            tensors = self._receive(update_info, infos)
        with self._timer.phase("check"):
            verify(infos, tensors)
        names = [info.name for info in infos]
        repeated = sorted(self._received.intersection(names)) or sorted(
            {name for name in names if names.count(name) > 1}
        )
        if repeated:
            raise ValueError(f"sent twice in one update: {', '.join(repeated[:8])}")
        model: Any = self.model  # torch's stubs know no load_weights
        with self._timer.phase("load"):
            loaded = model.load_weights(zip(names, tensors, strict=True))
            if loaded is None:
                raise RuntimeError(f"{type(self.model).__name__} does not say which weights it loaded")
            self._load_aliases(dict(zip(names, tensors, strict=True)))
            if self._files is not None and self.device.type == "cpu":
                _copy_what_is_kept(self.model, tensors[0])
        self._received.update(names)
        self._loaded |= loaded

    def finish_weight_update(self) -> None:
        missing = self._missing()
        if missing:
            self._failed = f"{len(missing)} parameters without weights"
            raise ValueError(
                f"{len(missing)} parameters were not, or only partly, among the {len(self._received)} "
                f"tensors of this update: {', '.join(missing[:8])}"
            )
        with self._timer.phase("finish"):
            finalize_layerwise_reload(self.model, self.model_config)
        self._failed = None
        logger.info("%s%s", UPDATE_LINE, json.dumps(self._timer.seconds))

    def shutdown(self) -> None:
        for group in self._groups:
            group.close()
        self._groups, self._files, self._imports = [], None, CudaImports()

    @property
    def _worker(self) -> int:
        """Index of this worker among those of all servers."""
        assert self._init is not None
        parallel = self.parallel_config
        return self._init.first_worker + parallel.data_parallel_index * parallel.world_size + parallel.rank

    @property
    def _meeting_place(self) -> torch.device:
        """The device on which a broadcast is received."""
        assert self._init is not None
        return torch.device("cpu") if self._init.transport == "gloo" else self.device

    def _receive(self, update: UpdateInfo, infos: Sequence[TensorInfo]) -> list[Tensor]:
        assert self._init is not None
        if self._init.transport == "file":
            if update.path is None or self._files is None:
                raise ValueError("the update names no file")
            buffer = self._files.find(Path(update.path), update.buffer, flat_size(infos)).to(self.device)
        elif self._init.transport == "ipc":
            if update.handles is None:
                raise ValueError("the update brings no CUDA IPC handles")
            buffer = self._imports.copy(
                (update.source, update.slot), update.handles[self._worker], flat_size(infos), self.device
            )
        else:
            buffer = torch.empty(flat_size(infos), dtype=torch.uint8, device=self._meeting_place)
            self._groups[update.source].broadcast(buffer, timeout_s=self._init.timeout_s)
            buffer = buffer.to(self.device)
        return unflatten(infos, buffer)

    def _load_aliases(self, tensors: dict[str, Tensor]) -> None:
        """Load a tied lm_head, too.

        vLLM loads only the embedding. On a CPU the lm_head has its own packed copy of the weight, which would otherwise
        silently keep the old values.
        """
        for alias, name in self._aliases.items():
            if name in tensors:
                parameter: Any = self.model.get_parameter(alias)
                parameter.weight_loader(parameter, tensors[name])

    def _missing(self) -> list[str]:
        """Parameters that no tensor of this update filled, and layers that are only partly filled.

        vLLM reports a fused parameter as loaded if one of its parts was loaded. So the number of elements that the
        layer-wise loader has counted is checked, too. Embeddings are not checked in this way, because their padding is
        never loaded; each embedding is a single tensor.
        """
        missing = {
            name
            for name in self._expected
            if self._aliases.get(name, name) not in self._loaded and name not in self._loaded
        }
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            if isinstance(layer, VocabParallelEmbedding) or info.load_numel_total is None:
                continue
            total = _without_padding(layer, info.load_numel_total)
            if 0 < info.load_numel < total:
                missing.add(f"{name} ({info.load_numel} of {total} elements)")
        return sorted(missing)


def _without_padding(layer: Any, num_elements: int) -> int:
    """``num_elements`` without padding, which is never loaded: block quantisation pads experts to whole blocks."""
    moe = getattr(layer, "moe_config", None)
    if moe is None:
        return num_elements
    padded = moe.hidden_dim * moe.intermediate_size_per_partition
    loaded = moe.hidden_dim_unpadded * moe.intermediate_size_per_partition_unpadded
    return num_elements * loaded // padded


def _aliases(model: torch.nn.Module) -> dict[str, str]:
    """Map the second name of each parameter that two modules share (a tied lm_head) to its first name.

    After loading, each of the two modules has its own parameter. A module that is itself registered twice (a router, a
    shared expert) is not listed.
    """
    first: dict[int, str] = {}
    names = [
        (parameter, f"{path}.{name}" if path else name)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    return {
        name: first[id(parameter)]
        for parameter, name in names
        if first.setdefault(id(parameter), name) != name
    }


def _copy_what_is_kept(model: torch.nn.Module, buffer: Tensor) -> None:
    """Copy the tensors that vLLM keeps for incomplete layers out of the sender's buffer."""
    begin = buffer.untyped_storage().data_ptr()

    def own(value: Tensor) -> Tensor:
        is_borrowed = not value.is_meta and value.untyped_storage().data_ptr() == begin
        return value.clone() if is_borrowed else value

    for layer in model.modules():
        for _, call in get_layerwise_info(layer).loaded_weights:
            call.arguments = tree_map_only(Tensor, own, call.arguments)


def _drop_unfinished(model: torch.nn.Module, model_config: Any) -> None:
    """Drop what an unfinished update has left in incomplete layers, and restore the tensors with which they compute.

    vLLM's ``finalize_layerwise_reload`` puts the former tensors of a layer back if the layer has received nothing.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0
    finalize_layerwise_reload(model, model_config)


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Remove vLLM's CPU kernel of the experts, so that vLLM 0.32 builds it again and packs the pushed weights for it.

    If a kernel exists, vLLM copies the unpacked weights over the packed ones
    (fused_moe/unquantized_fused_moe_method.py:187), and the server samples from wrong weights without an error. On a
    CPU no CUDA graph refers to the kernel, so it can be built again.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
