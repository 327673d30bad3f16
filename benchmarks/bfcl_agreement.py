"""Compare the tool-call grader with BFCL's own checker (bfcl-eval 2026.3.23) on BFCL's single-turn Python categories.

For each row, replies that are right and replies that are wrong in one way (another name, a value changed, an argument
left out or added, a type changed, a call twice, prose, ...) are graded by both. The two must agree, except for the
kinds of `REASONS`. The package needs another NumPy than this project, so it is installed in a folder of its own:

    pip install --no-deps --target FOLDER bfcl-eval==2026.3.23
    python benchmarks/bfcl_agreement.py FOLDER          # 1 minute; make test puts the package into .venv/bfcl
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_chord.rewards.tool_calls import grade

CATEGORIES = [
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
]
REASONS = {
    "whole number as float": "BFCL takes 5.0 where the schema says float and the truth 5; the grader sees no schema",
    "empty text": 'an accepted "" means "may be left out"; whether "" may also be written depends on the schema',
    "an argument left out": "the truth allows to leave it out and the schema does not; the grader goes by the truth",
    "without what may be left out": "as an argument left out",
    "text in other letters": "BFCL compares text as it stands where the schema asks for another type than text",
    "text with blanks and a point": "as text in other letters",
    "first accepted, reversed": "BFCL gives each true call the first call that fits; the grader finds any pairing",
}
MOST_EXPLAINED = 0.03
"""The largest share of a kind's replies that its reason may explain. Reasons are for exceptions."""
Call = dict[str, Any]
Checker = Callable[[list[Call], list[Call], list[Call], str], bool]


def load_checker(folder: Path) -> Checker:
    """Import BFCL's AST checker without the vendors' clients that its table of models needs."""
    sys.path.insert(0, str(folder))

    class _Model:
        underscore_to_dot = False

    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = defaultdict(_Model)  # type: ignore[attr-defined]
    sys.modules[table.__name__] = table
    from bfcl_eval.constants.enums import Language  # type: ignore[import-not-found]
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # type: ignore[import-not-found]
    from bfcl_eval.utils import is_empty_output  # type: ignore[import-not-found]

    def check(functions: list[Call], calls: list[Call], truth: list[Call], category: str) -> bool:
        made = [{call["name"]: call["arguments"]} for call in calls]
        if not truth:  # an irrelevant request
            return is_empty_output(made)
        try:
            return ast_checker(functions, made, truth, Language.PYTHON, category, "any")["valid"]
        except (TypeError, KeyError, AttributeError):  # a value that the checker does not expect
            return False

    return check


def load_rows(folder: Path, category: str) -> Iterator[tuple[str, list[Call], list[Call]]]:
    """Return (id, functions, truth) of each row. The truth of an irrelevant request is empty."""
    data = folder / "bfcl_eval" / "data"
    name = f"BFCL_v4_{category}.json"
    answers = data / "possible_answer" / name
    truths = {row["id"]: row["ground_truth"] for row in _lines(answers)} if answers.exists() else {}
    for row in _lines(data / name):
        yield row["id"], row["function"], truths.get(row["id"], [])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def replies(truth: list[Call], functions: list[Call]) -> Iterator[tuple[str, list[Call]]]:
    """Yield (kind of change, calls): first the replies that follow the truth, then replies with one change each."""
    for name, pick in (("first accepted", 0), ("last accepted", -1)):
        calls = [_call(call, pick) for call in truth]
        yield name, calls
        yield f"{name}, reversed", calls[::-1]
    calls = [_call(call, 0) for call in truth]
    required = [_call(call, 0, leave_out=True) for call in truth]
    yield "without what may be left out", required
    yield "no call", []
    if functions:
        yield "another function", [*calls[:-1], {"name": functions[0]["name"] + "_", "arguments": {}}]
    if not calls:
        return
    yield "a call twice", [*calls, calls[0]]
    yield "a call less", calls[:-1]
    for index, call in enumerate(calls):
        for name, changed in _changed(call):
            yield name, [*calls[:index], changed, *calls[index + 1 :]]


def _call(truth: Call, pick: int, *, leave_out: bool = False) -> Call:
    ((name, arguments),) = truth.items()
    return {
        "name": name,
        "arguments": {
            key: _value(accepted, pick)
            for key, accepted in arguments.items()
            if not (leave_out and "" in accepted)
        },
    }


def _value(accepted: list[Any], pick: int) -> Any:
    options = [option for option in accepted if option != ""] or accepted or [[]]
    return _taken(options[pick], pick)


