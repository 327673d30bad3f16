"""The table between Megatron-Core's and Hugging Face's names of one model, read in both directions.

A family (``megatron_chord.families``) lists its ``Rule``s; everything that reads, writes or publishes weights asks
``WeightMap``. Megatron names are global: layer numbers count over all pipeline stages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_chord.weights.transforms import Transform

_LAYER = "{layer}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of parameter. ``{layer}`` in the names stands for the layer number."""

    megatron: tuple[str, ...]
    """Names of the parameter: the local layer spec's, and Transformer Engine's where it differs."""
    hf: tuple[str, ...]
    transform: Transform
    vocab: bool = False
    """Rows are vocabulary entries: Megatron's parameter has padding rows at the end, Hugging Face's has not."""
    exported: bool = True
    """False for a second copy of a tensor that another rule exports (the tied head of the last pipeline stage)."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter: a rule with its layer number filled in."""

    megatron: str
    hf: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """All rules of one model."""

    rules: tuple[Rule, ...]
    num_layers: int

    def entry(self, megatron_name: str) -> Entry:
        """What the parameter of this global Megatron name is made of. ValueError when the family has no such name."""
        match = re.search(r"\.layers\.(\d+)\.", megatron_name)
        layer = match.group(1) if match else ""
        pattern = megatron_name.replace(f".layers.{layer}.", f".layers.{_LAYER}.") if match else megatron_name
        for rule in self.rules:
            if pattern in rule.megatron:
                hf = tuple(name.replace(_LAYER, layer) for name in rule.hf)
                return Entry(megatron=megatron_name, hf=hf, rule=rule)
        raise ValueError(f"no rule maps the Megatron parameter {megatron_name!r} to Hugging Face")

    def hf_names(self) -> Iterator[str]:
        """Every Hugging Face tensor of the model, each once."""
        for rule in self.rules:
            if not rule.exported:
                continue
            for name in rule.hf:
                if _LAYER in name:
                    yield from (name.replace(_LAYER, str(layer)) for layer in range(self.num_layers))
                else:
                    yield name


def both(local: str, transformer_engine: str) -> tuple[str, ...]:
    """Names of one parameter in the local and in Transformer Engine's layer spec, below ``decoder.layers.N``."""
    return tuple(f"decoder.layers.{_LAYER}.{name}" for name in (local, transformer_engine))


def layer(name: str) -> tuple[str, ...]:
    return (f"decoder.layers.{_LAYER}.{name}",)


def hf_layer(*names: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{_LAYER}.{name}" for name in names)


def padded_vocab_size(vocab_size: int, tensor_parallel: int, multiple: int = 8) -> int:
    """Rows of Megatron's embedding: every tensor-parallel rank gets equally many, a multiple of ``multiple``."""
    step = multiple * tensor_parallel
    return -(-vocab_size // step) * step


def check_accounting(expected: Sequence[str], found: Sequence[str], where: str) -> None:
    """ValueError listing every missing and every unexpected tensor name."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    findings = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in extra]
    if findings:
        raise ValueError(f"{where} does not hold this model's tensors:\n  " + "\n  ".join(findings))
