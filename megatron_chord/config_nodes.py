"""Merges the YAML nodes of a run into one tree: its file, the files in ``base``, and the overrides.

The types of the settings say how nodes are merged. A block is a dataclass, or one of several dataclasses; then the
value of one key, such as ``kind``, says which. Every node knows the file and line, or the override, that it comes from.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

_MAP = "tag:yaml.org,2002:map"
_STR = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
"""Numbers such as 1e-6 and 1.0e6, which YAML 1.1 reads as strings."""


_OVERRIDE = "override "
"""The beginning of the place of a value that was given as an override."""


class ConfigError(ValueError):
    """Findings about a run's settings, one on each line."""


class _Override(yaml.Mark):
    """The place of a value that was given as an override. The name of the mark is the override."""


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str, name: str, mark: type[yaml.Mark] = yaml.Mark) -> None:
        self.mark = mark
        super().__init__(text)
        self.name = name

    def get_mark(self) -> yaml.Mark:
        return self.mark(self.name, self.index, self.line, self.column, None, 0)


class Dumper(yaml.SafeDumper):
    """Writes YAML. It puts quotes around strings that this project's loader would read as numbers."""


for _class in (_Loader, Dumper):
    _class.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def members(kind: Any) -> tuple[type, ...]:
    """The dataclasses that a block of type ``kind`` can be; empty if the type is not a block.

    For a list of blocks: the dataclasses that one of its blocks can be.
    """
    parts = get_args(kind) if get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    parts = tuple(get_args(part)[0] if get_origin(part) is tuple else part for part in parts)
    parts = tuple(part for part in parts if part is not types.NoneType)
    return parts if all(dataclasses.is_dataclass(part) for part in parts) else ()


@functools.cache
def types_of(block: type) -> Mapping[str, Any]:
    """The types of a dataclass's settings. They are kept, because Python compiles every annotation at each call."""
    return typing.get_type_hints(block)


def choice(kind: Any) -> str | None:
    """The key whose value says which of several dataclasses a block is. None if a block can be only one dataclass.

    A single value that is given instead of the block is the value of this key.
    """
    blocks = [types_of(member) for member in members(kind)]
    if len(blocks) < 2:
        return None
    (name,) = (key for key in blocks[0] if _is_discriminator(key, blocks))
    return name


def _is_discriminator(key: str, blocks: Sequence[Mapping[str, Any]]) -> bool:
    """True if every value of ``key`` belongs to only one of the blocks."""
    if not all(get_origin(hints.get(key)) is Literal for hints in blocks):
        return False
    values = [value for hints in blocks for value in get_args(hints[key])]
    return len(values) == len(set(values))


def default_choice(kind: Any) -> str | None:
    """The value of the key ``choice(kind)`` for a block that does not have it. None if the key is required.

    It is the key's default in the first dataclass.
    """
    key = choice(kind)
    default = members(kind)[0].__dataclass_fields__[key].default if key else dataclasses.MISSING
    return None if default is dataclasses.MISSING else default


def place(node: yaml.Node) -> str:
    """The place of ``node`` for findings: file and line, or the override."""
    mark = node.start_mark
    return mark.name if isinstance(mark, _Override) else f"{mark.name}:{mark.line + 1}"


def is_override(text: str) -> bool:
    """Whether a place, as ``place`` returns it, is an override."""
    return text.startswith(_OVERRIDE)


def folder(node: yaml.Node) -> Path:
    """The folder to which a path in ``node`` is relative: that of its file, or the current one for an override."""
    return Path() if isinstance(node.start_mark, _Override) else Path(node.start_mark.name).parent


def is_null(node: yaml.Node) -> bool:
    return node.tag == _NULL


def child(mapping: yaml.MappingNode, key: str) -> yaml.Node | None:
    return next((value for name, value in mapping.value if name.value == key), None)


def is_list(kind: Any) -> bool:
    """True if a setting of type ``kind`` is a list, or a list or null."""
    parts = get_args(kind) if get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    return any(get_origin(part) is tuple for part in parts)


def as_list(node: yaml.Node, kind: Any) -> list[yaml.Node] | None:
    """The nodes of a list of blocks; None if ``node`` is null.

    A single block counts as a list of one block. A list of single values is one block whose setting ``SHORTHAND`` is
    that list, if the dataclass has a ``SHORTHAND``.
    """
    if not isinstance(node, yaml.SequenceNode):
        return None if is_null(node) else [as_block(node, kind)]
    key = shorthand(kind)
    if key is not None and node.value and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [_mapping([(_key(key, node), node)], node)]
    return list(node.value)


