"""What ``test_te_specs`` runs in a process of its own: models of both layer specs, made but not computed with."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from megatron_chord.config import ModelConfig, ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.model import build, fp8, specs
from megatron_chord.precision import Precision, preset
from megatron_chord.runtime import parallel as runtime
from tests.support import te_without_kernels


def models(folders: dict[str, Path], parallel: dict[str, Any], precision: Precision | None) -> dict[str, Any]:
    """Of each family and spec, "te" and "local": what a checkpoint would hold, and where a push reads it."""
    fp8.set_environment(precision)
    te_without_kernels.load()
    axes = ParallelConfig(**parallel)
    runtime.start(axes, seed=0)
    return {
        name: {spec: _described(folder, axes, precision, spec) for spec in ("te", "local")}
        for name, folder in folders.items()
    }


def _described(
    folder: Path, parallel: ParallelConfig, precision: Precision | None, spec: str
) -> dict[str, Any]:
    shape = read_shape(folder)
    is_engine, training = spec == "te", preset(precision).training
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
    """Class, format and whether scales are rounded to powers of 2."""
    if config.fp8 is None:
        return None
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe: Any = get_fp8_recipe(config)
    return type(recipe).__name__, recipe.fp8_format.name, recipe.fp8_quant_fwd_inp.power_2_scale
