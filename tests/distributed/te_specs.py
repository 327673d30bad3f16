"""What ``test_te_specs`` runs in a process of its own: models of both layer specs, which are built but not computed
with."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
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
from megatron_chord.train import checkpoint, sharded
from megatron_chord.train.optimizer_shares import Shares
from megatron_chord.weights import torch_dist
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


def load_checkpoints(folders: dict[str, Path], scratch: Path) -> dict[str, dict[str, Any]]:
    """Load checkpoints into models with Transformer Engine's layers, as a run does.

    One checkpoint was written with the local layers. In the other each extra state (each module and expert has one) is
    a pickle that creates a file.

    Returns, for each family: the weights that differ after the first load, the objects that the first checkpoint does
    not have and the second has, the number of the pickles, and whether the file exists after the load of the second
    one, and after Transformer Engine's modules have loaded its pickles.
    """
    fp8.set_environment("fp8_e2e")
    te_without_kernels.load()
    axes = ParallelConfig()
    runtime.start(axes, seed=0)
    results = {}
    for family, folder in folders.items():
        engine, _, shape = _built(folder, axes, preset("fp8_e2e").training, is_engine=True)
        local, _, _ = _built(folder, axes, None, is_engine=False)
        given = {
            shape.weights.entry(name).hf: weight.data.normal_()
            for name, weight in build.global_weights([local]).items()
        }
        of_local = _parts(local)
        _load(engine, of_local, scratch / family / "local")
        wrong = [
            name
            for name, weight in build.global_weights([engine]).items()
            if not torch.equal(weight, given[shape.weights.entry(name).hf])
        ]
        canary = scratch / f"{family}.canary"
        evil = torch.frombuffer(bytearray(pickle.dumps(Canary(canary))), dtype=torch.uint8)
        boxes, objects, common = _parts(engine)
        evil_objects = {key: _saved([evil]) for key in objects if "_extra_state" in key}
        _load(engine, (boxes, objects | evil_objects, common), scratch / family / "evil")
        after_ours = canary.exists()
        modules = {name: evil for name in engine.state_dict() if name.endswith("_extra_state")}
        with contextlib.suppress(Exception):
            engine.load_state_dict(engine.state_dict() | modules, strict=True)
        results[family] = {
            "wrong": wrong,
            "missing": sorted(objects.keys() - of_local[1].keys()),
            "pickles": len(evil_objects),
            "after our load": after_ours,
            "after theirs": canary.exists(),
        }
    return results


def _parts(chunk: Any) -> sharded.Content:
    """Return what a run writes of a model."""
    described = {"model0": chunk.sharded_state_dict(metadata=dict(checkpoint._METADATA))}
    experts = sharded.expert_keys(described)
    return sharded.split_state(described, Shares(), experts=experts, replicas=1, expert_replicas=1)


@torch.no_grad()
def _load(chunk: Any, content: sharded.Content, folder: Path) -> None:
    """Write a checkpoint and load it into a model."""
    boxes, objects, common = content
    folder.mkdir(parents=True)
    torch_dist.write(folder, boxes, objects=objects)
    wanted = {"model0": chunk.sharded_state_dict(metadata=dict(checkpoint._METADATA))}
    loaded, _ = sharded.fill(wanted, torch_dist.Checkpoint(folder), common, Shares())
    chunk.load_state_dict(loaded["model0"], strict=True)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


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
        "adds in a fixed order": config.moe_permute_fusion,
        "packing": _packing(chunk) if spec == "te" else [],
    }


def _packing(chunk: Any) -> list[tuple[set[str], set[str]]]:
    """Return, for each attention layer, what it passes of a pack, and what of it is no argument of Transformer
    Engine's attention or no field of our packs."""
    from transformer_engine.pytorch import DotProductAttention  # pyright: ignore[reportMissingImports]

    from megatron_chord.model.packed import PackedSequences

    known = inspect.signature(DotProductAttention.forward).parameters.keys()
    fields = {field.name for field in dataclasses.fields(PackedSequences)}
    kept = [
        module.kept_packed_seq_params for module in chunk.modules() if isinstance(module, DotProductAttention)
    ]
    # Megatron itself leaves these two out.
    return [(names, {*(names - {"cp_group", "local_cp_size"} - known), *(names - fields)}) for names in kept]


def _recipe(config: Any) -> tuple[str, str, bool] | None:
    """Return the recipe's class, its format, and whether it rounds scales to powers of 2."""
    if config.fp8 is None:
        return None
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe: Any = get_fp8_recipe(config)
    return type(recipe).__name__, recipe.fp8_format.name, recipe.fp8_quant_fwd_inp.power_2_scale