def shorthand(kind: Any) -> str | None:
    """The setting that gets a single value which is given instead of a block."""
    parts = members(kind)
    return choice(kind) or (getattr(parts[0], "SHORTHAND", None) if parts else None)


def as_block(node: yaml.Node, kind: Any) -> yaml.Node:
    """Expand a single value or a list to the block for which it is a short form. Return other nodes unchanged.

    ``phi`` -> ``{kind: phi}``, ``[a, b]`` -> ``{kind: sum, terms: [a, b]}``, and for ``method.mu``
    ``0.5`` -> ``{schedule: constant, peak: 0.5}``.
    """
    if isinstance(node, yaml.SequenceNode):
        return _from_list(node, kind)
    if isinstance(node, yaml.ScalarNode) and node.tag in (_INT, _FLOAT):
        return _from_number(node, kind)
    return _from_single(node, kind) if isinstance(node, yaml.ScalarNode) else node


def _from_number(node: yaml.ScalarNode, kind: Any) -> yaml.Node:
    """Expand a number to a block: the number becomes the setting that ``NUMBER`` of a dataclass names. If no dataclass
    has ``NUMBER``, the number is read like any single value."""
    key = choice(kind)
    for member in members(kind):
        number = getattr(member, "NUMBER", None)
        if key is not None and number is not None:
            return _chosen(member, key, number, node)
    return _from_single(node, kind)


def _from_single(node: yaml.ScalarNode, kind: Any) -> yaml.Node:
    key = shorthand(kind)
    return node if key is None or is_null(node) else _mapping([(_key(key, node), node)], node)


def _from_list(node: yaml.SequenceNode, kind: Any) -> yaml.Node:
    """Expand a list to a block: the list becomes the setting whose metadata has ``from_list``. If there is no such
    setting, return the node unchanged."""
    key = choice(kind)
    for member in members(kind):
        for field in dataclasses.fields(member):
            if field.metadata.get("from_list"):
                if key is None:
                    return _mapping([(_key(field.name, node), node)], node)
                return _chosen(member, key, field.name, node)
    return node


def _chosen(member: type, key: str, setting: str, node: yaml.Node) -> yaml.MappingNode:
    """A block of type ``member`` whose ``setting`` is ``node``. The default of ``key`` in ``member`` chooses the
    type."""
    name = yaml.ScalarNode(_STR, member.__dataclass_fields__[key].default, node.start_mark, node.end_mark)
    return _mapping([(_key(key, node), name), (_key(setting, node), node)], node)


def read_files(
    path: Path, kind: type, asked_by: yaml.Node | None = None, above: tuple[Path, ...] = ()
) -> yaml.MappingNode:
    """The settings of a file, merged with those of the file that its ``base`` names. The file itself has precedence.

    Raises:
        ConfigError: a file cannot be read or is not a YAML mapping. Its settings are then unknown, so this is the only
            finding.
    """
    if path.resolve() in (file.resolve() for file in above):
        chain = " -> ".join(str(file) for file in (*above, path))
        raise ConfigError(f"{_asker(asked_by)}the base files form a circle: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{_asker(asked_by)}{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_asker(asked_by)}{path}: cannot be read: {error}") from error
    root = _compose(text, str(path))
    bases = [value for name, value in root.value if name.value == "base"]
    if not bases:
        return root
    base = bases[0]
    if len(bases) > 1:
        raise ConfigError(f"{place(bases[1])}: base is set twice")
    if not isinstance(base, yaml.ScalarNode) or is_null(base) or not base.value:
        raise ConfigError(f"{place(base)}: base: expected the name of a YAML file")
    own = _mapping([pair for pair in root.value if pair[0].value != "base"], root)
    below = read_files(path.parent / Path(base.value).expanduser(), kind, base, (*above, path))
    return typing.cast(yaml.MappingNode, _merged(below, own, kind))


