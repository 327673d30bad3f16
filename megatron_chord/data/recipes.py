"""Converts downloaded public data sets to the files that a run reads, and counts what was left out and why.

A recipe reads rows and returns lists of rows in this project's own fields. Every random draw is seeded. Splits have no
common problem. Problems are compared by `data.problems.text_key`.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_chord.data.functions import with_schema_types
from megatron_chord.data.layouts import Reading
from megatron_chord.data.problems import plain_text, text_key
from megatron_chord.data.rows import DataError, Row, RowError, parse_rows, truth_field
from megatron_chord.rewards.answers import last_boxed

Rows = list[dict[str, Any]]
_CJK = re.compile(r"[一-鿿㐀-䶿]")
_CALCULATIONS = re.compile(r"<<[^<>]*>>")
_TOOLACE_PHRASE = "Here is a list of functions in JSON format that you can invoke:"
BFCL_CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
)
"""The categories that CHORD reports."""
_WITHOUT_TRUTHS = ("irrelevance", "live_irrelevance")


@dataclass
class Prepared:
    files: dict[str, Rows] = field(default_factory=dict[str, Rows])
    """The rows of each file, by the file's name without ``.jsonl``."""
    counts: Counter[str] = field(default_factory=Counter[str])
    """Counts of what was read and what was left out, in the order of their first occurrence."""
    notes: list[str] = field(default_factory=list[str])

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.files.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def lines(self) -> list[str]:
        counts = [f"{count:>9,}  {what}" for what, count in self.counts.items()]
        written = [f"{len(rows):>9,}  rows in {name}.jsonl" for name, rows in self.files.items()]
        return [*counts, *written, *self.notes]


def openr1(
    paths: Sequence[Path],
    *,
    num_tokens: Callable[[str], int],
    sft: int = 5000,
    rl: int = 20000,
    max_tokens: int = 8196,
    seed: int = 42,
) -> Prepared:
    """CHORD's mathematics (Trinity-RFT, get_openr1_data.py), from OpenR1-Math-220k.

    A generation is kept when math-verify found it right and it has at most ``max_tokens``. Demonstrations are drawn
    from all problems that have one; RL prompts from the others with two or more of them and a whole number as answer.
    """
    out = Prepared()
    seen: set[bytes] = set()

    def parse(row: Row) -> dict[str, Any] | None:
        fields = row.fields
        out.counts["problems read"] += 1
        problem, marks = fields.get("problem"), fields.get("correctness_math_verify") or []
        if not isinstance(problem, str) or not isinstance(fields.get("generations"), list):
            raise RowError("expected OpenR1's columns `problem` and `generations`")
        if _CJK.search(problem):
            out.counts["left out: Chinese characters in the problem"] += 1
            return None
        right = [i for i, text in enumerate(fields["generations"]) if i < len(marks) and marks[i] and text]
        if not right:
            out.counts["left out: no generation that math-verify found right"] += 1
            return None
        kept = [i for i in right if num_tokens(fields["generations"][i]) <= max_tokens]
        if not kept:
            out.counts[f"left out: every right generation has more than {max_tokens} tokens"] += 1
            return None
        if text_key(problem) in seen:
            out.counts["left out: a duplicate of an earlier problem"] += 1
            return None
        seen.add(text_key(problem))
        return {"at": row.position, "problem": problem, "answer": fields.get("answer"), "kept": kept}

    usable = [row for row in parse_rows(paths, parse) if row is not None]
    draw = random.Random(seed)
    shown = _drawn(draw, usable, sft, out, "demonstrations")
    chosen = {row["at"]: draw.choice(row["kept"]) for row in shown}
    rest = [row for row in usable if row["at"] not in chosen]
    whole = [row for row in rest if is_whole_number(row["answer"])]
    out.counts["not for RL: the answer is not a whole number"] += len(rest) - len(whole)
    several = [row for row in whole if len(row["kept"]) >= 2]
    out.counts["not for RL: fewer than two right generations"] += len(whole) - len(several)
    asked = _drawn(draw, several, rl, out, "RL prompts")

    def text_of(row: Row) -> tuple[str, dict[str, Any]] | None:
        if row.position not in chosen:
            return None
        text = row.fields["generations"][chosen[row.position]]
        return row.position, {"problem": row.fields["problem"], "solution": text}

    texts = dict(found for found in parse_rows(paths, text_of) if found is not None)
    out.files["sft"] = [texts[row["at"]] for row in shown]
    out.files["rl"] = [{"problem": row["problem"], "answer": str(row["answer"]).strip()} for row in asked]
    return out


