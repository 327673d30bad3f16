"""Find the fields of a config.json that Transformers and vLLM read for each family, from their installed sources.

    python -m tests.support.read_fields           # the whole table

The search covers a family's own modules and what families share: RoPE, masks, caches, attention, and how vLLM reads a
model's config. The sources are parsed; only Transformers' configuration classes are imported.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

_CONFIGS = {"config", "hf_config", "text_config", "hf_text_config", "cfg"}
_ROPES = {"rope_parameters", "rope_parameters_dict", "rope_scaling"}
ROPE = "rope_parameters."
"""The prefix of the fields below ``rope_parameters``."""
_TRANSFORMERS_SHARED = (
    "modeling_rope_utils.py",
    "masking_utils.py",
    "modeling_layers.py",
    "cache_utils.py",
    "configuration_utils.py",
    "integrations/moe.py",
    "integrations/sdpa_attention.py",
    "integrations/flash_attention.py",
)
_VLLM_SHARED = (
    "model_executor/layers/rotary_embedding/__init__.py",
    "model_executor/models/utils.py",
    "transformers_utils/config.py",
    "transformers_utils/model_arch_config_convertor.py",
    "config/model.py",
)
_VLLM_MODULES = {
    "llama": ("llama",),
    "mistral": ("mistral", "llama"),
    "mixtral": ("mixtral",),
    "qwen2": ("qwen2",),
    "qwen2_moe": ("qwen2_moe",),
    "qwen3": ("qwen3", "qwen2"),
    "qwen3_moe": ("qwen3_moe",),
    "deepseek_v2": ("deepseek_v2",),
    "deepseek_v3": ("deepseek_v2",),
}
"""vLLM's modules of each family: its own, and those whose layers it builds on."""


def read_fields(family: str) -> dict[str, list[str]]:
    """Return the places that read each field, as ``package/path:line``. Fields of RoPE begin with
    ``rope_parameters.``."""
    transformers, vllm = _package("transformers"), _package("vllm")
    sources = [transformers / f"models/{family}/modeling_{family}.py"]
    sources += [transformers / name for name in _TRANSFORMERS_SHARED]
    sources += [vllm / f"model_executor/models/{name}.py" for name in _VLLM_MODULES[family]]
    sources += [vllm / name for name in _VLLM_SHARED]
    found: dict[str, list[str]] = {}
    for source in sources:
        for field, line in _reads(source):
            found.setdefault(field, []).append(f"{source.relative_to(transformers.parent)}:{line}")
    for field in _declared(family):
        found.setdefault(field, []).append(f"the fields of Transformers' configuration of {family}")
    methods = _methods()
    return {field: places for field, places in sorted(found.items()) if field not in methods}


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@functools.cache
def _reads(source: Path) -> list[tuple[str, int]]:
    tree = ast.parse(source.read_text())
    return [read for node in ast.walk(tree) for read in _of_node(node)]


def _of_node(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what one expression reads of a config or of its RoPE parameters."""
    match node:
        case ast.Attribute(value=value, attr=field) if _is_one_of(value, _CONFIGS):
            yield field, node.lineno
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr"), args=[value, ast.Constant(value=str(field)), *_]
        ):
            if _is_one_of(value, _CONFIGS):
                yield field, node.lineno
        case ast.Call() | ast.Subscript() | ast.Compare() | ast.DictComp():
            yield from ((ROPE + field, node.lineno) for field in _of_rope(node))


def _of_rope(node: ast.Call | ast.Subscript | ast.Compare | ast.DictComp) -> list[str]:
    match node:
        case ast.Call(
            func=ast.Attribute(value=value, attr="get" | "pop"), args=[ast.Constant(value=field), *_]
        ):
            fields = [field]
        case ast.Subscript(value=value, slice=ast.Constant(value=field)):
            fields = [field]
        case ast.Compare(left=ast.Constant(value=field), ops=[ast.In()], comparators=[value]):
            fields = [field]
        case ast.DictComp(
            generators=[ast.comprehension(iter=ast.Call(func=ast.Attribute(value=value)), ifs=[which])]
        ):
            # {k: v for k, v in rope_parameters.items() if k in ("beta_fast", ...)}
            fields = [part.value for part in ast.walk(which) if isinstance(part, ast.Constant)]
        case _:
            return []
    return [field for field in fields if isinstance(field, str)] if _is_one_of(value, _ROPES) else []


def _is_one_of(value: ast.expr, names: set[str]) -> bool:
    last = (
        value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else None
    )
    return last in names


def _declared(family: str) -> list[str]:
    from transformers import AutoConfig

    made = AutoConfig.for_model(family)
    return [name for name in made.to_dict() if not name.startswith("_")]


@functools.cache
def _methods() -> frozenset[str]:
    from transformers import PreTrainedConfig

    return frozenset(
        name for name in dir(PreTrainedConfig) if callable(getattr(PreTrainedConfig, name, None))
    )


if __name__ == "__main__":
    from megatron_chord.families.table import FAMILIES

    for each in sorted(FAMILIES):
        print(each)
        for name, where in read_fields(each).items():
            print(f"  {name:36} {where[0]}" + (f" and {len(where) - 1} more" if len(where) > 1 else ""))