def override(root: yaml.MappingNode, text: str, kind: type) -> yaml.MappingNode:
    """A copy of ``root`` with one setting replaced. ``text`` is the override, such as ``optim.lr=1e-6``.

    Raises:
        ConfigError: the override does not have this form.
    """
    key, separator, value = text.partition("=")
    name = f"{_OVERRIDE}{text!r}"
    if not separator or not key:
        raise ConfigError(f"{name}: expected name=value, as in optim.lr=1e-6")
    if key == "base":
        raise ConfigError(f"{name}: base can only be set in a file, not as an override")
    mark = _Override(name, 0, 0, 0, None, 0)
    try:
        node = _Loader(value, name, _Override).get_single_node() or yaml.ScalarNode(_NULL, "", mark)
    except yaml.YAMLError:
        node = yaml.ScalarNode(_STR, value, mark)
    return _set(root, key.split("."), node, kind)


def _compose(text: str, name: str) -> yaml.MappingNode:
    try:
        root = _Loader(text, name).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f"{error.problem_mark.line + 1}: " if error.problem_mark else " "
        raise ConfigError(f"{name}:{line}not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}: expected a mapping of settings")
    return root


def _merged(below: yaml.Node, own: yaml.Node, kind: Any) -> yaml.Node:
    """Two nodes of one setting merged; ``own`` has precedence over ``below``.

    Blocks are merged key by key. But if ``own`` chooses another dataclass than ``below``, it replaces the whole block.
    """
    below = as_block(below, kind)
    if kind is None or not (isinstance(below, yaml.MappingNode) and isinstance(own, yaml.MappingNode)):
        return own
    key = choice(kind)
    if key is not None and _differs(child(own, key), child(below, key), default_choice(kind)):
        return own
    pairs = [pair for pair in below.value if child(own, pair[0].value) is None]
    for name, value in own.value:
        old = child(below, name.value)
        pairs.append((name, value if old is None else _merged(old, value, _inner(kind, name.value))))
    return _mapping(pairs, own)


def _differs(chosen: yaml.Node | None, below: yaml.Node | None, default: str | None) -> bool:
    """True if a dataclass is chosen and differs from the one that ``below`` chooses."""
    return chosen is not None and chosen.value != (default if below is None else below.value)


def _set(node: yaml.Node | None, keys: Sequence[str], value: yaml.Node, kind: Any) -> yaml.MappingNode:
    block = None if node is None else as_block(node, kind)
    if not isinstance(block, yaml.MappingNode):
        block = _mapping([], value)
    key, *rest = keys
    pairs = list(block.value)
    at = next((index for index, (name, _) in enumerate(pairs) if name.value == key), len(pairs))
    key_node, old = pairs[at] if at < len(pairs) else (None, None)
    if rest:
        value = _set(old, rest, value, _inner(kind, key))
    pairs[at : at + 1] = [(key_node if key_node and rest else _key(key, value), value)]
    return _mapping(pairs, block)


def setting_names(kind: Any, where: str = "") -> set[str]:
    """The full names of all settings that a block of this type can have, such as ``optim.lr``. Blocks are included."""
    names: set[str] = set()
    for member in members(kind):
        hints = types_of(member)
        for key, inner in ((field.name, hints[field.name]) for field in dataclasses.fields(member)):
            name = f"{where}.{key}" if where else key
            names |= {name, *setting_names(inner, name)}
    return names


def given_places(root: yaml.MappingNode, where: str = "") -> dict[str, str]:
    """The place of each setting in a tree, by its full name, such as ``optim.lr``. Blocks are included."""
    places: dict[str, str] = {}
    for key, value in root.value:
        if isinstance(key, yaml.ScalarNode):
            name = f"{where}.{key.value}" if where else key.value
            places[name] = place(key)
            if isinstance(value, yaml.MappingNode):
                places |= given_places(value, name)
    return places


def _inner(kind: Any, key: Any) -> Any:
    """The type of the setting ``key`` in a block of type ``kind``; None if the block has no such setting."""
    hints = (types_of(member) for member in members(kind))
    return next((found[key] for found in hints if isinstance(key, str) and key in found), None)


def _mapping(pairs: list[tuple[yaml.Node, yaml.Node]], at: yaml.Node) -> yaml.MappingNode:
    return yaml.MappingNode(_MAP, pairs, at.start_mark, at.end_mark)


def _key(name: str, at: yaml.Node) -> yaml.ScalarNode:
    return yaml.ScalarNode(_STR, name, at.start_mark, at.end_mark)


def _asker(node: yaml.Node | None) -> str:
    return f"{place(node)}: base: " if node else ""