def toolace(paths: Sequence[Path], *, sft: int = 500, rl: int = 5000, seed: int = 42) -> Prepared:
    """CHORD's tool use (Trinity-RFT, get_toolace_data.py), from Team-ACE/ToolACE: rows whose first reply is a call.

    ToolACE has no reasoning: a stronger model must first answer the rows of ``sft_questions``.
    """
    out = Prepared()
    seen: set[bytes] = set()

    def parse(row: Row) -> dict[str, Any] | None:
        out.counts["dialogues read"] += 1
        try:
            read = toolace_row(row.fields)
        except _Unfit as unfit:
            out.counts[f"left out: {unfit}"] += 1
            return None
        key = text_key(json.dumps([read["messages"], read["tools"]]))
        if key in seen:
            out.counts["left out: a duplicate of an earlier request"] += 1
            return None
        seen.add(key)
        return read

    usable = [row for row in parse_rows(paths, parse) if row is not None]
    draw = random.Random(seed)
    draw.shuffle(usable)
    asked = _first(usable, rl, out, "RL prompts")
    out.files["rl"] = asked
    out.files["sft_questions"] = _first(usable[len(asked) :], sft, out, "demonstrations")
    return out


class _Unfit(Exception):
    """Why a row is left out."""


def toolace_row(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A dialogue's first turn with its true calls. Raises ``_Unfit`` if it has no usable calls."""
    system, turns = fields.get("system"), fields.get("conversations")
    if not isinstance(system, str) or not isinstance(turns, list) or len(turns) < 2:
        raise RowError("expected ToolACE's columns `system` and `conversations`")
    start = system.find(_TOOLACE_PHRASE)
    if start < 0:
        raise _Unfit("no list of functions in the system text")
    start += len(_TOOLACE_PHRASE)
    try:
        tools, _ = json.JSONDecoder().raw_decode(system[start:].lstrip())
    except ValueError:
        raise _Unfit("the list of functions is not JSON") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and "name" in tool for tool in tools):
        raise _Unfit("the list of functions is not one of schemas with names")
    texts = [_text_of(turn, role) for turn, role in zip(turns, ("user", "assistant"), strict=False)]
    if None in texts:
        raise _Unfit("does not begin with a user's request and its reply")
    asked, reply = map(str, texts)
    try:
        calls = read_calls(reply)
    except ValueError:
        raise _Unfit("the first reply is no call") from None
    names = [tool["name"] for tool in tools]
    if {call["name"] for call in calls} - set(names):
        raise _Unfit("calls a function that is not listed")
    if len(set(names)) < len(names):
        raise _Unfit("lists a function twice")
    messages = [
        {"role": "system", "content": system[:start].strip()},
        {"role": "user", "content": asked},
    ]
    return {"messages": messages, "tools": with_schema_types(tools), "answer": calls}


def _text_of(turn: Any, role: str) -> str | None:
    """The text of a turn; None if it is not a turn of ``role``."""
    if not isinstance(turn, dict) or turn.get("from") != role or not isinstance(turn.get("value"), str):
        return None
    return turn["value"]


def read_calls(text: str) -> Rows:
    """Calls written as ``[name(argument=value), ...]``, where names may have spaces. ValueError for any other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError("no list of calls")
    rest, calls = text[1:-1].strip(), []
    while rest:
        name = rest.partition("(")[0]
        end = _closing(rest, len(name))
        if not name.strip() or end is None:
            raise ValueError(f"no call: {rest[:60]}")
        calls.append({"name": name.strip(), "arguments": _arguments(rest[len(name) + 1 : end])})
        rest = rest[end + 1 :].lstrip()
        if rest and not rest.startswith(","):
            raise ValueError(f"expected a comma: {rest[:60]}")
        rest = rest[1:].lstrip()
    if not calls:
        raise ValueError("an empty list")
    return calls


def _arguments(text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no arguments: {error}") from None
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
        raise ValueError("expected named arguments alone")
    return {str(word.arg): _value(word.value) for word in call.keywords}


def _closing(text: str, start: int) -> int | None:
    """The index where the bracket at ``start`` closes. Brackets in quoted texts do not count."""
    depth, quote, at = 0, "", start
    while at < len(text):
        sign = text[at]
        if quote:
            at += sign == "\\"
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return None


def _value(node: ast.expr) -> Any:
    """A literal; JSON's true, false and null; any other bare word as its text. ValueError for anything else."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None}.get(node.id, node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            str(_value(key)): _value(item) for key, item in zip(node.keys, node.values, strict=True) if key
        }
    try:
        value = ast.literal_eval(node)
    except (TypeError, MemoryError, RecursionError) as error:  # a list in a set, say
        raise ValueError(f"no value: {error}") from None
    if not isinstance(value, str | int | float | bool | type(None)):
        raise ValueError(f"no JSON value: {value!r}")
    return value


