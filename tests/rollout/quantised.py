"""What ``test_quantised`` runs in a process of its own: the worker engine updates layers that vLLM quantises.

Everything is vLLM's own except the matrix kernel. vLLM has no kernel for blocks of FP8 on this kind of CPU.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_chord.precision import PRESETS
from megatron_chord.rollout.buckets import describe
from megatron_chord.rollout.transports import FileTransport


def push(folder: Path) -> dict[str, Any]:
    """Load layers as at a server's start, then update them twice. Also record the errors of updates that are
    incomplete."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.quantization import resolve_quantization_config
    from vllm.distributed.parallel_state import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear
    from vllm.model_executor.layers.quantization.online import fp8
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_processing,
        record_metadata_for_reloading,
    )

    from megatron_chord.rollout.vllm_engine import InitInfo, UpdateInfo, WeightEngine

    class Model(torch.nn.Module):
        def __init__(self, quantization: OnlineQuantizationConfig) -> None:
            super().__init__()
            # 200 is not a multiple of 128, so the blocks at the edge are smaller
            self.gate_up = MergedColumnParallelLinear(
                200, [256, 256], bias=False, quant_config=quantization, prefix="gate_up", disable_tp=True
            )
            self.norm = torch.nn.LayerNorm(200, bias=False, dtype=torch.bfloat16)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            parameters, loaded = dict(self.named_parameters()), set()
            for name, tensor in weights:
                if name.startswith("norm"):
                    target, arguments = name, ()
                else:
                    target, arguments = "gate_up.weight", (["gate", "up"].index(name.split(".")[0]),)
                parameter: Any = parameters[target]
                loader = getattr(parameter, "weight_loader", lambda p, t: p.data.copy_(t))
                loader(parameter, tensor, *arguments)
                loaded.add(target)
            return loaded

    fp8.init_fp8_linear_kernel = lambda **_: types.SimpleNamespace(
        process_weights_after_loading=lambda layer: None
    )
    config = VllmConfig()
    told: Any = types.SimpleNamespace(dtype=torch.bfloat16, quantization="fp8_per_block", is_moe=False)
    config.model_config = told
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        arguments = resolve_quantization_config("fp8_per_block", None)
        assert arguments is not None
        torch.set_default_dtype(torch.bfloat16)
        model = Model(OnlineQuantizationConfig(arguments))
        record_metadata_for_reloading(model)
        model.load_weights(weights_of(0).items())
        finalize_layerwise_processing(model, told)

        engine = WeightEngine(None, config, torch.device("cpu"), model)  # type: ignore[arg-type]
        results: dict[str, Any] = {"start": held(model), "unknown": unknown_names()}
        try:
            engine.init_transfer_engine(InitInfo(transport="file", timeout_s=5, folder=str(folder)))
        except ValueError as error:
            results["other quantization"] = str(error)
        engine.init_transfer_engine(
            InitInfo(transport="file", timeout_s=5, folder=str(folder), quantization="fp8_per_block")
        )
        memory = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

        def update(weights: dict[str, Tensor]) -> None:
            engine.start_weight_update()
            transport = FileTransport(folder, 0)
            for bucket in ([item] for item in weights.items()):
                infos = describe(bucket)
                parcel = transport.publish(bucket, infos)
                described: Any = {"tensors": [info.to_json() for info in infos], **parcel.fields}
                engine.receive_weights(UpdateInfo(**described))
                parcel.release()
            engine.finish_weight_update()

        for version in (1, 2):
            update(weights_of(version))
            results[f"version {version}"] = held(model)
        results["same memory"] = memory == {name: p.data_ptr() for name, p in model.named_parameters()}
        incomplete = weights_of(3)
        del incomplete["up.weight"]
        try:
            update(incomplete)
        except ValueError as error:
            results["incomplete"] = str(error)
    return results


def unknown_names() -> list[str]:
    """Return the names that a precision sets in vLLM and that this vLLM does not know."""
    from vllm import envs
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES

    rollouts = [settings.rollouts for settings in PRESETS.values() if settings.rollouts is not None]
    known = {*ONLINE_QUANT_SHORTHAND_NAMES, *envs.environment_variables}
    return [name for each in rollouts for name in (each.quantization, *each.environment) if name not in known]


def weights_of(version: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(version)
    # `up` is sent in the buffer that held `gate`, while vLLM still waits for the rest of their layer.
    sizes = {"gate.weight": (256, 200), "norm.weight": (200,), "up.weight": (256, 200)}
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float32).bfloat16()
        for name, size in sizes.items()
    }


def held(model: torch.nn.Module) -> dict[str, tuple[str, np.ndarray]]:
    """Return the dtype and a copy of the values of each parameter."""
    return {
        name: (str(parameter.dtype), parameter.data.float().numpy().copy())
        for name, parameter in model.named_parameters()
    }
