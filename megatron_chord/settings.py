"""`megatron-chord settings`: every setting with its default and its meaning, read from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from megatron_chord import config
from megatron_chord.config_nodes import Dumper, choice, members

_WIDTH = 110
_BASE = "A file whose settings hold wherever this one has none; its name is relative to this file's folder."


def lines() -> Iterator[str]:
    """A YAML-like listing of all settings. Required ones have no value; alternatives of one block stand in a row."""
    yield from _comment(_BASE, 0)
    yield "base:  # path, may be left out"
    yield from _block(config.RunConfig, 0)


def _block(kind: type, indent: int, chosen_by: str | None = None) -> Iterator[str]:
    """The settings of one dataclass. ``chosen_by`` is the key that chose it among others, if there were others."""
    margin = " " * indent
    hints, docs = typing.get_type_hints(kind), _field_docs(kind)
    fields = dataclasses.fields(kind)
    for field in sorted(fields, key=lambda field: field.name != chosen_by):
        inner = hints[field.name]
        yield from _comment(docs.get(field.name, ""), indent)
        yield from _comment(_doc(members(inner)[0]) if len(members(inner)) == 1 else "", indent)
        if field.name == chosen_by:
            yield f"{margin}{field.name}: {_type_name(inner)}"
        elif members(inner):
            yield from _sub_block(field, inner, indent)
        else:
            yield f"{margin}{field.name}: {_default(field)}".rstrip() + f"  # {_type_name(inner)}"


def _sub_block(field: dataclasses.Field[Any], kind: Any, indent: int) -> Iterator[str]:
    """A setting that is a block itself, one of several, or perhaps none."""
    margin, blocks, key = " " * indent, members(kind), choice(kind)
    notes = []
    if field.default is None:
        notes.append("or one of these blocks" if len(blocks) > 1 else "or this block")
    elif len(blocks) > 1:
        notes.append("one of these blocks")
        notes.append(f"default: {getattr(field.default_factory(), str(key))}")  # type: ignore[misc]
    if key:
        notes.append(f"a value in place of the block is its {key}")
    note = f"  # {'; '.join(notes)}" if notes else ""
    yield f"{margin}{field.name}:{' null' if field.default is None else ''}{note}"
    for number, block in enumerate(blocks):
        if number:
            yield ""
        yield from _comment(_doc(block) if len(blocks) > 1 else "", indent + 2)
        yield from _block(block, indent + 2, key if len(blocks) > 1 else None)


def _comment(text: str, indent: int) -> Iterator[str]:
    start = f"{' ' * indent}# "
    yield from textwrap.wrap(
        text, _WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
    )


def _definition(kind: type) -> ast.ClassDef:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return definition


def _doc(kind: type) -> str:
    """The docstrings of a dataclass and its private bases, the base first."""
    parts = [base for base in reversed(kind.__mro__) if base is kind or base.__name__.startswith("_")]
    docs = (ast.get_docstring(_definition(part)) or "" for part in parts)
    return " ".join(" ".join(docs).replace("``", "`").split())


def _field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass and of those that it extends."""
    docs: dict[str, str] = {}
    for part in (base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)):
        name = ""
        for statement in _definition(part).body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and name:
                docs[name] = " ".join(str(statement.value.value).replace("``", "`").split())
                name = ""
    return docs


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    return str(yaml.dump(value, Dumper=Dumper, default_flow_style=True)).removesuffix("...\n").strip()


def _type_name(kind: Any) -> str:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(args)
    if typing.get_origin(kind) is dict:
        return f"name: {_type_name(args[1])}"
    if typing.get_origin(kind) is tuple:
        return f"list of {_type_name(args[0])}"
    if args:
        return " | ".join(_type_name(part) for part in args if part is not type(None))
    name: str = kind.__name__
    return {"Path": "path", "str": "text"}.get(name, name)