def gsm8k(paths: Sequence[Path], *, sft: int = 2000, rl: int | None = None, seed: int = 42) -> Prepared:
    """Disjoint demonstrations, without the marks of the calculator, and RL prompts."""
    out = Prepared()

    def parse(row: Row) -> dict[str, Any]:
        out.counts["problems read"] += 1
        question, answer = row.fields.get("question"), row.fields.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            raise RowError("expected GSM8K's columns `question` and `answer` with ####")
        solution = _CALCULATIONS.sub("", answer)
        truth = answer.rsplit("####", 1)[1].strip().replace(",", "")
        return {"problem": question, "solution": solution, "answer": truth}

    return _split(parse_rows(paths, parse), out, sft=sft, rl=rl, seed=seed)


def math(
    paths: Sequence[Path],
    *,
    exclude: Sequence[Path] = (),
    sft: int = 2000,
    rl: int | None = None,
    seed: int = 42,
) -> Prepared:
    """MATH: disjoint demonstrations and RL prompts, whose truth is the last box, without the problems of ``exclude``
    (MATH-500 is a part of MATH's test split)."""
    out = Prepared()
    held_out = {text_key(text) for text in parse_rows(exclude, _problem_text)} if exclude else set[bytes]()

    def parse(row: Row) -> dict[str, Any] | None:
        out.counts["problems read"] += 1
        problem, solution = _problem_text(row), row.fields.get("solution")
        truth = last_boxed(solution) if isinstance(solution, str) else None
        if truth is None:
            out.counts["left out: no box in the solution"] += 1
            return None
        if text_key(problem) in held_out:
            out.counts["left out: held out (--exclude)"] += 1
            return None
        return {"problem": problem, "solution": solution, "answer": truth}

    return _split([row for row in parse_rows(paths, parse) if row], out, sft=sft, rl=rl, seed=seed)


def problems(paths: Sequence[Path], *, url_has: str = "") -> Prepared:
    """An evaluation set of problems and truths (AIME, AMC, MATH-500, Minerva, OlympiadBench), each problem once.

    The ``subject`` of a row (MATH-500 has it) is kept: a suite can then report accuracy by category.

    Args:
        url_has: keep the rows whose ``url`` contains it, such as 2024.
    """
    out = Prepared()
    reading = Reading("prompts")
    seen: Counter[bytes] = Counter()

    def parse(row: Row) -> dict[str, Any] | None:
        out.counts["rows read"] += 1
        if url_has and url_has not in str(row.fields.get("url", "")):
            out.counts[f"left out: no {url_has} in the url"] += 1
            return None
        own = reading.own_row(row)
        problem, truth = _problem_text(own), truth_field(own)
        seen[text_key(problem)] += 1
        if seen[text_key(problem)] > 1:
            out.counts["left out: a duplicate of an earlier problem"] += 1
            return None
        return {"problem": problem, "answer": truth, **_kept(row, "subject")}

    rows = [row for row in parse_rows(paths, parse) if row is not None]
    if not rows:
        raise DataError("no row is left")
    out.files["evaluation"] = [{"id": str(number), **row} for number, row in enumerate(rows)]
    repeats = set(seen.values())
    if len(repeats) == 1 and (k := repeats.pop()) > 1:
        out.notes.append(f"every problem was there {k} times: set evaluation.samples to {k} instead")
    return out


def mmlu_pro(paths: Sequence[Path]) -> Prepared:
    """The options are numbered from 1 in the problem; the truth is the number, as CHORD asks for it.

    The ``category`` of a row is kept: a suite can then report accuracy by category.
    """
    out = Prepared()

    def parse(row: Row) -> dict[str, Any]:
        out.counts["questions read"] += 1
        question, options, index = (row.fields.get(name) for name in ("question", "options", "answer_index"))
        if not isinstance(question, str) or not isinstance(options, list) or not isinstance(index, int):
            raise RowError("expected MMLU-Pro's columns `question`, `options` and `answer_index`")
        if not 0 <= index < len(options):
            raise RowError(f"answer_index {index} is none of {len(options)} options")
        return {
            "id": str(row.fields.get("question_id", row.number)),
            "problem": _with_choices(
                question, [str(number) for number in range(1, len(options) + 1)], options
            ),
            "answer": str(index + 1),
            **_kept(row, "category"),
        }

    out.files["evaluation"] = parse_rows(paths, parse)
    return out


