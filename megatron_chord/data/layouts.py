"""Public data layouts: a row as others publish it becomes a row with this project's own fields.

A layout is recognised by its columns. Of several, the one that looks at more columns is taken. Where none looks at all
columns of the others, and they read different rows, the row is refused with the mappings to choose from. A row of no
known layout stays as it is.
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
    FatalRowError,
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
    mapping: Mapping[Role, Mapping[str, str]] = field(default_factory=dict["Role", "Mapping[str, str]"])
    """The ``fields`` in YAML that read it so; ``?`` is messages or problem. None where no mapping can."""


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
            return replace(row, fields=_mapped(row.fields, self.mapping))
        way = self._way(row.fields)
        if way is None or way.convert is None:
            self.unused |= set(row.fields) - OWN_FIELDS
            return row
        if way.name not in self.layouts:
            self.layouts.append(way.name)
        self.unused |= set(row.fields) - way.looks_at - {"id"} - set(TOOL_FIELDS)
        kept = {name: row.fields[name] for name in ("id", *TOOL_FIELDS) if name in row.fields}
        return replace(row, fields={**kept, **way.convert(row.fields)})

    def _way(self, fields: Fields) -> _Way | None:
        """How the row is read; None where nothing is recognised.

        Raises:
            FatalRowError: it can be read in several ways, which give different rows.
        """
        ways = ways_of(fields, self.role)
        if len(ways) < 2:
            return ways[0] if ways else None
        read = [(way, result) for way in ways if (result := way.attempt(fields)) is not None]
        if not read:
            return ways[0]
        first, result = read[0]
        for other, another in read[1:]:
            if result != another:
                raise FatalRowError(
                    f"could be read as {first.name} rows or as {other.name} rows, with different results. Choose in "
                    f"data.{self.role}: {first.choice(self.role, fields, other)} or "
                    f"{other.choice(self.role, fields, first)}"
                )
        return first

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
    overlong: list[Fault] = []

    def parse_own(row: Row) -> T | None:
        parsed = parse(reading.own_row(row))
        if parsed is None:
            overlong.append(Fault(row.position, f"has more than {limits}", row.number))
        return parsed

    rows = parse_rows(data, parse_own, max_dropped=max_dropped, dropped=dropped)
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
        overlong=tuple(overlong),
    )
    return kept, report


def _mapped(fields: Fields, mapping: Mapping[str, str]) -> dict[str, Any]:
    """The values that ``mapping`` leads to. Turns of ``from`` and ``value`` become messages."""
    own = {name: at_path(fields, path) for name, path in mapping.items()}
    messages = own.get("messages")
    if isinstance(messages, list) and all(isinstance(turn, dict) and "from" in turn for turn in messages):
        own |= _sharegpt({"conversations": messages})
    return own


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


@dataclass(frozen=True)
class _Way:
    """One way to read a row for one role."""

    name: str
    has: frozenset[str]
    looks_at: frozenset[str]
    """``has``, and what is read beside it."""
    convert: Callable[[Fields], Fields] | None
    """None: the row has this project's own fields already."""
    mapping: Mapping[str, str] = field(default_factory=dict[str, str])

    def attempt(self, fields: Fields) -> Any:
        """What is asked and the truth or answer, to compare readings; None where the row cannot be read so."""
        try:
            own = dict(fields) if self.convert is None else dict(self.convert(fields))
        except (RowError, TypeError, ValueError, KeyError, IndexError):
            return None
        asked = own.get("messages") or [
            {"role": "user", "content": own[name]} for name in QUESTION_FIELDS if name in own
        ]
        if self.convert is None:
            own = {name: own[name] for name in self.has}
        given = [own[name] for name in (*TRUTH_FIELDS, "solution", "response") if name in own]
        return asked, [str(item).strip() for item in given]

    def choice(self, role: Role, fields: Fields, other: _Way) -> str:
        """What to write to have the row read in this way and not in the ``other``."""
        mapping = {
            ("messages" if isinstance(fields.get(path), list) else "problem") if own == "?" else own: path
            for own, path in self.mapping.items()
        }
        if mapping:
            return f"`fields: {{{', '.join(f'{own}: {path}' for own, path in mapping.items())}}}`"
        return (
            f"a file without the column {', '.join(sorted(other.has - self.looks_at))} for {self.name} rows"
        )


def ways_of(fields: Fields, role: Role) -> list[_Way]:
    """The ways in which a row can be read for ``role``, without those that another one makes more of.

    A way makes more of a row than another when it looks at all columns of the other, and the other does not look at all
    of its own; of two that look at the same columns, the layout that is first in ``LAYOUTS``; own fields come last.
    """
    ways = [way for layout in LAYOUTS if (way := _way_of(layout, fields, role)) is not None]
    own = _own_way(fields, role)
    if own is not None:
        ways.append(own)
    return [
        way
        for place, way in enumerate(ways)
        if not any(
            way.has <= other.looks_at and (not other.has <= way.looks_at or at < place)
            for at, other in enumerate(ways)
            if other is not way
        )
    ]


