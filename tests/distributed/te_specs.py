"""What ``test_te_specs`` runs in a process of its own: models of both layer specs, which are built but not computed
with."""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chord.config import ModelConfig, ParallelConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.model import build, fp8, specs
from megatron_chord.precision import Fp8Training, Precision, preset
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.checkpoint import without_extra_state
from tests.support import te_without_kernels


def models(folders: dict[str, Path], parallel: dict[str, Any], precision: Precision | None) -> dict[str, Any]:
    """Describe each family's model with the specs "te" and "local": what a checkpoint holds and where a push reads
    it."""
    fp8.set_environment(precision)
    te_without_kernels.load()
    axes = ParallelConfig(**parallel)
    runtime.start(axes, seed=0)
    return {
        name: {spec: _described(folder, axes, precision, spec) for spec in ("te", "local")}
        for name, folder in folders.items()
    }


@dataclass
class Canary:
    """An object that creates a file when it is unpickled."""

    path: Path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def load_canaries(folders: dict[str, Path], canary: Path) -> dict[str, tuple[int, bool, bool]]:
    """Load models whose extra states are pickles. Each pickle creates the file ``canary``. Each module (and expert) has
    one.

    Returns, for each family: the number of extra states, whether the file exists after the trainer's own load, and
    whether it exists after the same load without ``without_extra_state``.
    """
    fp8.set_environment("fp8_e2e")
    te_without_kernels.load()
    axes = ParallelConfig()
    runtime.start(axes, seed=0)
    results = {}
    for family, folder in folders.items():
        chunk = _built(folder, axes, preset("fp8_e2e").training, is_engine=True)[0]
        evil = torch.frombuffer(bytearray(pickle.dumps(Canary(canary))), dtype=torch.uint8)
        extra = {name: evil for name in chunk.state_dict() if name.endswith("_extra_state")}
        for path, module in chunk.named_modules():
            # A checkpoint has one extra state for each expert of a grouped layer.
            if f"{path}._extra_state" in extra:
                for index in range(1, getattr(module, "num_gemms", 1)):
                    extra[f"{path}._extra_state{index}"] = evil
        weights = chunk.state_dict() | extra
        chunk.load_state_dict(without_extra_state(weights), strict=True)
        after_ours = canary.exists()
        with contextlib.suppress(Exception):
            chunk.load_state_dict(weights, strict=True)
        results[family] = len(extra), after_ours, canary.exists()
        canary.unlink(missing_ok=True)
    return results


def _built(
    folder: Path, parallel: ParallelConfig, training: Fp8Training | None, *, is_engine: bool
) -> tuple[Any, Any, ModelShape]:
    """Return the model's only chunk with one of the two specs, Megatron's configuration, and the shape."""
    shape = read_shape(folder)
    original = specs.has_transformer_engine
    for module in (build, specs):
        module.has_transformer_engine = lambda: is_engine
    try:
        config = build.transformer_config(
            shape, ModelConfig(path=folder, dtype="bf16"), parallel, training if is_engine else None
        )
        with te_without_kernels.as_if_on_hopper() if is_engine else contextlib.nullcontext():
            (chunk,) = build.build_chunks(config, shape)
    finally:
        for module in (build, specs):
            module.has_transformer_engine = original
    return chunk, config, shape


def _described(
    folder: Path, parallel: ParallelConfig, precision: Precision | None, spec: str
) -> dict[str, Any]:
    chunk, config, shape = _built(folder, parallel, preset(precision).training, is_engine=spec == "te")
    rules = {name: shape.weights.entry(name) for name in build.global_weights([chunk])}
    weights = build.global_weights([chunk])
    saved = chunk.sharded_state_dict(metadata={}).values()
    return {
        "modules": {name: type(module).__name__ for name, module in chunk.named_modules()},
        "weights": {rule.hf: tuple(weights[name].shape) for name, rule in rules.items()},
        "cut": {
            rule.hf for name, rule in rules.items() if getattr(weights[name], "tensor_model_parallel", False)
        },
        "saved": {part.key for part in saved if not part.key.endswith("_extra_state")},
        "state": {part.key for part in saved if part.key.endswith("_extra_state")},
        "recipe": _recipe(config),
    }


def _recipe(config: Any) -> tuple[str, str, bool] | None:
    """Return the recipe's class, its format, and whether it rounds scales to powers of 2."""
    if config.fp8 is None:
        return None
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe: Any = get_fp8_recipe(config)
    return type(recipe).__name__, recipe.fp8_format.name, recipe.fp8_quant_fwd_inp.power_2_scale
