"""Public data layouts: a row as others publish it becomes a row with this project's own fields.

A layout is recognised by its columns alone. The first layout of ``LAYOUTS`` whose columns the row has is taken, so a
layout stands before those that have fewer columns. A row of no known layout stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_chord.data.rows import (
    QUESTION_FIELDS,
    TOOL_FIELDS,
    TRUTH_FIELDS,
    DataError,
    Fault,
    LoadReport,
    Row,
    RowError,
    called,
    parse_rows,
)
from megatron_chord.rewards.answers import last_boxed

T = TypeVar("T")
Role = Literal["prompts", "demonstrations"]
"""What a file is read for. Evaluation sets are prompts."""
Fields = Mapping[str, Any]

OWN_FIELDS = frozenset({*QUESTION_FIELDS, *TOOL_FIELDS, *TRUTH_FIELDS, "id", "solution", "response"})
_CHAT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    name: str
    has: frozenset[str]
    """Columns that each of its rows has."""
    fits: Callable[[Fields], bool] = lambda fields: True
    """What tells it from other layouts with the same columns."""
    as_prompt: Callable[[Fields], Fields] | None = None
    """The row's question and truth under this project's names; None: such rows have no truth."""
    as_demonstration: Callable[[Fields], Fields] | None = None
    """The row's question and answer under this project's names; None: such rows have no answer to imitate."""
    uses: frozenset[str] = frozenset()
    """Columns that are read beside those of ``has``."""


@dataclass
class Reading:
    """How the rows of one file were read, for the line at the start of a run."""

    role: Role
    mapping: Mapping[str, str] = field(default_factory=dict[str, str])
    """Own field -> where the row has it, as a dotted path; in place of a recognised layout."""
    layouts: list[str] = field(default_factory=list[str])
    """Names of the rows' layouts, other than the project's own, in the order in which they were met."""
    unused: set[str] = field(default_factory=set[str])
    """Fields that no row's reading looked at."""

    def __post_init__(self) -> None:
        if unknown := sorted(self.mapping.keys() - OWN_FIELDS):
            known = ", ".join(sorted(OWN_FIELDS))
            raise DataError(f"the fields of {self.role} name {', '.join(unknown)}; known fields: {known}")

    def own_row(self, row: Row) -> Row:
        """``row`` with this project's fields.

        Raises:
            RowError: its layout has nothing for this role, or a value in it is of the wrong kind.
        """
        if self.mapping:
            used = {path.partition(".")[0] for path in self.mapping.values()}
            self.unused |= set(row.fields) - used
            return replace(
                row, fields={name: at_path(row.fields, path) for name, path in self.mapping.items()}
            )
        layout = recognised(row.fields)
        convert = None
        if layout is not None:
            convert = layout.as_prompt if self.role == "prompts" else layout.as_demonstration
        if layout is None or convert is None:
            self.unused |= set(row.fields) - OWN_FIELDS
            return row
        if layout.name not in self.layouts:
            self.layouts.append(layout.name)
        self.unused |= set(row.fields) - layout.has - layout.uses - {"id"} - set(TOOL_FIELDS)
        kept = {name: row.fields[name] for name in ("id", *TOOL_FIELDS) if name in row.fields}
        return replace(row, fields={**kept, **convert(row.fields)})

    def __str__(self) -> str:
        parts = [f"read as {name} rows" for name in self.layouts]
        if self.unused:
            parts.append(f"not used: {', '.join(sorted(self.unused))}")
        return "; ".join(parts)


def load_rows(
    data: Path | Sequence[Path],
    reading: Reading,
    parse: Callable[[Row], T | None],
    *,
    limits: str,
    max_dropped: float,
) -> tuple[list[T], LoadReport]:
    """``parse`` of every row in this project's fields, without those for which it is None: they are over-long.

    Raises:
        DataError: as ``parse_rows``; or all rows are over-long, beyond ``limits``.
    """
    dropped: list[Fault] = []
    rows = parse_rows(data, lambda row: parse(reading.own_row(row)), max_dropped=max_dropped, dropped=dropped)
    kept = [row for row in rows if row is not None]
    if not kept:
        raise DataError(f"{called(data)}: all {len(rows)} {reading.role} have more than {limits}")
    report = LoadReport(
        data=called(data),
        num_rows=len(rows) + len(dropped),
        num_kept=len(kept),
        num_overlong=len(rows) - len(kept),
        reading=str(reading),
        dropped=tuple(dropped),
    )
    return kept, report


