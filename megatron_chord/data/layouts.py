"""Public data layouts: a row as others publish it becomes a row with this project's own fields.

A layout is recognised by its columns. If several layouts fit, the one that reads more columns is taken. If none of
them reads all columns of the others, and they give different rows, the row is refused, and the error lists the
mappings to choose from. A row without a known layout is not changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_chord.data.functions import calls_of, functions_of, with_object_schemas, with_schema_types
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
    kind_name,
    parse_rows,
    strict_json,
)
from megatron_chord.rewards.answers import last_boxed

T = TypeVar("T")
Role = Literal["prompts", "demonstrations"]
"""The use of a file: as prompts or as demonstrations. Evaluation sets are prompts."""
Fields = Mapping[str, Any]

OWN_FIELDS = frozenset(
    {*QUESTION_FIELDS, *TOOL_FIELDS, *TRUTH_FIELDS, "id", "system", "solution", "response"}
)
_CHAT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "function_call": "tool_call",
    "tool_call": "tool_call",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""The role of a message (``data.messages``) for each value of ``from`` in ``conversations``."""


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    name: str
    has: frozenset[str]
    """Columns that every row of this layout has."""
    fits: Callable[[Fields], bool] = lambda fields: True
    """A test that distinguishes it from other layouts with the same columns."""
    as_prompt: Callable[[Fields], Fields] | None = None
    """Returns the row's question and truth under this project's names. None: such rows have no truth."""
    as_demonstration: Callable[[Fields], Fields] | None = None
    """Returns the row's question and answer under this project's names. None: such rows have no answer to imitate."""
    uses: frozenset[str] = frozenset()
    """Columns that are read in addition to those of ``has``."""
    mapping: Mapping[Role, Mapping[str, str]] = field(default_factory=dict["Role", "Mapping[str, str]"])
    """For each role, the ``fields`` in YAML that read a row in the same way. ``?`` is messages or problem. A role is
    missing if no ``fields`` can do it."""


def unknown_fields(mapping: Mapping[str, str]) -> str | None:
    """What is wrong with ``fields`` whose keys are not fields of this project, with the nearest known ones; None if all
    are known."""
    unknown = sorted(mapping.keys() - OWN_FIELDS)
    if not unknown:
        return None
    near = [name for key in unknown for name in difflib.get_close_matches(key, OWN_FIELDS, n=1)]
    meant = f" (did you mean {', '.join(near)}?)" if near else ""
    return f"name {', '.join(unknown)}{meant}; known fields: {', '.join(sorted(OWN_FIELDS))}"


@dataclass
class Reading:
    """How the rows of one file were read, for the line at the start of a run."""

    role: Role
    mapping: Mapping[str, str] = field(default_factory=dict[str, str])
    """The dotted path in the row for each of this project's fields. With a mapping no layout is recognised."""
    layouts: list[str] = field(default_factory=list[str])
    """Names of the rows' layouts, other than the project's own, in the order in which they were met."""
    unused: set[str] = field(default_factory=set[str])
    """Fields that were not read in any row."""
    has_nulls: bool = False
    """True if null keys were left out of nested columns."""
    tools_shown: set[str] = field(default_factory=set[str])
    """How the rows' functions are shown (``data.tools.Conversation``); empty for rows without functions."""

    def __post_init__(self) -> None:
        if fault := unknown_fields(self.mapping):
            raise DataError(f"the fields of {self.role} {fault}")

    def own_row(self, row: Row) -> Row:
        """Return ``row`` with this project's fields.

        Raises:
            RowError: its layout has no data for this role, or a value in it has the wrong type.
        """
        if self.mapping:
            used = {path.partition(".")[0] for path in self.mapping.values()}
            self.unused |= set(row.fields) - used
            own = _with_functions(_mapped(row.fields, self.mapping, self.role))
            return replace(row, fields=_with_system(own, self.role))
        if row.has_nulls:
            self.has_nulls = True
        fields = _with_functions(row.fields)
        way = self._way(fields)
        if way is None or way.convert is None:
            self.unused |= set(fields) - OWN_FIELDS
            return replace(row, fields=_with_system(fields, self.role))
        if way.name not in self.layouts:
            self.layouts.append(way.name)
        self.unused |= set(fields) - way.looks_at - {"id", "system"} - set(TOOL_FIELDS)
        kept = {name: fields[name] for name in ("id", *TOOL_FIELDS) if name in fields}
        own = {**kept, **way.converted(fields)}
        if "system" in fields and "system" not in way.looks_at:
            own = _with_system({**own, "system": fields["system"]}, self.role)
        return replace(row, fields={name: value for name, value in own.items() if value is not None})

    def _way(self, fields: Fields) -> _Way | None:
        """Return the way in which the row is read. Return None if no layout is recognised.

        Raises:
            FatalRowError: it can be read in several ways, which give different rows.
        """
        for refused in REFUSED:
            if refused.has <= fields.keys():
                raise FatalRowError(f"is a row of {refused.name}: {refused.reason}")
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
        if self.has_nulls:
            parts.append("keys that are null inside nested columns were left out")
        return "; ".join(parts)