def _way_of(layout: Layout, fields: Fields, role: Role) -> _Way | None:
    convert = layout.as_prompt if role == "prompts" else layout.as_demonstration
    if convert is None or not layout.has <= fields.keys() or not layout.fits(fields):
        return None
    return _Way(layout.name, layout.has, layout.has | layout.uses, convert, layout.mapping.get(role, {}))


def _own_way(fields: Fields, role: Role) -> _Way | None:
    """The row has this project's own fields for ``role``."""
    questions = [name for name in QUESTION_FIELDS if name in fields]
    if len(questions) != 1 or not isinstance(
        fields[questions[0]], list if questions == ["messages"] else str
    ):
        return None
    answers = TRUTH_FIELDS if role == "prompts" else ("solution", "response")
    given = [name for name in answers if name in fields]
    if role == "demonstrations" and questions == ["messages"]:
        given = ["messages"] if _ends_with_assistant(fields["messages"]) else []
    if len(given) != 1:
        return None
    mapping = {name: name for name in dict.fromkeys((*questions, *given))}
    return _Way(f"own ({', '.join(mapping)})", frozenset(mapping), frozenset(mapping), None, mapping)


def _ends_with_assistant(messages: Any) -> bool:
    last = messages[-1] if messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


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
        mapping={"prompts": {"?": "prompt", "answer": "reward_model.ground_truth"}},
        as_prompt=_verl_prompt,
        as_demonstration=lambda row: _answered(row["prompt"], row["target"], ("prompt", "target")),
    ),
    _layout(
        "verl RL (prompt, reward_model.ground_truth)",
        "prompt",
        "reward_model",
        mapping={
            "prompts": {"?": "prompt", "answer": "reward_model.ground_truth"},
            "demonstrations": {"problem": "extra_info.question", "solution": "extra_info.answer"},
        },
        uses=("extra_info",),
        as_prompt=_verl_prompt,
        as_demonstration=_verl_demonstration,
    ),
    _layout(
        "verl SFT (extra_info.question, extra_info.answer)",
        "extra_info",
        mapping={"demonstrations": {"problem": "extra_info.question", "solution": "extra_info.answer"}},
        fits=_has_inside("extra_info", "question", "answer"),
        as_demonstration=_verl_demonstration,
    ),
    _layout(
        "TRL (prompt, completion)",
        "prompt",
        "completion",
        mapping={"demonstrations": {"problem": "prompt", "solution": "completion"}},
        as_demonstration=lambda row: _answered(row["prompt"], row["completion"], ("prompt", "completion")),
    ),
    _layout(
        "OpenR1-Math (problem, answer, generations)",
        "problem",
        "generations",
        mapping={
            "prompts": {"problem": "problem", "answer": "answer"},
            "demonstrations": {"problem": "problem", "solution": "generations.0"},
        },
        uses=("answer", "messages", "correctness_math_verify", "correctness_llama", "solution"),
        as_prompt=lambda row: {"problem": row["problem"], "answer": row.get("answer")},
        as_demonstration=_correct_generation,
    ),
    _layout(
        "ShareGPT (conversations of from and value)",
        "conversations",
        mapping={"demonstrations": {"messages": "conversations"}},
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
        mapping={"demonstrations": {"problem": "question", "solution": "answer"}},
        fits=lambda row: isinstance(row["answer"], str) and "####" in row["answer"],
        as_prompt=lambda row: {"question": row["question"], "answer": _after_hashes(row)},
        as_demonstration=lambda row: {"question": row["question"], "solution": row["answer"]},
    ),
    _layout(
        "Alpaca (instruction, input, output)",
        "instruction",
        "output",
        mapping={"demonstrations": {"problem": "instruction", "solution": "output"}},
        uses=("input",),
        as_demonstration=_alpaca,
    ),
    _layout(
        "NeMo-RL (problem, expected_answer)",
        "problem",
        "expected_answer",
        mapping={"prompts": {"problem": "problem", "answer": "expected_answer"}},
        uses=("solution",),
        as_prompt=lambda row: {"problem": row["problem"], "answer": row["expected_answer"]},
    ),
    _layout(
        "slime (prompt, label)",
        "prompt",
        "label",
        mapping={"prompts": {"?": "prompt", "answer": "label"}},
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
        mapping={
            "prompts": {"?": "prompt", "answer": "solution"},
            "demonstrations": {"problem": "prompt", "solution": "solution"},
        },
        fits=_has_no_truth,
        as_prompt=lambda row: {**_question(row["prompt"], "prompt"), "answer": _boxed_or_all(row)},
        as_demonstration=lambda row: _answered(row["prompt"], row["solution"], ("prompt", "solution")),
    ),
    _layout(
        "ms-swift GRPO (messages, solution)",
        "messages",
        "solution",
        mapping={"prompts": {"messages": "messages", "answer": "solution"}},
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