def _taken(value: Any, pick: int) -> Any:
    if isinstance(value, dict):
        return {key: _value(kept, pick) if isinstance(kept, list) else kept for key, kept in value.items()}
    return [_taken(item, pick) for item in value] if isinstance(value, list) else value


def _changed(call: Call) -> Iterator[tuple[str, Call]]:
    yield "another name", {"name": call["name"] + "_", "arguments": call["arguments"]}
    yield (
        "an unknown argument",
        {"name": call["name"], "arguments": {**call["arguments"], "no such argument": 1}},
    )
    for key, value in call["arguments"].items():
        left_out = {other: kept for other, kept in call["arguments"].items() if other != key}
        yield "an argument left out", {"name": call["name"], "arguments": left_out}
        for name, other in _values(value):
            changed = copy.deepcopy(call)
            changed["arguments"][key] = other
            yield name, changed


def _values(value: Any) -> Iterator[tuple[str, Any]]:
    yield "another text", "quite another value"
    yield "null", None
    yield "empty text", ""
    if isinstance(value, str):
        yield "text in other letters", value.upper()
        yield "text with blanks and a point", f" {value}."
        yield "text in a list", [value]
        yield "longer text", value + " x"
    elif isinstance(value, bool):
        yield "the other truth value", not value
        yield "truth value as number", int(value)
        yield "truth value as text", str(value)
    elif isinstance(value, int | float):
        yield "one more", value + 1
        yield "number as text", str(value)
        yield "number as truth value", True
        yield "number in a list", [value]
        if isinstance(value, int):
            yield "whole number as float", float(value)
        elif value == int(value):
            yield "float as whole number", int(value)
    elif isinstance(value, list):
        yield "a longer list", [*value, *(value[-1:] or [1])]
        yield "a shorter list", value[:-1]
        yield "a reversed list", value[::-1]
        yield "list as text", json.dumps(value)
    elif isinstance(value, dict):
        yield "an unknown key", {**value, "no such key": 1}
        yield "an empty object", {}
        for key in value:
            yield "a key left out", {other: kept for other, kept in value.items() if other != key}
            yield "another value of a key", {**value, key: "quite another value"}


def compare(
    folder: Path, category: str, check: Checker, *, every: int = 1
) -> tuple[Counter[str], list[str], list[str]]:
    """Compare one category. Return replies by kind, a line for each disagreement, and the rows whose truth BFCL
    refuses."""
    asked: Counter[str] = Counter()
    lines, refused = [], []
    for row, functions, truth in itertools.islice(load_rows(folder, category), None, None, every):
        if truth and not check(functions, [_call(call, 0) for call in truth], truth, category):
            refused.append(row)
            continue
        for kind, calls in replies(truth, functions):
            theirs = check(functions, calls, truth, category)
            ours = grade(json.dumps(calls), json.dumps(truth)) == 1.0
            asked[kind] += 1
            if ours != theirs:
                lines.append(
                    f"{row} [{kind}] grader {ours}, BFCL {theirs}: {json.dumps(calls)} for {json.dumps(truth)}"
                )
    return asked, lines, refused


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("folder", type=Path, help="where bfcl-eval is installed")
    options.add_argument("--every", type=int, default=1, help="take each so many-th row")
    options.add_argument("--lines", type=int, default=3, help="disagreements to print of each kind")
    arguments = options.parse_args()
    check = load_checker(arguments.folder)
    everything: Counter[str] = Counter()
    disagreements: dict[str, list[str]] = defaultdict(list)
    impossible: list[str] = []
    print("| category | replies | disagreements | rows left out |\n|---|--:|--:|--:|")
    for category in CATEGORIES:
        asked, lines, refused = compare(arguments.folder, category, check, every=arguments.every)
        impossible += refused
        everything += asked
        for line in lines:
            disagreements[line.partition("[")[2].partition("]")[0]].append(line)
        print(f"| {category} | {asked.total()} | {len(lines)} | {len(refused)} |", flush=True)
    print(
        f"\nLeft out, because BFCL refuses the first accepted values of the row itself: {', '.join(impossible)}"
    )
    unexplained = sum(
        len(lines)
        for kind, lines in disagreements.items()
        if kind not in REASONS or len(lines) > MOST_EXPLAINED * everything[kind]
    )
    for kind, lines in sorted(disagreements.items()):
        print(f"\n{kind}: {len(lines)} of {everything[kind]}. {REASONS.get(kind, 'NOT EXPLAINED')}")
        for line in lines[: arguments.lines]:
            print(f"  {line[:400]}")
    print(f"\n{everything.total()} replies, {unexplained} disagreements without a listed reason")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
