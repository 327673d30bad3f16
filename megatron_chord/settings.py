"""`megatron-chord settings`: every setting with its default and its meaning, read from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from megatron_chord import config, peers
from megatron_chord.config_nodes import Dumper, choice, is_list, members, shorthand, types_of

_WIDTH = 110
_BASE = "Another YAML file. Its settings hold where this file has none. The path is relative to this file's folder."

_HEAD = """\
# Settings

Every setting of a run's YAML file, with its default, its unit and its meaning. This page is written by
`megatron-chord settings --markdown` from the dataclasses that read the file; do not edit it by hand.

A block that is left out has its defaults. Some blocks can be one of several. A single value then names the block and
keeps its defaults: `method: luffy`, `token_weight: phi`. On the command line, write the full name of a setting:
`optim.lr=1e-6`. `base: OTHER.yaml` in a file takes all settings that the file does not have from another file.
[methods.md](methods.md) explains the methods and the objective. [running.md](running.md) explains asynchronous sampling
and early stop. [rewards.md](rewards.md) and [data.md](data.md) explain rewards and data.
""".rstrip()
_PEERS_HEAD = """\
## Names in other trainers

This table is for users of verl, TRL, ms-swift or Trinity-RFT. It lists only names that we have read in their
configurations. ms-swift also takes TRL's names.
""".rstrip()


def lines(kind: type = config.RunConfig) -> Iterator[str]:
    """A listing of all settings in the form of YAML. Required settings have no value. If a block can be one of several,
    these are listed one after the other.

    Args:
        kind: the dataclass of a whole file: a run's, or an evaluation suite's.
    """
    yield from _comment(_BASE, 0)
    yield "base:  # path, may be left out"
    yield from _block(kind, 0)


def markdown() -> str:
    """docs/settings.md: a table for each block, and the names of our settings in other trainers."""
    text = [_HEAD, *_tables(config.RunConfig, ""), _PEERS_HEAD]
    rows = [
        (f"`{name}`", *(_code(one) for one in names[:4]), names.note) for name, names in peers.NAMES.items()
    ]
    text.append(_table(("here", "verl", "TRL", "ms-swift", "Trinity-RFT", "difference"), rows))
    return "\n\n".join(text) + "\n"


def _tables(
    kind: type, where: str, chosen_by: str | None = None, others: Sequence[str] = ()
) -> Iterator[str]:
    """The table of one dataclass, then the tables of the blocks in it.

    Args:
        chosen_by: the key that chooses this dataclass among others, if there are others.
        others: further settings whose blocks are the same dataclass.
    """
    hints = types_of(kind)
    title = f"`{where}`" if where else "The run"
    if chosen_by:
        title += f" with `{chosen_by}: {_type_name(hints[chosen_by])}`"
    if others:
        title += f", and the same in {' and '.join(f'`{name}`' for name in others)}"
    yield f"## {title}"
    if where and _doc(kind):
        yield "\n".join(textwrap.wrap(_doc(kind), 120, break_on_hyphens=False))
    yield from _tables_of(kind, _own_fields(kind, chosen_by), where)


def _tables_of(kind: type, chosen: Sequence[dataclasses.Field[Any]], where: str) -> Iterator[str]:
    """The table of some of a dataclass's settings, then the tables of the blocks among them."""
    hints, docs = types_of(kind), _field_docs(kind)
    rows: list[tuple[str, ...]] = []
    for field in chosen:
        inner, name = hints[field.name], f"{where}.{field.name}" if where else field.name
        blocks = members(inner)
        value = _block_name(inner, "see below") if blocks else _type_name(inner).replace(" | ", ", ")
        rows.append(
            (f"`{name}`", _shown_default(field, inner), value + _unit(field.name), docs.get(field.name, ""))
        )
    if rows:
        yield _table(("setting", "default", "value", "meaning"), rows)
    lists: dict[type, list[str]] = {}
    for field in chosen:
        inner, name = hints[field.name], f"{where}.{field.name}" if where else field.name
        yield from _shared_tables(members(inner), name, choice(inner))
        for block in members(inner):
            if is_list(inner):
                lists.setdefault(block, []).append(name)
            else:
                yield from _tables(block, name, choice(inner))
    for block, names in lists.items():
        yield from _tables(block, names[0], others=names[1:])


def _block_name(kind: Any, where: str) -> str:
    """The text that is shown as the value of a block. ``where`` says where its settings are listed."""
    if not is_list(kind):
        return f"a block, {where}"
    paths = "a path, a list of paths, " if shorthand(kind) else ""
    return f"{paths}a block or a list of blocks, {where}"