def at_path(fields: Fields, path: str) -> Any:
    """The value at a dotted path: names of objects, places of lists (from 0), and JSON text on the way is read.

    Raises:
        RowError: naming how far the path leads.
    """
    value: Any = fields
    done: list[str] = []
    for key in path.split("."):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise RowError(f"`{path}`: `{'.'.join(done)}` is a text that is not JSON") from None
        if isinstance(value, Mapping) and value.get(key) is not None:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            where = f"`{'.'.join(done)}`" if done else "the row"
            raise RowError(f"`{path}`: {where} has no `{key}`")
        done.append(key)
    return value


def recognised(fields: Fields) -> Layout | None:
    """The row's layout; None for one that is in the project's own, or in none that is known."""
    return next(
        (layout for layout in LAYOUTS if layout.has <= fields.keys() and layout.fits(fields)),
        None,
    )


def _question(value: Any, name: str) -> dict[str, Any]:
    """A question that may be a chat or a text."""
    if isinstance(value, list):
        return {"messages": value}
    if isinstance(value, str):
        return {"problem": value}
    raise RowError(f"`{name}` must be a text or a list of messages, got {type(value).__name__}")


def _answered(question: Any, answer: Any, names: tuple[str, str]) -> dict[str, Any]:
    """A demonstration of a question and its answer, each a chat or a text."""
    asked = _question(question, names[0])
    if isinstance(answer, str):
        if "problem" in asked:
            return {**asked, "solution": answer}
        return {"messages": [*asked["messages"], {"role": "assistant", "content": answer}]}
    if not isinstance(answer, list):
        raise RowError(f"`{names[1]}` must be a text or a list of messages, got {type(answer).__name__}")
    messages = asked.get("messages") or [{"role": "user", "content": asked["problem"]}]
    return {"messages": [*messages, *answer]}


def _inside(fields: Fields, column: str, key: str) -> Any:
    """``fields[column][key]``, where the column may also be JSON text."""
    value = fields.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"`{column}` is a text that is not JSON: {error}") from None
    if not isinstance(value, dict) or value.get(key) is None:
        raise RowError(f"`{column}` must be an object with `{key}`, got {type(value).__name__}")
    return value[key]


def _has_inside(column: str, *keys: str) -> Callable[[Fields], bool]:
    def fits(fields: Fields) -> bool:
        try:
            return all(_inside(fields, column, key) is not None for key in keys)
        except RowError:
            return False

    return fits


def _ground_truth(fields: Fields) -> Any:
    """verl's truth; one that is a list (also of a NumPy array) must have one entry."""
    value = _inside(fields, "reward_model", "ground_truth")
    if isinstance(value, list):
        if len(value) != 1:
            raise RowError(f"`reward_model.ground_truth` lists {len(value)} truths, expected one")
        return value[0]
    return value


def _after_hashes(fields: Fields) -> str:
    """GSM8K's final number, without the commas between its thousands."""
    return str(fields["answer"]).rsplit("####", 1)[1].strip().replace(",", "")


def _boxed_problem(fields: Fields) -> dict[str, Any]:
    text = fields["solution"]
    found = last_boxed(text) if isinstance(text, str) else None
    if found is None:
        raise RowError("`solution` has no \\boxed{} to take the truth from")
    return {"problem": fields["problem"], "answer": found}


def _verl_prompt(fields: Fields) -> dict[str, Any]:
    return {**_question(fields["prompt"], "prompt"), "answer": _ground_truth(fields)}


def _verl_demonstration(fields: Fields) -> dict[str, Any]:
    return {
        "problem": _inside(fields, "extra_info", "question"),
        "solution": _inside(fields, "extra_info", "answer"),
    }


def _has_no_truth(fields: Fields) -> bool:
    return not any(name in fields for name in TRUTH_FIELDS)


def _boxed_or_all(fields: Fields) -> Any:
    """A truth that TRL and ms-swift give as `solution`: its box where it has one, else all of it."""
    text = fields["solution"]
    return (last_boxed(text) if isinstance(text, str) else None) or text


def _sharegpt(fields: Fields) -> dict[str, Any]:
    messages = []
    for index, turn in enumerate(fields["conversations"]):
        role = _CHAT_ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise RowError(
                f"conversations[{index}] must have `from` ({', '.join(_CHAT_ROLES)}) and `value`, a text"
            )
        messages.append({"role": role, "content": turn["value"]})
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def _correct_generation(fields: Fields) -> dict[str, Any]:
    """The first answer that math-verify found right, or else the judge of `correctness_llama`."""
    for column in ("correctness_math_verify", "correctness_llama"):
        marks = fields.get(column) or []
        for generation, is_right in zip(fields["generations"], marks, strict=False):
            if is_right:
                return {"problem": fields["problem"], "solution": generation}
    raise RowError("none of its `generations` is marked as correct")