def load_rows(
    data: Path | Sequence[Path],
    reading: Reading,
    parse: Callable[[Row], Any],
    spread: Callable[[Any], Any],
    keep: Callable[[Any], T | None],
    *,
    limits: str,
    max_dropped: float,
) -> tuple[list[T], LoadReport]:
    """Parse the rows (``rows.parse_rows``) after converting them to this project's fields.

    Over-long rows, for which the parser returns None, are left out.

    Raises:
        DataError: as for ``parse_rows``; or all rows are longer than ``limits``.
    """
    dropped: list[Fault] = []
    overlong: list[Fault] = []

    def parse_own(row: Row) -> tuple[Row, Any]:
        return row, parse(replace(reading.own_row(row), given=row.fields))

    def keep_own(parsed: tuple[Row, Any]) -> T | None:
        row, kept = parsed[0], keep(parsed[1])
        if kept is None:
            overlong.append(Fault(row.position, f"has more than {limits}", row.number))
        return kept

    rows = parse_rows(
        data,
        parse_own,
        spread=lambda parsed: (parsed[0], spread(parsed[1])),
        keep=keep_own,
        max_dropped=max_dropped,
        dropped=dropped,
    )
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
        tools_shown=frozenset(reading.tools_shown - {""}),
    )
    return kept, report


def _with_functions(fields: Fields) -> dict[str, Any]:
    """Return ``fields`` with the functions as a list of schemas, or without functions if the list is empty."""
    own = dict(fields)
    if "tool_defs" in own and "tools" not in own:
        own["tools"] = own.pop("tool_defs")
    for name in TOOL_FIELDS:
        if name in own and (functions := functions_of(own.pop(name))) is not None:
            own[name] = functions
    return own


def _with_system(fields: Fields, role: Role) -> Fields:
    """Return the row with its column `system` as the system message."""
    system = fields.get("system")
    own = {name: value for name, value in fields.items() if name != "system"}
    if system is None:
        return fields
    if not isinstance(system, str):
        raise RowError(f"`system` must be a text, got {type(system).__name__}")
    if not system.strip():
        return own
    message = {"role": "system", "content": system}
    messages = own.get("messages")
    if isinstance(messages, list):
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if first.get("role") != "system":
            return {**own, "messages": [message, *messages]}
        if first.get("content") != system:
            raise RowError("has a `system` column and another system message in `messages`")
        return own
    questions = [name for name in QUESTION_FIELDS if name in own]
    if len(questions) != 1:
        return own
    asked = {"role": "user", "content": own.pop(questions[0])}
    answers = [name for name in ("solution", "response") if name in own] if role == "demonstrations" else []
    answered = [{"role": "assistant", "content": own.pop(answers[0])}] if len(answers) == 1 else []
    return {**own, "messages": [message, asked, *answered]}


def _mapped(fields: Fields, mapping: Mapping[str, str], role: Role) -> dict[str, Any]:
    """Return the values at the paths of ``mapping``. Turns with ``from`` and ``value`` become messages.

    In a demonstration, the question and the answer may each be a chat or a text.
    """
    own = {name: at_path(fields, path) for name, path in mapping.items()}
    messages = own.get("messages")
    if isinstance(messages, list) and all(isinstance(turn, dict) and "from" in turn for turn in messages):
        own |= _sharegpt({"conversations": messages})
    questions = [name for name in QUESTION_FIELDS if name in own]
    answers = [name for name in ("solution", "response") if name in own]
    if role == "demonstrations" and len(questions) == len(answers) == 1:
        names = (mapping[questions[0]], mapping[answers[0]])
        own |= _answered(own.pop(questions[0]), own.pop(answers[0]), names)
    return {name: value for name, value in own.items() if value is not None}