def _shared_tables(blocks: Sequence[type], where: str, chosen_by: str | None) -> Iterator[str]:
    """The tables of the settings that several dataclasses of a union inherit from a public base."""
    if chosen_by is None:
        return
    bases = {base: None for block in blocks for base in reversed(_public_bases(block))}
    for base in bases:
        fields = _own_fields(base, chosen_by)
        if fields:
            names = [_type_name(types_of(block)[chosen_by]) for block in blocks if issubclass(block, base)]
            yield f"## `{where}` with any `{chosen_by}` of {', '.join(f'`{name}`' for name in names)}"
            yield from _tables_of(base, fields, where)


def _public_bases(kind: type) -> list[type]:
    return [
        base
        for base in kind.__mro__[1:]
        if dataclasses.is_dataclass(base) and not base.__name__.startswith("_")
    ]


def _own_fields(kind: type, chosen_by: str | None) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that are not inherited from a public base."""
    inherited = {field.name for base in _public_bases(kind) for field in dataclasses.fields(base)}
    return [field for field in dataclasses.fields(kind) if field.name not in inherited | {chosen_by}]


def _shown_default(field: dataclasses.Field[Any], kind: Any) -> str:
    if _is_required(field):
        return "**required**"
    if members(kind):
        value = None if field.default is None else field.default_factory()  # type: ignore[misc]
        key = choice(kind)
        return "none" if value is None else f"`{getattr(value, key)}`" if key else ""
    return f"`{_default(field)}`"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unit(name: str) -> str:
    """The unit of a setting, which the end of its name says: ``timeout_s`` is in seconds."""
    endings = {
        "_s": "seconds",
        "_mb": "MiB",
        "_bytes": "bytes",
        "_tokens": "tokens",
        "_tokens_per_gpu": "tokens",
        "_steps": "steps",
    }
    return next((f", {unit}" for ending, unit in endings.items() if name.endswith(ending)), "")


def _code(names: str) -> str:
    return ", ".join(f"`{name.strip()}`" for name in names.split(",") if name.strip())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _block(kind: type, indent: int, chosen_by: str | None = None) -> Iterator[str]:
    """The settings of one dataclass. ``chosen_by`` is the key that chooses it among others, if there are others."""
    margin = " " * indent
    hints, docs = types_of(kind), _field_docs(kind)
    fields = dataclasses.fields(kind)
    listed_as: dict[type, str] = {}
    for field in sorted(fields, key=lambda field: field.name != chosen_by):
        inner = hints[field.name]
        yield from _comment(docs.get(field.name, ""), indent)
        yield from _comment(_doc(members(inner)[0]) if len(members(inner)) == 1 else "", indent)
        if field.name == chosen_by:
            yield f"{margin}{field.name}: {_type_name(inner)}"
        elif is_list(inner) and members(inner):
            (block,) = members(inner)
            value = " null" if field.default is None else ""
            yield f"{margin}{field.name}:{value}  # {_block_name(inner, listed_as.get(block, 'each with'))}"
            if block not in listed_as:
                yield from _block(block, indent + 2)
            listed_as.setdefault(block, f"as {field.name}")
        elif members(inner):
            yield from _sub_block(field, inner, indent)
        else:
            yield f"{margin}{field.name}: {_default(field)}".rstrip() + f"  # {_type_name(inner)}"


def _sub_block(field: dataclasses.Field[Any], kind: Any, indent: int) -> Iterator[str]:
    """The lines of a setting that is a block, one of several blocks, or an optional block."""
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
    """The docstrings of a dataclass and of its private bases, the base first."""
    parts = [base for base in reversed(kind.__mro__) if base is kind or base.__name__.startswith("_")]
    docs = (ast.get_docstring(_definition(part)) or "" for part in parts)
    return " ".join(" ".join(docs).replace("``", "`").split())


def _field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(kind)}
    for part in (base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)):
        name = ""
        for statement in _definition(part).body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id if statement.target.id in names else ""
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
    if blocks := members(args[0]) if typing.get_origin(kind) is tuple else ():
        key = choice(args[0])
        names = [_type_name(types_of(block)[key]) for block in blocks] if key else []
        return f"list of blocks{f' of {key} ' if key else ''}{' | '.join(names)}"
    if typing.get_origin(kind) is tuple:
        return f"list of {_type_name(args[0])}"
    if args:
        return " | ".join(_type_name(part) for part in args if part is not type(None))
    name: str = kind.__name__
    return {"Path": "path", "str": "text", "Any": "any value"}.get(name, name)
