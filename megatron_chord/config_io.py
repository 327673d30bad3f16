"""Reads a YAML file and `a.b=value` overrides strictly into a RunConfig or SuiteConfig, and writes them back as YAML.

Unknown keys, wrong types, missing fields and broken rules are collected and reported together, each with file and
line. The type of a field decides how its value is read. Some rules are checked later, because they need the model or
the method. Their messages contain the full names of settings; ``located`` adds the place where these are given.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from megatron_chord import hub
from megatron_chord.config import RunConfig
from megatron_chord.config_nodes import (
    ConfigError,
    Dumper,
    as_block,
    as_list,
    child,
    choice,
    default_choice,
    folder,
    given_places,
    is_list,
    is_null,
    is_override,
    members,
    override,
    place,
    read_files,
    setting_names,
    types_of,
)
from megatron_chord.config_suite import SuiteConfig

T = TypeVar("T")

MOVED = {
    "data.prompt_fields": "data.prompts.fields",
    "data.demonstration_fields": "data.demonstrations.fields",
    "data.evaluation_fields": "data.evaluation.fields",
    "batch.max_tokens": "batch.max_tokens_per_gpu",
    "batch.mini_batches": "batch.updates_per_step",
    "parallel.timeout_s": "timeouts.collective_s",
    "reward.overlong_cache": "reward.overlong.cache",
    "reward.overlong_penalty": "reward.overlong.penalty",
    "rollout.lag": "rollout.asynchronous.max_off_policy_steps",
    "rollout.in_flight": "rollout.asynchronous.in_flight",
    "rollout.extra_prompts": "rollout.partial.extra_prompts",
    "rollout.unfinished": "rollout.partial.unfinished",
    "rollout.max_carries": "rollout.partial.max_carries",
    "rollout.start_timeout_s": "timeouts.server_start_s",
    "rollout.request_timeout_s": "timeouts.sampling_s",
    "rollout.sync_timeout_s": "timeouts.weight_push_s",
    "objective.mu": "method.mu",
    "objective.token_weight": "method.token_weight",
    "objective.sft_cutoff": "method.cutoff",
    "objective.sft_aggregation": "method.aggregation",
    "objective.sft_temperature": "method.sft_temperature",
}
"""Former names of settings, with the present names."""
_AGGREGATIONS = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
}
RENAMED = {
    "objective.aggregation": _AGGREGATIONS,
    "method.aggregation": _AGGREGATIONS,
    "objective.advantage": {"group": "group_mean"},
}
"""Former names of values, with the present names, for each setting."""
_NAME = re.compile(r"[a-z]\w*(?:\.\w+)+")


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file and apply overrides such as ``optim.lr=1e-6``.

    Settings that the file does not have come from the file that its ``base`` names. Relative paths in a file are
    relative to the folder of the file. In overrides, and for ``output``, they are relative to the current folder.

    Raises:
        ConfigError: with every finding as "file:line: reason".
    """
    return _load(path, overrides, RunConfig)