def at_path(fields: Fields, path: str) -> Any:
    """The value at a dotted path of names and list indices (from 0). JSON text along the path is parsed.

    Raises:
        RowError: the path does not exist. The message has the part that exists.
    """
    value: Any = fields
    done: list[str] = []
    for key in path.split("."):
        if isinstance(value, str):
            try:
                value = strict_json(value)
            except RowError as error:
                raise RowError(f"`{path}`: `{'.'.join(done)}` is a text that is not JSON: {error}") from None
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
    """The columns of ``has``, and all other columns that the layout reads."""
    convert: Callable[[Fields], Fields] | None
    """Converts a row to this project's fields. None: the row already has them."""
    mapping: Mapping[str, str] = field(default_factory=dict[str, str])

    def converted(self, fields: Fields) -> dict[str, Any]:
        """The row in this project's fields.

        Raises:
            RowError: a field that the layout needs is missing, or its value has the wrong type.
        """
        if self.convert is None:
            return dict(fields)
        try:
            return dict(self.convert(fields))
        except RowError:
            raise
        except KeyError as error:
            raise RowError(f"read as {self.name} rows: field missing or null: `{error.args[0]}`") from None
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            kinds = [f"`{name}` is {kind_name(fields[name])}" for name in sorted(self.looks_at & set(fields))]
            raise RowError(f"cannot be read as {self.name} rows, where {', '.join(kinds)}: {error}") from None

    def attempt(self, fields: Fields) -> Any:
        """The question and the truth or answer, for comparing readings; None if the row cannot be read in this way."""
        try:
            own = self.converted(fields)
        except RowError:
            return None
        asked = own.get("messages") or [
            {"role": "user", "content": own[name]} for name in QUESTION_FIELDS if name in own
        ]
        if self.convert is None:
            own = {name: own[name] for name in self.has}
        given = [own[name] for name in (*TRUTH_FIELDS, "solution", "response") if name in own]
        return asked, [str(item).strip() for item in given]

    def choice(self, role: Role, fields: Fields, other: _Way) -> str:
        """Return the mapping to write in YAML so that the row is read in this way and not in the ``other``."""
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
    """The ways in which a row can be read for ``role``, without those that read only a part of another way's columns.

    Of two ways that read the same columns, the layout that is first in ``LAYOUTS`` is kept. This project's own fields
    come last.
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


def _way_of(layout: RowLayout, fields: Fields, role: Role) -> _Way | None:
    convert = layout.as_prompt if role == "prompts" else layout.as_demonstration
    if convert is None or not layout.has <= fields.keys() or not layout.fits(fields):
        return None
    return _Way(layout.name, layout.has, layout.has | layout.uses, convert, layout.mapping.get(role, {}))


def _own_way(fields: Fields, role: Role) -> _Way | None:
    """Return the way to read a row that already has this project's own fields for ``role``."""
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
    """Return the fields of a question that is a chat or a text."""
    if isinstance(value, list):
        return {"messages": value}
    if isinstance(value, str):
        return {"problem": value}
    raise RowError(f"`{name}` must be a text or a list of messages, got {type(value).__name__}")


def _answered(question: Any, answer: Any, names: tuple[str, str]) -> dict[str, Any]:
    """Return the fields of a demonstration: a question and its answer, each a chat or a text."""
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
    """Return ``fields[column][key]``. The column may also be JSON text."""
    value = fields.get(column)
    if isinstance(value, str):
        try:
            value = strict_json(value)
        except RowError as error:
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
    """Return verl's truth. If it is a list (or a NumPy array), it must have one entry."""
    return _one_truth(_inside(fields, "reward_model", "ground_truth"), "reward_model.ground_truth")


def _one_truth(value: Any, name: str) -> Any:
    """Return a truth that may be a list of one entry, or the JSON text of such a list (Skywork-OR1)."""
    if isinstance(value, str) and value.startswith('["'):
        try:
            value = strict_json(value)
        except RowError:
            return value
    if isinstance(value, list):
        if len(value) != 1:
            raise RowError(f"`{name}` lists {len(value)} truths, expected one")
        return value[0]
    return value


def _after_hashes(fields: Fields) -> str:
    """Return GSM8K's final number without thousands separators."""
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
    """Return the answer to `prompt`, which RL shows too. `extra_info.question` may lack an instruction, so it is not
    used."""
    return _answered(
        fields["prompt"], _inside(fields, "extra_info", "answer"), ("prompt", "extra_info.answer")
    )