def gpqa(paths: Sequence[Path], *, seed: int = 42) -> Prepared:
    """The four answers get letters, in an order that follows from the seed and the question."""
    out = Prepared()

    def parse(row: Row) -> dict[str, Any]:
        out.counts["questions read"] += 1
        names = ("Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))
        if missing := [name for name in ("Question", *names) if not isinstance(row.fields.get(name), str)]:
            raise RowError(f"expected GPQA's columns, {', '.join(missing)} is missing")
        question, choices = row.fields["Question"].strip(), [row.fields[name].strip() for name in names]
        order = random.Random(f"{seed}/{plain_text(question)}").sample(range(4), 4)
        return {
            "id": str(row.number),
            "problem": _with_choices(question, list("ABCD"), [choices[place] for place in order]),
            "answer": "ABCD"[order.index(0)],
        }

    out.files["evaluation"] = parse_rows(paths, parse)
    return out


def bfcl(folder: Path, *, categories: Sequence[str] = BFCL_CATEGORIES) -> Prepared:
    """Single-turn categories with the truths of ``possible_answer/``; a file for each, and one for all."""
    out = Prepared()
    everything: Rows = []
    for category in categories:
        rows = _bfcl_category(folder, category)
        out.counts[f"rows of {category}"] = len(rows)
        out.files[category] = rows
        everything += rows
    out.files["evaluation"] = everything
    return out


def _bfcl_category(folder: Path, category: str) -> Rows:
    names = [category, category.removesuffix("_python")]  # v3 calls it simple
    found = [path for name in names for path in sorted(folder.glob(f"BFCL_v*_{name}.json"))]
    if not found:
        raise DataError(f"{folder}: no BFCL_v*_{category}.json")
    path, truths = found[0], dict[str, Any]()
    if category not in _WITHOUT_TRUTHS:
        truth_file = path.parent / "possible_answer" / path.name
        truths = {
            row.fields["id"]: row.fields["ground_truth"] for row in parse_rows(truth_file, lambda row: row)
        }

    def parse(row: Row) -> dict[str, Any]:
        identity = row.fields.get("id")
        if category not in _WITHOUT_TRUTHS and identity not in truths:
            raise RowError(f"possible_answer has no truth for {identity!r}")
        joined = {**row.fields, "ground_truth": truths.get(str(identity), [])}
        own = Reading("prompts").own_row(Row(row.position, row.number, joined, row.file)).fields
        return {
            "id": identity,
            **{name: own[name] for name in ("messages", "tools", "ground_truth") if name in own},
        }

    return parse_rows(path, parse)


def is_whole_number(value: Any) -> bool:
    """True if Python's ``int()`` accepts the text, which is the condition of the published script."""
    try:
        int(str(value))
    except ValueError:
        return False
    return True


def _kept(row: Row, name: str) -> dict[str, Any]:
    """A field of the row that is copied unchanged; empty if the row does not have it."""
    return {name: row.fields[name]} if name in row.fields else {}


def _problem_text(row: Row) -> str:
    for name in ("problem", "question", "prompt"):
        if isinstance(text := row.fields.get(name), str):
            return text
    raise RowError("has no problem as text")


def _with_choices(question: str, marks: Sequence[str], choices: Iterable[Any]) -> str:
    listed = "\n".join(f"{mark}. {choice}" for mark, choice in zip(marks, choices, strict=True))
    return f"{question}\n\n{listed}"


def _split(rows: Rows, out: Prepared, *, sft: int, rl: int | None, seed: int) -> Prepared:
    """Split rows without a common problem: ``sft`` demonstrations, and ``rl`` of the others as prompts (None: all)."""
    first: dict[bytes, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(text_key(row["problem"]), row)
    out.counts["left out: a duplicate of an earlier problem"] += len(rows) - len(first)
    shuffled = list(first.values())
    random.Random(seed).shuffle(shuffled)
    shown = _first(shuffled, sft, out, "demonstrations")
    rest = shuffled[len(shown) :]
    asked = rest if rl is None else _first(rest, rl, out, "RL prompts")
    out.files["sft"] = [{"problem": row["problem"], "solution": row["solution"]} for row in shown]
    out.files["rl"] = [{"problem": row["problem"], "answer": row["answer"]} for row in asked]
    return out


def _drawn(draw: random.Random, rows: Rows, count: int, out: Prepared, what: str) -> Rows:
    return draw.sample(_enough(rows, count, out, what), min(count, len(rows)))


def _first(rows: Rows, count: int, out: Prepared, what: str) -> Rows:
    return _enough(rows, count, out, what)[:count]


def _enough(rows: Rows, count: int, out: Prepared, what: str) -> Rows:
    if len(rows) < count:
        out.notes.append(f"only {len(rows)} of {count} {what}: there are no more")
    return rows