def load_suite(path: Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read an evaluation suite as ``load_config`` reads a run. Relative paths in a file are relative to its folder.

    Raises:
        ConfigError: with every finding as "file:line: reason".
    """
    return _load(path, overrides, SuiteConfig)


def _load(path: Path, overrides: Sequence[str], kind: type[T]) -> T:
    root, wrong = _overridden(read_files(path, kind), overrides, kind)
    reader = _Reader(given_places(root), wrong, kind)
    config = reader.read(root, kind, "")
    if reader.findings:
        raise ConfigError("\n".join(reader.findings))
    return config


def dump_config(config: RunConfig | SuiteConfig) -> str:
    """The resolved settings as YAML that ``load_config`` or ``load_suite`` reads back."""
    return yaml.dump(_plain(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def plain_settings(config: RunConfig) -> dict[str, Any]:
    """The resolved settings as nested dicts of plain values; paths are absolute."""
    return _plain(config)


def located(message: str, path: Path, overrides: Sequence[str] = ()) -> str:
    """Prefix ``message`` with the place of the setting that it names: a line of the run's file, or an override.

    The message may name several settings in full. The place is that of the first one that an override gives, then of
    the first one in a file. If none is given, it is that of the first block of a named setting, and otherwise the file.
    A message without a setting's name is returned unchanged.
    """
    if not _settings_in(message, RunConfig):
        return message
    root, _ = _overridden(read_files(path, RunConfig), overrides)
    return f"{_place_of(message, given_places(root), RunConfig) or path}: {message}"


def meant_by(name: str, kind: type = RunConfig) -> list[str]:
    """Return the settings of ``kind`` that ``name`` can mean: the setting of that name, or those that end with it.

    ``lr`` means ``optim.lr``. ``temperature`` can mean the settings of several blocks.
    """
    known = setting_names(kind)
    return [name] if name in known else sorted(full for full in known if full.endswith(f".{name}"))


def one_line(block: Any) -> str:
    """The settings of a block in one line, defaults included: ``chord: mu constant (peak 0.1), cutoff 1.0``. Those that
    are null or an empty list are left out."""
    settings = _plain(block)
    name = settings.pop("kind", None) or settings.pop("name", None)
    shown = [
        f"{key} {_value_text(value)}" for key, value in settings.items() if value is not None and value != []
    ]
    return ": ".join(part for part in (name, ", ".join(shown)) if part)


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        parts = {str(key): _value_text(inner) for key, inner in value.items()}
        chosen = parts.pop("schedule", None) or parts.pop("kind", "")
        inner = ", ".join(f"{name} {text}" for name, text in parts.items())
        return f"{chosen} ({inner})".lstrip() if inner else chosen
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _overridden(
    root: yaml.MappingNode, overrides: Sequence[str], kind: type = RunConfig
) -> tuple[yaml.MappingNode, list[str]]:
    """The tree with the valid overrides applied, and the findings about the others."""
    wrong: list[str] = []
    for text in overrides:
        try:
            root = override(root, text, kind)
        except ConfigError as error:
            wrong.append(str(error))
    return root, wrong


def _settings_in(message: str, root: type) -> list[str]:
    """The full names of settings in a message. One without a dot, such as ``steps``, counts only as the first word."""
    known = setting_names(root)
    first = message.partition(" ")[0].rstrip(":")
    return [name for name in (first, *_NAME.findall(message)) if name in known]


def _place_of(
    message: str, places: Mapping[str, str], root: type, own: Mapping[str, str] = types.MappingProxyType({})
) -> str | None:
    """The place of a setting that ``message`` names: in full (``places``), or by its name in its block (``own``).

    Overrides come before lines of files, because a file is usually right without the override. If no named setting is
    given, it is the place of the block of one.
    """
    names = _settings_in(message, root)
    given = [places[name] for name in names if name in places]
    given += [own[word] for word in re.findall(r"[a-z]\w*", message) if word in own]
    blocks = [places[block] for name in names if (block := name.rpartition(".")[0]) in places]
    return next(iter(sorted(given, key=lambda text: not is_override(text)) or blocks), None)


class _Invalid(Exception):
    """The result for a value that is wrong and has been reported."""


class _Reader:
    def __init__(self, places: Mapping[str, str], findings: list[str], root: type) -> None:
        """``root``: the dataclass of the whole file, for hints."""
        self._places = places
        self.findings = findings
        self._root = root

    def read(self, node: yaml.Node, kind: Any, where: str, field: Any = None) -> Any:
        try:
            return self._read(node, kind, where, field)
        except _Invalid:
            return None

    def _fail(self, node: yaml.Node, message: str) -> _Invalid:
        self.findings.append(f"{place(node)}: {message}")
        return _Invalid()

    def _read(self, node: yaml.Node, kind: Any, where: str, field: Any) -> Any:
        if get_origin(kind) in (types.UnionType, typing.Union):
            parts = [part for part in get_args(kind) if part is not types.NoneType]
            if is_null(node) and len(parts) < len(get_args(kind)):
                return None
            kind = kind if members(kind) else parts[0]
        if members(kind):
            return (
                self._blocks(node, kind, where)
                if is_list(kind)
                else self._block(as_block(node, kind), kind, where)
            )
        if get_origin(kind) is tuple:
            return self._list(node, get_args(kind)[0], where, field)
        if get_origin(kind) is dict:
            return self._free_mapping(node, where, nested=get_args(kind)[1] is Any)
        if not isinstance(node, yaml.ScalarNode):
            raise self._fail(node, f"{where}: expected a single value, got {_shown(node)}")
        return self._scalar(node, kind, where, field)

    def _path(self, node: yaml.ScalarNode, field: Any) -> Path:
        settings = field.metadata if field else {}
        path = Path(node.value).expanduser()
        if settings.get("from_cwd"):
            return path
        local = folder(node) / path
        if "hub" not in settings:
            return local
        try:
            return hub.resolve(node.value, settings["hub"], local)
        except ValueError as error:
            raise self._fail(node, str(error)) from None

    def _list(self, node: yaml.Node, item: Any, where: str, field: Any) -> tuple[Any, ...]:
        """A list of single values, or a list of blocks of several kinds. A single path counts as a list of one path."""
        if item is Path and isinstance(node, yaml.ScalarNode):
            return (self._scalar(node, item, where, field),)
        if not isinstance(node, yaml.SequenceNode):
            raise self._fail(node, f"{where}: expected a list, got {_shown(node)}")
        return tuple(self._item(part, item, where, index, field) for index, part in enumerate(node.value))

    def _item(self, node: yaml.Node, kind: Any, where: str, index: int, field: Any) -> Any:
        """One item of a list. The name of a block contains its position, and findings about it have its own line."""
        if not members(kind):
            return self.read(node, kind, where, field if kind is Path else None)
        block = as_block(node, kind)
        places = given_places(block, where.rpartition(".")[0]) if isinstance(block, yaml.MappingNode) else {}
        return _Reader(places, self.findings, self._root).read(block, kind, f"{where}[{index}]")

    def _blocks(self, node: yaml.Node, kind: Any, where: str) -> tuple[Any, ...]:
        items = as_list(node, kind)
        if items is None:
            raise self._fail(node, f"{where}: is empty; expected a path, a list of paths or a list of blocks")
        return tuple(self._block(item, members(kind)[0], where) for item in items)

    def _block(self, node: yaml.Node, kind: Any, where: str) -> Any:
        if not isinstance(node, yaml.MappingNode):
            required = [name for member in members(kind)[:1] for name in _required_names(member)]
            needed = f" with {' and '.join(required)}" if required and len(members(kind)) == 1 else ""
            raise self._fail(node, f"{where}: expected a block of settings{needed}, got {_shown(node)}")
        if len(members(kind)) == 1:
            return self._dataclass(node, members(kind)[0], where)
        key = choice(kind)
        assert key
        values = {value: member for member in members(kind) for value in get_args(types_of(member)[key])}
        chosen, default = child(node, key), default_choice(kind)
        if chosen is not None:
            field = _field(members(kind)[0], key)
            name = self._read(chosen, Literal[tuple(values)], f"{where}.{key}", field)
        elif default is not None:
            name = default
        else:
            raise self._fail(node, f"{where}.{key} is missing; known: {', '.join(values)}")
        return self._dataclass(node, values[name], where, f"{key}: {name}", values)

    def _dataclass(
        self,
        node: yaml.MappingNode,
        kind: type,
        where: str,
        variant: str = "",
        forms: Mapping[str, type] = types.MappingProxyType({}),
    ) -> Any:
        """``variant`` is the key and value that chose this dataclass, such as ``kind: phi``. ``forms``: all possible
        dataclasses."""
        hints = types_of(kind)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        values: dict[str, Any] = {}
        before = len(self.findings)
        for key_node, value_node in node.value:
            key, full = key_node.value, _join(where, key_node.value)
            if not isinstance(key_node, yaml.ScalarNode):
                self._fail(key_node, f"{where or 'settings'}: expected a name, got {_shown(key_node)}")
            elif key in values:
                self._fail(key_node, f"{full} is set twice")
            elif key in fields:
                values[key] = self.read(value_node, hints[key], full, fields[key])
            elif full in MOVED:
                self._fail(key_node, f"{full} is now {MOVED[full]}")
            else:
                chooser = variant.partition(":")[0]
                having = [f"`{chooser}: {name}`" for name, form in forms.items() if key in types_of(form)]
                elsewhere = meant_by(key, self._root)
                hint = _hint(key, list(fields), where, variant, having, elsewhere)
                self._fail(key_node, f"unknown setting {full!r}{hint}")
        for name in _required_names(kind):
            if name not in values:
                self._fail(node, f"{_join(where, name)} is missing")
        if len(self.findings) > before:
            raise _Invalid
        try:
            return kind(**values)
        except ValueError as error:
            own = {key.value: place(key) for key, _ in node.value}
            found = _place_of(str(error), self._places, self._root, own) or place(node)
            self.findings.append(f"{found}: {error}")
            raise _Invalid from error

    def _free_mapping(self, node: yaml.Node, where: str, *, nested: bool) -> dict[str, Any]:
        """``nested``: whether values may also be lists and mappings of values."""
        if not isinstance(node, yaml.MappingNode):
            raise self._fail(node, f"{where}: expected a mapping, got {_shown(node)}")
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._fail(key_node, f"{where}: expected a name, got {_shown(key_node)}")
            elif key_node.value in values:
                self._fail(key_node, f"{where}.{key_node.value} is set twice")
            else:
                values[key_node.value] = self._natural(value_node, f"{where}.{key_node.value}", nested)
        return values

    def _natural(self, node: yaml.Node, where: str, nested: bool) -> Any:
        """Read a value without a declared type by YAML's own types. If it is not a single value, report it and return
        None."""
        if nested and isinstance(node, yaml.SequenceNode):
            return [self._natural(item, where, nested) for item in node.value]
        if nested and isinstance(node, yaml.MappingNode):
            return self._free_mapping(node, where, nested=True)
        value = None
        if isinstance(node, yaml.ScalarNode):
            try:
                value = yaml.SafeLoader("").construct_object(node)
            except (ValueError, yaml.YAMLError):
                value = None
        if not isinstance(value, str | int | float | bool):
            date = "; a date is a text in quotes" if isinstance(value, datetime.date) else ""
            expected = (
                f"a single number, text, true or false{', or a list or mapping of these' if nested else ''}"
            )
            self._fail(node, f"{where}: expected {expected}, got {_shown(node)}{date}")
        return value

    def _scalar(self, node: yaml.ScalarNode, kind: Any, where: str, field: Any) -> Any:
        text = node.value
        if get_origin(kind) is Literal:
            options = get_args(kind)
            if text not in options:
                hint = field.metadata.get("hints", {}).get(text.lower().replace("-", "_")) if field else None
                if hint is not None:
                    raise self._fail(node, f"{where}: {hint}")
                if text in RENAMED.get(where, {}):
                    raise self._fail(node, f"{where}: {text} is now {RENAMED[where][text]}")
                known = f"{', '.join(options)}{_nearest(text, options)}"
                raise self._fail(node, f"{where}: {text!r} is none of {known}")
            return text
        if kind is bool:
            if node.tag != "tag:yaml.org,2002:bool":
                raise self._fail(node, f"{where}: expected true or false, got {text!r}")
            return text.lower() in ("true", "yes", "on")
        if is_null(node) or (not text and kind is not str):
            expected = "a path" if kind is Path else kind.__name__
            raise self._fail(node, f"{where}: is empty; expected {expected}")
        if kind is Path:
            return self._path(node, field)
        try:
            return kind(text.replace(".inf", "inf") if kind is float else text)
        except ValueError:
            raise self._fail(node, f"{where}: expected {kind.__name__}, got {text!r}") from None


def _field(kind: type, name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(kind) if field.name == name)


def _required_names(kind: type) -> list[str]:
    """The settings of a dataclass that have no default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return [field.name for field in fields if field.default is missing and field.default_factory is missing]


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _nearest(text: str, known: Iterable[str], where: str = "", similarity: float = 0.5) -> str:
    near = difflib.get_close_matches(text, list(known), n=1, cutoff=similarity)
    return _did_you_mean([_join(where, name) for name in near])


def _hint(
    key: str, names: Sequence[str], where: str, variant: str, having: Sequence[str], elsewhere: Sequence[str]
) -> str:
    """What follows "unknown setting": what is known in this block, and what was probably meant.

    A name that is very similar to one of ``names`` is a typing error. Otherwise the same name in another form of the
    block (``having``) or in another block (``elsewhere``) is more probable than a name that is only a little similar.
    """
    known = f"; known {f'with `{variant}`' if variant else 'here'}: {', '.join(names)}"
    if having:
        return f"{known}; only {' and '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    chooser = variant.partition(":")[0]
    if not where:
        near = _did_you_mean(elsewhere) or _nearest(key, names)
    elif chooser and key in ("kind", "name", "schedule", "type"):
        near = _did_you_mean([_join(where, chooser)])
    else:
        others = _did_you_mean(elsewhere) if len(elsewhere) <= 3 else ""
        near = _nearest(key, names, where, 0.8) or others or _nearest(key, names, where)
    return f"{'' if near and not variant else known}{near}"


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return repr(node.value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