def _verl_sft(fields: Fields) -> dict[str, Any]:
    return {
        "problem": _inside(fields, "extra_info", "question"),
        "solution": _inside(fields, "extra_info", "answer"),
    }


def _has_no_truth(fields: Fields) -> bool:
    return not any(name in fields for name in TRUTH_FIELDS)


def _boxed_or_all(fields: Fields) -> Any:
    """Return the truth in the `solution` of TRL and ms-swift: the content of its box if it has one, else the whole
    text."""
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
    # Hermes' system message already shows the functions.
    shown = bool(messages) and messages[0]["role"] == "system" and "<tools>" in messages[0]["content"]
    return {"messages": messages, **({"tools": None} if shown else {})}


def _toolace(fields: Fields) -> dict[str, Any]:
    read = _sharegpt({"system": fields["raw_system"].rstrip(), "conversations": fields["conversations"]})
    return {
        **read,
        "tools": with_schema_types(fields.get("tools")),
        "answer": calls_of(fields.get("answer")),
    }


def _bfcl(fields: Fields) -> dict[str, Any]:
    if len(fields["question"]) != 1:
        raise RowError(f"`question` has {len(fields['question'])} turns; only BFCL rows of one turn are read")
    if fields.get("ground_truth") is None:
        raise RowError(
            "BFCL keeps the truths in possible_answer/ (tools/prepare.py bfcl joins them); this row has none"
        )
    functions = with_schema_types(functions_of(fields["function"]))
    return {"messages": fields["question"][0], "tools": functions, "ground_truth": fields["ground_truth"]}


def _xlam(fields: Fields) -> dict[str, Any]:
    functions = with_schema_types(with_object_schemas(fields["tools"]))
    return {"problem": fields["query"], "tools": functions, "answer": calls_of(fields["answers"])}


def _open_instruct(fields: Fields) -> dict[str, Any]:
    """Return the messages without a last turn of the assistant. The layout's `tools` are only names and are not
    used."""
    messages = fields["messages"]
    if _ends_with_assistant(messages):
        messages = messages[:-1]
    return {"messages": messages, "answer": _one_truth(fields["ground_truth"], "ground_truth"), "tools": None}


def _nemo_chat(fields: Fields) -> dict[str, Any]:
    if not _ends_with_assistant(fields["messages"]):
        raise RowError("`messages` of NeMo-RL end with the truth, as a turn of the assistant")
    return {"messages": fields["messages"][:-1], "answer": fields["messages"][-1]["content"]}


def _numina15(fields: Fields) -> dict[str, Any]:
    if fields["answer"] in ("proof", "notfound"):
        raise RowError(f"`answer` is {fields['answer']!r}, which is no truth")
    return {"problem": fields["problem"], "answer": fields["answer"]}


def _olympiad(fields: Fields) -> dict[str, Any]:
    """Return the row's fields. The context is put before the question, and several final answers become one list."""
    answers = fields["final_answer"]
    if not isinstance(answers, list) or not answers:
        raise RowError("`final_answer` must be a list of answers")
    parts = [fields.get("context"), fields["question"]]
    return {
        "problem": "\n\n".join(part for part in parts if part),
        "answer": ", ".join(str(answer) for answer in answers),
    }


