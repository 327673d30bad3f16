"""Converts the functions and true calls of other projects' rows into the forms that `data.tools` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.data.rows import RowError, strict_json

_SCHEMA_TYPES = {
    "dict": "object",
    "float": "number",
    "double": "number",
    "tuple": "array",
    "list": "array",
    "set": "array",
    "any": "string",
    "str": "string",
    "int": "integer",
    "bool": "boolean",
}
"""Python's names of types, as BFCL, ToolACE and xLAM have them -> JSON Schema's."""


def functions_of(value: Any) -> Any:
    """A row's functions: a list, its JSON text, or a list of JSON texts -> a list of schemas; none -> None.

    A wrapping ``{"type": "function", "function": ...}`` is removed, also if it has further keys such as ``strict``. A
    value that is not a list of functions is returned unchanged, and refused later with its row.
    """
    value = _from_json(value)
    if value in (None, "", []):
        return None
    if not isinstance(value, list):
        return value
    items = [_from_json(item) for item in value]
    return [
        item["function"] if isinstance(item, dict) and isinstance(item.get("function"), dict) else item
        for item in items
    ]


def with_schema_types(value: Any) -> Any:
    """``value`` with JSON Schema's names of types in place of Python's, at every ``type`` whose value is a text."""
    if isinstance(value, list):
        return [with_schema_types(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _schema_type(item) if key == "type" and isinstance(item, str) else with_schema_types(item)
        for key, item in value.items()
    }


def with_object_schemas(functions: Any) -> Any:
    """Object schemas of xLAM's functions, whose ``parameters`` map each argument to its description and type.

    An argument is required unless it has a default or its type says ``optional``.
    """
    return [
        _with_object_schema(item) if isinstance(item, dict) else item
        for item in (functions if isinstance(functions, list) else [])
    ] or functions


def calls_of(value: Any) -> Any:
    """True calls as a list of ``{"name", "arguments"}``.

    The input may be a single call, OpenAI's ``tool_calls`` (arguments may be JSON text), or have ``parameters`` in
    place of ``arguments``. Anything else is returned unchanged (BFCL's lists of accepted values).
    """
    value = _from_json(value)
    if isinstance(value, dict):
        value = [value]
    return [_call(item) for item in value] if isinstance(value, list) else value


def _call(item: Any) -> Any:
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        item = item["function"]
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return item
    given = [key for key in ("arguments", "parameters") if key in item]
    if len(given) != 1 or not item.keys() <= {"name", *given, "id", "type"}:
        return item
    return {"name": item["name"], "arguments": _from_json(item[given[0]])}


def _with_object_schema(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    if not isinstance(parameters, dict) or parameters.get("type") in ("object", "dict"):
        return function
    properties, required = {}, []
    for name, about in parameters.items():
        if not isinstance(about, dict):
            return function
        written = str(about.get("type", "any"))
        properties[name] = {**about, "type": written.partition(",")[0].strip()}
        if "optional" not in written and "default" not in about:
            required.append(name)
    return {**function, "parameters": {"type": "object", "properties": properties, "required": required}}


def _schema_type(name: str) -> str:
    plain = name.strip()
    base = plain.partition("[")[0].strip().lower()
    return _SCHEMA_TYPES.get(base, plain)


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value)
    except RowError:
        return value
