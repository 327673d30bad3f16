"""YAML and `a.b=value` overrides -> RunConfig, strictly; and back, for the run folder.

Unknown keys, wrong types, missing fields and broken rules are collected and reported together, each with file and
line. Values are read by the type of their field (PyYAML alone reads 1e-6 as a string).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from megatron_chord.config import RunConfig

T = TypeVar("T")


class ConfigError(ValueError):
    """What is wrong with a run's settings, one finding a line."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file and apply overrides such as ``optim.lr=1e-6``.

    Relative paths in the file are relative to its folder; in overrides, and for ``output``, to the current one.

    Raises:
        ConfigError: with every finding as "file:line: reason".
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_config(text, str(path), path.parent, overrides)


def parse_config(text: str, name: str, folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}: expected a mapping of settings")
    reader = _Reader(name, folder)
    for override in overrides:
        reader.override(root, override)
    config = reader.read(root, RunConfig, "")
    if reader.findings:
        raise ConfigError("\n".join(reader.findings))
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved settings as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


class _Invalid(Exception):
    """A value that has been reported already."""


class _Reader:
    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.findings: list[str] = []
        self.overridden: dict[int, str] = {}

    def read(self, node: yaml.Node, kind: Any, where: str, field: Any = None) -> Any:
        try:
            return self._read(node, kind, where, field)
        except _Invalid:
            return None

    def override(self, root: yaml.MappingNode, text: str) -> None:
        key, separator, value = text.partition("=")
        if not separator or not key:
            self.findings.append(f"override {text!r}: expected name=value, as in optim.lr=1e-6")
            return
        *blocks, last = key.split(".")
        mapping = root
        for block in blocks:
            child = _child(mapping, block)
            if not isinstance(child, yaml.MappingNode):
                child = yaml.MappingNode("tag:yaml.org,2002:map", [], mapping.start_mark, mapping.end_mark)
                self.overridden[id(_set(mapping, block, child))] = text
            mapping = child
        try:
            node = yaml.compose(value, Loader=yaml.SafeLoader) or yaml.ScalarNode(
                "tag:yaml.org,2002:null", ""
            )
        except yaml.YAMLError:
            node = yaml.ScalarNode("tag:yaml.org,2002:str", value)
        for part in _nodes(node):
            self.overridden[id(part)] = text
        key_node = _set(mapping, last, node)
        self.overridden[id(key_node)] = text

    def _fail(self, node: yaml.Node, message: str) -> _Invalid:
        if id(node) in self.overridden:
            place = f"override {self.overridden[id(node)]!r}"
        else:
            place = f"{self.name}:{node.start_mark.line + 1}" if node.start_mark else self.name
        self.findings.append(f"{place}: {message}")
        return _Invalid()

    def _read(self, node: yaml.Node, kind: Any, where: str, field: Any) -> Any:
        origin = get_origin(kind)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(node, typing.cast(type, kind), where)
        if origin in (types.UnionType, typing.Union):
            if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
                return None
            (inner,) = [part for part in get_args(kind) if part is not type(None)]
            return self._read(node, inner, where, field)
        if origin is tuple:
            if not isinstance(node, yaml.SequenceNode):
                raise self._fail(node, f"{where}: expected a list, got {_shown(node)}")
            return tuple(self.read(item, get_args(kind)[0], where) for item in node.value)
        if origin is dict:
            return self._free_mapping(node, where)
        if not isinstance(node, yaml.ScalarNode):
            raise self._fail(node, f"{where}: expected a single value, got {_shown(node)}")
        return self._scalar(node, kind, where, field)

    def _dataclass(self, node: yaml.Node, kind: type[T], where: str) -> T:
        if not isinstance(node, yaml.MappingNode):
            raise self._fail(node, f"{where}: expected a block of settings, got {_shown(node)}")
        hints = typing.get_type_hints(kind)
        fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        before = len(self.findings)
        for key_node, value_node in node.value:
            key, full = key_node.value, f"{where}{key_node.value}"
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
                hint = f"; did you mean {where}{near[0]}?" if near else f"; known here: {', '.join(fields)}"
                self._fail(key_node, f"unknown setting {full!r}{hint}")
            elif key in values:
                self._fail(key_node, f"{full} is set twice")
            else:
                inner = f"{full}." if dataclasses.is_dataclass(hints[key]) else full
                values[key] = self.read(value_node, hints[key], inner, fields[key])
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in values:
                self._fail(node, f"{where}{name} is missing")
        if len(self.findings) > before:
            raise _Invalid
        try:
            return kind(**values)
        except ValueError as error:
            raise self._fail(node, str(error)) from error

    def _free_mapping(self, node: yaml.Node, where: str) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise self._fail(node, f"{where}: expected a mapping, got {_shown(node)}")
        values = {key.value: _natural(value) for key, value in node.value}
        for name, value in values.items():
            if not isinstance(value, str | int | float | bool):
                raise self._fail(node, f"{where}.{name}: expected a single value, got {value!r}")
        return values

    def _scalar(self, node: yaml.ScalarNode, kind: Any, where: str, field: Any) -> Any:
        text = node.value
        if get_origin(kind) is Literal:
            if text not in get_args(kind):
                options = ", ".join(get_args(kind))
                raise self._fail(node, f"{where}: {text!r} is none of {options}")
            return text
        if kind is bool:
            if node.tag != "tag:yaml.org,2002:bool":
                raise self._fail(node, f"{where}: expected true or false, got {text!r}")
            return text.lower() in ("true", "yes", "on")
        if node.tag == "tag:yaml.org,2002:null" or not text:
            raise self._fail(
                node, f"{where}: is empty; expected {'a path' if kind is Path else kind.__name__}"
            )
        if kind is Path:
            from_cwd = id(node) in self.overridden or (field and field.metadata.get("from_cwd"))
            path = Path(text).expanduser()
            return path if from_cwd else self.folder / path
        try:
            return kind(text)
        except ValueError:
            raise self._fail(node, f"{where}: expected {kind.__name__}, got {text!r}") from None


def _child(mapping: yaml.MappingNode, key: str) -> yaml.Node | None:
    return next((value for name, value in mapping.value if name.value == key), None)


def _set(mapping: yaml.MappingNode, key: str, value: yaml.Node) -> yaml.Node:
    key_node = yaml.ScalarNode("tag:yaml.org,2002:str", key)
    mapping.value = [(name, old) for name, old in mapping.value if name.value != key]
    mapping.value.append((key_node, value))
    return key_node


def _nodes(node: yaml.Node) -> list[yaml.Node]:
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    return [node, *(inner for child in children for inner in _nodes(child))]


def _natural(node: yaml.Node) -> Any:
    """A value of a free mapping by YAML's own types, and numbers such as 1e-6 as numbers."""
    value = yaml.SafeLoader("").construct_object(node, deep=True)
    if isinstance(value, str):
        for number in (int, float):
            try:
                return number(value)
            except ValueError:
                continue
    return value


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