def _swift(fields: Fields) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for turn in fields.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("`history` must be a list of [query, response]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = {"role": "user", "content": fields["query"]}
    return {"messages": [*messages, asked, {"role": "assistant", "content": fields["response"]}]}


def _correct_generation(fields: Fields) -> dict[str, Any]:
    """Return the first answer that math-verify found right. If there is none, return the first that `correctness_llama`
    found right."""
    if not isinstance(fields["generations"], list):
        raise RowError(f"`generations` must be a list of texts, got {kind_name(fields['generations'])}")
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


def _layout(name: str, *columns: str, **settings: Any) -> RowLayout:
    uses = frozenset(settings.pop("uses", ()))
    return RowLayout(name=name, has=frozenset(columns), uses=uses, **settings)


@dataclass(frozen=True)
class RefusedLayout:
    """Rows that look usable but are not."""

    name: str
    has: frozenset[str]
    reason: str


REFUSED = (
    RefusedLayout(
        "BFCL's multi-turn, memory or web search files",
        frozenset({"question", "involved_classes"}),
        "their truths are states of a simulated system, which nothing here runs",
    ),
    RefusedLayout(
        "multiple choice (options)",
        frozenset({"question", "options", "answer"}),
        "the options would be lost; tools/prepare.py mmlu_pro writes them into the question",
    ),
    RefusedLayout(
        "GPQA",
        frozenset({"Question", "Correct Answer"}),
        "tools/prepare.py gpqa writes and shuffles the choices",
    ),
    RefusedLayout(
        "preference data (chosen, rejected)",
        frozenset({"chosen", "rejected"}),
        "no method here reads pairs from a file",
    ),
)

LAYOUTS: tuple[RowLayout, ...] = (
    _layout(
        "Trinity ToolACE (raw_system, tools, conversations, answer)",
        "raw_system",
        "conversations",
        uses=("tools", "answer"),
        fits=lambda row: isinstance(row["raw_system"], str) and isinstance(row["conversations"], list),
        as_prompt=_toolace,
    ),
    _layout(
        "BFCL (question as turns, function, ground_truth)",
        "question",
        "function",
        uses=("ground_truth",),
        fits=lambda row: isinstance(row["question"], list),
        as_prompt=_bfcl,
    ),
    _layout(
        "xLAM (query, tools, answers)",
        "query",
        "answers",
        "tools",
        as_prompt=_xlam,
    ),
    _layout(
        "open-instruct (messages, ground_truth, dataset)",
        "messages",
        "ground_truth",
        "dataset",
        uses=("tools",),
        as_prompt=_open_instruct,
    ),
    _layout(
        "DeepMath (question, final_answer, r1_solution_1)",
        "question",
        "final_answer",
        "r1_solution_1",
        mapping={
            "prompts": {"problem": "question", "answer": "final_answer"},
            "demonstrations": {"problem": "question", "solution": "r1_solution_1"},
        },
        as_prompt=lambda row: {"problem": row["question"], "answer": row["final_answer"]},
        as_demonstration=lambda row: {"problem": row["question"], "solution": row["r1_solution_1"]},
    ),
    _layout(
        "OlympiadBench (context, question, final_answer)",
        "question",
        "final_answer",
        uses=("context", "solution"),
        fits=lambda row: isinstance(row["final_answer"], list),
        as_prompt=_olympiad,
    ),
    _layout(
        "NuminaMath-1.5 (problem, answer, solution)",
        "problem",
        "answer",
        "problem_is_valid",
        uses=("solution",),
        mapping={"prompts": {"problem": "problem", "answer": "answer"}},
        as_prompt=_numina15,
        as_demonstration=lambda row: {"problem": row["problem"], "solution": row["solution"]},
    ),
    _layout(
        "AIME (Problem, Answer, Solution)",
        "Problem",
        "Answer",
        uses=("Solution", "ID"),
        mapping={"prompts": {"problem": "Problem", "answer": "Answer"}},
        as_prompt=lambda row: {"problem": row["Problem"], "answer": row["Answer"]},
        as_demonstration=lambda row: {"problem": row["Problem"], "solution": row["Solution"]},
    ),
    _layout(
        "NeMo-RL chat (messages that end with the truth, task_name)",
        "messages",
        "task_name",
        as_prompt=_nemo_chat,
    ),
    _layout(
        "NeMo-RL (input, output)",
        "input",
        "output",
        mapping={
            "prompts": {"problem": "input", "answer": "output"},
            "demonstrations": {"problem": "input", "solution": "output"},
        },
        fits=lambda row: "instruction" not in row,
        as_prompt=lambda row: {"problem": row["input"], "answer": row["output"]},
        as_demonstration=lambda row: {"problem": row["input"], "solution": row["output"]},
    ),
    _layout(
        "OpenRLHF (input, label)",
        "input",
        "label",
        mapping={"prompts": {"problem": "input", "answer": "label"}},
        as_prompt=lambda row: {**_question(row["input"], "input"), "answer": row["label"]},
    ),
    _layout(
        "ms-swift (query, response, history)",
        "query",
        "response",
        uses=("history",),
        mapping={"demonstrations": {"problem": "query", "solution": "response"}},
        as_demonstration=_swift,
    ),
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
            "demonstrations": {"?": "prompt", "solution": "extra_info.answer"},
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
        as_demonstration=_verl_sft,
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