def _alpaca(fields: Fields) -> dict[str, Any]:
    more = fields.get("input")
    problem = fields["instruction"]
    if isinstance(more, str) and more.strip():
        problem = f"{problem}\n\n{more}"
    return {"problem": problem, "solution": fields["output"]}


def _layout(name: str, *columns: str, **settings: Any) -> Layout:
    uses = frozenset(settings.pop("uses", ()))
    return Layout(name=name, has=frozenset(columns), uses=uses, **settings)


LAYOUTS: tuple[Layout, ...] = (
    _layout(
        "LUFFY (prompt, target, reward_model.ground_truth)",
        "prompt",
        "target",
        "reward_model",
        as_prompt=_verl_prompt,
        as_demonstration=lambda row: _answered(row["prompt"], row["target"], ("prompt", "target")),
    ),
    _layout(
        "verl RL (prompt, reward_model.ground_truth)",
        "prompt",
        "reward_model",
        uses=("extra_info",),
        as_prompt=_verl_prompt,
        as_demonstration=_verl_demonstration,
    ),
    _layout(
        "verl SFT (extra_info.question, extra_info.answer)",
        "extra_info",
        fits=_has_inside("extra_info", "question", "answer"),
        as_demonstration=_verl_demonstration,
    ),
    _layout(
        "TRL (prompt, completion)",
        "prompt",
        "completion",
        as_demonstration=lambda row: _answered(row["prompt"], row["completion"], ("prompt", "completion")),
    ),
    _layout(
        "OpenR1-Math (problem, answer, generations)",
        "problem",
        "generations",
        uses=("answer", "messages", "correctness_math_verify", "correctness_llama", "solution"),
        as_prompt=lambda row: {"problem": row["problem"], "answer": row.get("answer")},
        as_demonstration=_correct_generation,
    ),
    _layout(
        "ShareGPT (conversations of from and value)",
        "conversations",
        uses=("system", "answer"),
        fits=lambda row: isinstance(row["conversations"], list),
        as_prompt=lambda row: {
            **_sharegpt(row),
            **({"answer": row["answer"]} if "answer" in row else {}),
        },
        as_demonstration=_sharegpt,
    ),
    _layout(
        "GSM8K (question, answer with ####)",
        "question",
        "answer",
        fits=lambda row: isinstance(row["answer"], str) and "####" in row["answer"],
        as_prompt=lambda row: {"question": row["question"], "answer": _after_hashes(row)},
        as_demonstration=lambda row: {"question": row["question"], "solution": row["answer"]},
    ),
    _layout(
        "Alpaca (instruction, input, output)",
        "instruction",
        "output",
        uses=("input",),
        as_demonstration=_alpaca,
    ),
    _layout(
        "NeMo-RL (problem, expected_answer)",
        "problem",
        "expected_answer",
        uses=("solution",),
        as_prompt=lambda row: {"problem": row["problem"], "answer": row["expected_answer"]},
    ),
    _layout(
        "slime (prompt, label)",
        "prompt",
        "label",
        as_prompt=lambda row: {**_question(row["prompt"], "prompt"), "answer": row["label"]},
    ),
    _layout(
        "NuminaMath (problem, solution, messages)",
        "problem",
        "solution",
        "messages",
        as_prompt=_boxed_problem,
        as_demonstration=lambda row: {"problem": row["problem"], "solution": row["solution"]},
    ),
    _layout(
        "MATH (problem, solution with \\boxed)",
        "problem",
        "solution",
        fits=_has_no_truth,
        as_prompt=_boxed_problem,
    ),
    _layout(
        "TRL GRPO (prompt, solution)",
        "prompt",
        "solution",
        fits=_has_no_truth,
        as_prompt=lambda row: {**_question(row["prompt"], "prompt"), "answer": _boxed_or_all(row)},
        as_demonstration=lambda row: _answered(row["prompt"], row["solution"], ("prompt", "solution")),
    ),
    _layout(
        "ms-swift GRPO (messages, solution)",
        "messages",
        "solution",
        fits=_has_no_truth,
        as_prompt=lambda row: {"messages": row["messages"], "answer": _boxed_or_all(row)},
    ),
    _layout(
        "chat prompts (prompt as a list of messages)",
        "prompt",
        uses=TRUTH_FIELDS,
        fits=lambda row: isinstance(row["prompt"], list),
        as_prompt=lambda row: {
            "messages": row["prompt"],
            **{name: row[name] for name in TRUTH_FIELDS if name in row},
        },
    ),
)
