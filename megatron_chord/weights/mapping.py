"""The table between Megatron-Core's and Hugging Face's parameter names of a model. It is used in both directions.

A family (``megatron_chord.families``) lists its ``Rule``s. All code that reads, writes or pushes weights uses
``WeightMap``. Megatron names are global: layers are numbered over all pipeline stages, experts over all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from megatron_chord.weights.advice import of_names
from megatron_chord.weights.findings import listing
from megatron_chord.weights.transforms import Transform

_LAYER, _EXPERT = "{layer}", "{expert}"
_LAYER_NUMBER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")
_EXPERT_NUMBER = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)\d+$")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of parameter. ``{layer}`` and ``{expert}`` in the names are placeholders for numbers."""

    megatron: tuple[str, ...]
    """Names of the parameter in Megatron: with the local layer spec, and with Transformer Engine's if it differs."""
    hf: tuple[str, ...]
    transform: Transform
    vocab: bool = False
    """True if rows are vocabulary entries. Megatron's parameter then has padding rows at the end."""
    exported: bool = True
    """False for a second copy of a tensor that another rule exports (the tied head of the last pipeline stage)."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers that have the parameter; None for all layers."""
    dtype: torch.dtype | None = None
    """The dtype of the parameter on both sides, independent of the model's dtype; None for the model's dtype."""

    @cached_property
    def of_expert(self) -> bool:
        """True for a parameter of one expert of a mixture. Each expert-parallel rank has other experts."""
        return any(_EXPERT in name for name in self.hf)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter: a rule with its layer and expert number."""

    megatron: str
    rule: Rule
    layer: int | None
    expert: int | None

    @property
    def hf(self) -> tuple[str, ...]:
        return tuple(_numbered(name, self.layer, self.expert) for name in self.rule.hf)


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """All rules of one model."""

    rules: tuple[Rule, ...]
    num_layers: int
    num_experts: int = 0
    unread: tuple[str, ...] = ()
    """Hugging Face names, with ``{layer}``, of further tensors that a folder may have and that are not needed."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Names of further tensors that a folder may have -> the tensors to which they must be equal (a tied head)."""
    num_unread_layers: int = 0
    """Number of further layers that a folder may have after those of the model. The forward pass does not use them."""

    def entry(self, megatron_name: str) -> Entry:
        """The entry for a global Megatron name. Raises ValueError if the family has no such name."""
        pattern = _EXPERT_NUMBER.sub(_EXPERT, _LAYER_NUMBER.sub(_LAYER, megatron_name))
        number = _number(_LAYER_NUMBER, megatron_name)
        for rule in self.rules:
            if pattern in rule.megatron and (rule.layers is None or number in rule.layers):
                return Entry(
                    megatron=megatron_name,
                    rule=rule,
                    layer=number,
                    expert=_number(_EXPERT_NUMBER, megatron_name),
                )
        raise ValueError(f"no rule maps the Megatron parameter {megatron_name!r} to Hugging Face")

    def hf_names(self) -> Iterator[str]:
        """Every Hugging Face tensor of the model, each once."""
        for rule in self.rules:
            if rule.exported:
                yield from self._names(rule)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The Hugging Face names of tensors with a fixed dtype, with that dtype."""
        return {
            name: rule.dtype for rule in self.rules if rule.dtype is not None for name in self._names(rule)
        }

    def canonical(self, found: Sequence[str]) -> dict[str, str]:
        """Map the name of each of this model's tensors to its name in a folder. ``found`` are the folder's names.

        In a folder that was saved without the head (Transformers' ``AutoModel``) names have no prefix ``model.``.
        """
        known = {*self.hf_names(), *self._passed_over(), *self.copies}
        prefixed = {name: f"model.{name}" for name in found if f"model.{name}" in known}
        return {name if name in known else prefixed.get(name, name): name for name in found}

    def check_folder(self, found: Sequence[str], where: str) -> None:
        """Check that a folder has exactly this model's tensors. Raises ValueError otherwise."""
        unread = {*self._passed_over(), *self.copies}
        after = range(self.num_layers, self.num_layers + self.num_unread_layers)
        starts = tuple(_numbered(start, number, None) for number in after for start in hf_layer(""))
        read = [name for name in found if name not in unread and not name.startswith(starts)]
        check_accounting(list(self.hf_names()), read, where)

    def _passed_over(self) -> Iterator[str]:
        return (name for pattern in self.unread for name in self._each(pattern, range(self.num_layers)))

    def _names(self, rule: Rule) -> Iterator[str]:
        layers = range(self.num_layers) if rule.layers is None else rule.layers
        return (name for pattern in rule.hf for name in self._each(pattern, layers))

    def _each(self, pattern: str, layers: Sequence[int]) -> Iterator[str]:
        for layer in layers if _LAYER in pattern else [None]:
            for expert in range(self.num_experts) if _EXPERT in pattern else [None]:
                yield _numbered(pattern, layer, expert)


def global_name(local: str, *, first_layer: int, first_expert: int) -> str:
    """The global name of a parameter (layers and experts numbered over the whole model) from its name on this rank."""
    name = _LAYER_NUMBER.sub(lambda match: str(int(match[0]) + first_layer), local)
    return _EXPERT_NUMBER.sub(lambda match: str(int(match[0]) + first_expert), name)


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.search(name)
    return int(match[0]) if match else None


def _numbered(name: str, layer: int | None, expert: int | None) -> str:
    return name.replace(_LAYER, str(layer)).replace(_EXPERT, str(expert))


def both(local: str, transformer_engine: str) -> tuple[str, ...]:
    """The names of a parameter below ``decoder.layers.N`` in the local and in Transformer Engine's layer spec."""
    return tuple(f"decoder.layers.{_LAYER}.{name}" for name in (local, transformer_engine))


def layer(name: str) -> tuple[str, ...]:
    return (f"decoder.layers.{_LAYER}.{name}",)


def hf_layer(*names: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{_LAYER}.{name}" for name in names)


def padded_vocab_size(vocab_size: int, tensor_parallel: int, multiple: int = 8) -> int:
    """Number of rows of Megatron's embedding: every tensor-parallel rank has the same multiple of ``multiple``."""
    step = multiple * tensor_parallel
    return -(-vocab_size // step) * step


def check_accounting(expected: Sequence[str], found: Sequence[str], where: str) -> None:
    """Compare tensor names. Raises ValueError with a list of the missing and the unexpected names."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    findings = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in extra]
    if findings:
        hint = of_names(extra)
        heading = f"{where} does not have this model's tensors{f'; {hint}' if hint else ''}:"
        raise ValueError(listing(heading, findings))
