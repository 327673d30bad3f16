"""`megatron-chord settings`: every setting with its default and its meaning, read from config.py itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from megatron_chord import config


def lines(kind: type = config.RunConfig, indent: int = 0) -> Iterator[str]:
    """A YAML-like listing of ``kind`` and the blocks below it. Required settings have no value."""
    margin = " " * indent
    hints, docs = typing.get_type_hints(kind), _field_docs(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        for text in textwrap.wrap(docs.get(field.name, ""), 108 - indent):
            yield f"{margin}# {text}"
        if dataclasses.is_dataclass(inner):
            yield f"{margin}{field.name}:"
            yield from lines(typing.cast(type, inner), indent + 2)
        else:
            yield f"{margin}{field.name}: {_default(field)}".rstrip() + f"  # {_type_name(inner)}"


def _field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    name = ""
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and name:
            docs[name] = " ".join(str(statement.value.value).split())
            name = ""
    return docs


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(typing.get_args(kind))
    if isinstance(kind, type) and not typing.get_args(kind):
        return "path" if kind.__name__ == "Path" else kind.__name__
    return " | ".join(_type_name(part) for part in typing.get_args(kind) if part is not type(None)) or str(
        kind
    )
