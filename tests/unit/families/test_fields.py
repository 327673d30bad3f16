"""This project reads, refuses or declares every field of a config.json that Transformers or vLLM reads for a family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_chord.families import fields
from megatron_chord.families.table import CAUSAL_LM, FAMILIES, model_shape, serving_config
from tests.support.read_fields import ROPE, read_fields
from tests.support.tiny import LLAMA3_ROPE, YARN_ROPE
from tests.unit.families.test_families import ABSENT, ALL, LATENT, config

SPELLINGS = {"rope_scaling", "rope_parameters", "rope_theta", "type", "rope_type", "architectures"}
"""Fields that have several names. They are read under one of them, and count as read under all."""


class Recorded(dict[str, Any]):
    """A config.json that records the names of the fields that are read."""

    def __init__(self, values: Mapping[str, Any], asked: set[str], prefix: str = "") -> None:
        nested = {
            name: Recorded(value, asked, ROPE)
            if name in ("rope_parameters", "rope_scaling") and value
            else value
            for name, value in values.items()
        }
        super().__init__(nested)
        self._asked, self._prefix = asked, prefix

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(self._prefix + key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._asked.add(self._prefix + key)
        return super().__getitem__(key)


def asked_for(family: str) -> set[str]:
    """Return the fields that the family reads, over configurations that together use all of its settings."""
    asked: set[str] = set()
    ropes = (YARN_ROPE,) if family in LATENT else ({"rope_type": "linear", "factor": 2.0}, LLAMA3_ROPE)
    for rope in ({"rope_type": "default"}, *ropes):
        for changes in (
            {},
            {"use_sliding_window": True, "sliding_window": 4096, "layer_types": ["full_attention"] * 2},
        ):
            for spelling in ("rope_parameters", "rope_scaling"):
                stated = config(family, **{"rope_parameters": ABSENT, spelling: dict(rope)} | changes)
                FAMILIES[family](Recorded(fields.one_name(stated), asked))
    return asked


def accounted(family: str, asked: set[str]) -> set[str]:
    neutral = {name for name, rule in fields.NEUTRAL.items() if not rule.families or family in rule.families}
    rope = {ROPE + name for name in fields.ROPE_NEUTRAL | fields.ROPE_IRRELEVANT}
    spellings = SPELLINGS | {ROPE + name for name in SPELLINGS}
    return (
        asked
        | neutral
        | rope
        | spellings
        | set(fields.IRRELEVANT)
        | set(fields.UNREAD.get(family, ()))
        | set(fields.ALIASES.get(family, ()))
        | set(fields.TOKEN_FIELDS)
    )


@pytest.mark.parametrize("family", ALL)
def test_every_field_that_a_loader_reads_is_accounted_for(family: str) -> None:
    read = read_fields(family)
    assert {"is_causal", "layer_types", "sliding_window", ROPE + "mrope_section"} <= read.keys()
    known = accounted(family, asked_for(family))
    unseen = {name: places[:3] for name, places in read.items() if name not in known}
    assert not unseen, "neither read by the family nor in families/fields.py"


def test_what_is_declared_is_read_by_a_loader() -> None:
    """If no release reads a declared field any more, its entry must be deleted."""
    read = {name for family in ALL for name in read_fields(family)}
    declared = {*fields.IRRELEVANT, *(ROPE + name for name in fields.ROPE_NEUTRAL | fields.ROPE_IRRELEVANT)}
    assert not declared - read
    by_lists = {"rotary_emb_base", "rotary_pct", "rotary_emb_fraction"}  # vLLM reads them in a loop
    assert not set(fields.NEUTRAL) - read - by_lists


@pytest.mark.parametrize("family", ALL)
def test_every_field_that_a_family_reads_has_a_type(family: str) -> None:
    asked = asked_for(family)
    untyped = {name for name in asked if not name.startswith(ROPE)} - set(fields.KINDS)
    assert not untyped
    assert not {name.removeprefix(ROPE) for name in asked if name.startswith(ROPE)} - set(fields.ROPE_KINDS)


@pytest.mark.parametrize("family", ALL)
def test_names_that_mean_the_same_are_those_of_transformers(family: str) -> None:
    assert fields.ALIASES.get(family, {}) == dict(AutoConfig.for_model(family).attribute_map)


def neutral_values() -> Iterator[tuple[str, Any]]:
    for name, rule in fields.NEUTRAL.items():
        for value in (None, *rule.values):
            yield name, value


def test_values_that_change_nothing_are_accepted() -> None:
    expected = model_shape(config("llama"))
    for name, value in neutral_values():
        assert model_shape(config("llama") | {name: value}) == expected, name
    for name, rule in fields.ROPE_NEUTRAL.items():
        for value in rule.values:
            assert model_shape(config("llama", rope_parameters={name: value})) == expected, name


@pytest.mark.parametrize("name", fields.NEUTRAL)
def test_every_other_value_is_refused(name: str) -> None:
    family = (*fields.NEUTRAL[name].families, "llama")[0]
    with pytest.raises(ValueError, match=f"{name} 7 is not supported: "):
        model_shape(config(family) | {name: 7})


def test_all_findings_come_in_one_error() -> None:
    with pytest.raises(ValueError, match="is_causal False") as caught:
        model_shape(config("qwen2", rms_norm_eps="1e-6", is_causal=False, eos_token_id=99))
    text = str(caught.value)
    for part in (
        "rms_norm_eps must be a positive number",
        "eos_token_id 99 is beyond the vocabulary of 50",
    ):
        assert part in text


def test_the_class_that_vllm_is_told_is_transformers_own() -> None:
    assert {family: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] for family in FAMILIES} == CAUSAL_LM
    assert serving_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}) == {}
    assert serving_config(
        {"model_type": "llama", "architectures": ["LlamaModel"], "hidden_act": "swish"}
    ) == {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
    }
