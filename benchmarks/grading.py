"""Measure precision and recall of the mathematics grader, and of math-verify alone, on public benchmarks.

Each truth is rewritten in ways that mean the same, and in ways that only a careless grader accepts (off by one, another
sign, a swapped pair, another base, an open end for a closed one). The kind of rewriting decides whether an answer is
right, so no grader is asked. GSM8K has many equal truths: each is graded once and counts as often as it occurs.

    python benchmarks/grading.py [FOLDER]     # of the data sets, default MEGATRON_CHORD_DATA; 4 minutes on one core
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from math_verify import parse, verify

from megatron_chord.rewards.math import grade

SETS = {
    "MATH-500": ["math500"],
    "AIME 24, 25": ["aime24", "aime25"],
    "AMC": ["amc"],
    "GSM8K": ["gsm8k_train", "gsm8k_test"],
}
LIMIT = 0.99
Forms = Iterator[tuple[str, str]]

_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"-?\d*\.\d+")
_FRACTION = re.compile(r"(-?)\\d?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")
_BASED = re.compile(r"(\d+)_\{?(\d)\}?")
_PAIR = re.compile(r"(?:x \\in )?(?:\\left)?\s*([(\[])([^()\[\]]*)(?:\\right)?\s*([)\]])")
_UNIT = re.compile(r"(.*\S)\s*\\(?:text|mbox)\{ ?([a-z]+) ?\}(\^2)?")


def rewritten(truth: str) -> Forms:
    """Yield (name of the rewriting, a right answer). Rewritings that do not apply to this truth are left out."""
    yield "as it is", truth
    yield "spaced", f"\\, {truth} \\;"
    if "\\frac" in truth:
        yield "dfrac", truth.replace("\\frac", "\\dfrac")
    if "\\left" in truth:
        yield "without left and right", truth.replace("\\left", "").replace("\\right", "")
    if not re.search(r"=|\\in|text|,|\(", truth):
        yield "with a name", f"x = {truth}"
    yield from _integer_forms(truth)
    yield from _fraction_forms(truth)
    yield from _notation_forms(truth)
    yield from _list_forms(truth)
    yield from _text_forms(truth)


def _integer_forms(truth: str) -> Forms:
    if _INTEGER.fullmatch(truth):
        number = int(truth)
        yield "decimal", f"{number}.0"
        yield "fraction", f"\\frac{{{3 * number}}}{{3}}"
        yield "unit in text", f"{number} \\text{{ units}}"
        yield "bare unit", f"{number} apples"
        yield "currency", f"\\${number}"
        yield "bold", f"\\mathbf{{{number}}}"
        if abs(number) >= 1000:
            yield "commas", f"{number:,}"
            yield "thin spaces", f"{number:,}".replace(",", "\\,")
            yield "braced commas", f"{number:,}".replace(",", "{,}")
        if number < 0:
            yield "another minus", truth.replace("-", "\u2212")
        if number and number % 100 == 0:
            mantissa, zeros = truth.rstrip("0"), len(truth) - len(truth.rstrip("0"))
            yield "power of ten", f"{mantissa} \\times 10^{{{zeros}}}"
            yield "e notation", f"{mantissa}e{zeros}"


def _fraction_forms(truth: str) -> Forms:
    if _DECIMAL.fullmatch(truth):
        value = Fraction(truth)
        yield "fraction", f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value > 0 else str(value)
        yield "slash", f"{value.numerator}/{value.denominator}"
        yield "trailing zero", f"{truth}0"
        yield "percent", f"{Decimal(truth) * 100}\\%"
        if value.denominator == 1:
            yield "integer", str(value.numerator)
    if match := _FRACTION.fullmatch(truth):
        sign, above, below = match[1], match[2] or match[3], match[4] or match[5]
        yield "slash", f"{sign}{above}/{below}"
        yield "expanded", f"{sign}\\frac{{{2 * int(above)}}}{{{2 * int(below)}}}"
        decimal = _finite(Fraction(int(sign + above), int(below)))
        if decimal:
            yield "decimal", decimal


def _notation_forms(truth: str) -> Forms:
    if match := _BASED.fullmatch(truth):
        yield "braced base", f"{match[1]}_{{{match[2]}}}"
        yield "base in words", f"{match[1]} \\text{{ (base }} {match[2]}\\text{{)}}"
        yield "bare base", f"{match[1]} base {match[2]}"
    if truth.endswith("^\\circ"):
        yield "degree sign", truth.replace("^\\circ", "°")
        yield "degrees", truth.replace("^\\circ", " degrees")
        yield "degrees left out", truth.replace("^\\circ", "")
    if "\\sqrt{" in truth and truth.count("sqrt") == 1 and re.search(r"\\sqrt\{\d+\}", truth):
        yield "root sign", re.sub(r"\\sqrt\{(\d+)\}", r"√\1", truth)
    if "\\pi" in truth:
        yield "pi sign", truth.replace("\\pi", "π")
    if "\\!" in truth:
        yield "without negative space", truth.replace("\\!", "").replace(", ", ",")
        yield "without commas", re.sub(r",|\\!|\s", "", truth)
    if truth.startswith("\\$"):
        yield "currency in words", truth.removeprefix("\\$") + " dollars"
        yield "currency left out", truth.removeprefix("\\$")


def _list_forms(truth: str) -> Forms:
    if match := _PAIR.fullmatch(truth):
        items = match[2].split(",")
        yield "no blanks", match[1] + ",".join(item.strip() for item in items) + match[3]
        yield "left and right", f"\\left{match[1]}{match[2]}\\right{match[3]}"
        if len(items) == 2 and ("\\infty" in truth or "[" in truth or "]" in truth):
            yield "inequality", _inequality(match[1], items[0], items[1], match[3])
    elif "," in truth and not re.search(r"[(\[{$]|\d,\d{3}|\\!", truth):
        items = [item.strip() for item in truth.split(",")]
        yield "reversed", ", ".join(items[::-1])
        yield "and", ", ".join(items[:-1]) + " \\text{ and } " + items[-1]
        yield "set", "\\{" + ", ".join(items) + "\\}"
    if truth.count("\\pm") == 1 and "{" not in truth.partition("\\pm")[0] and "," not in truth:
        first, _, second = truth.partition("\\pm")
        yield "both signs", f"{first}+{second}, {first}-{second}"
    if "\\cup" in truth:
        yield "reversed union", " \\cup ".join(reversed(truth.split("\\cup")))
        yield "cup sign", truth.replace("\\cup", "∪").replace("\\infty", "∞")


def _inequality(opening: str, low: str, high: str, closing: str) -> str:
    below, above = "<" if opening == "(" else "\\le", "<" if closing == ")" else "\\le"
    if "\\infty" in low:
        return f"x {above} {high}"
    if "\\infty" in high:
        return ("x > " if opening == "(" else "x \\ge ") + low
    return f"{low} {below} x {above} {high}"


def _text_forms(truth: str) -> Forms:
    if match := re.fullmatch(r"\\text\{\((.)\)\}", truth):
        yield "option", f"({match[1]})"
        yield "bare option", match[1]
        yield "option with a point", f"{match[1]}."
        yield "bold option", f"\\textbf{{({match[1]})}}"
    elif match := re.fullmatch(r"\\text\{(\w+)\}", truth):
        yield "bare word", match[1]
        yield "bold word", f"\\textbf{{{match[1]}}}"
    elif match := _UNIT.fullmatch(truth):
        yield "without unit", match[1]
        yield "bare unit", f"{match[1]} {match[2]}{match[3] or ''}"
        yield "mathrm unit", f"{match[1]}\\,\\mathrm{{{match[2]}}}{match[3] or ''}"
    elif match := re.fullmatch(r"([xy]) ?= ?(.*)", truth):
        yield "without name", match[2]


def near_misses(truth: str) -> Forms:
    """Yield (name of the mistake, a wrong answer)."""
    yield from _integer_misses(truth)
    yield from _number_misses(truth)
    yield from _other_misses(truth)
    yield from _changed_expression(truth)


def _integer_misses(truth: str) -> Forms:
    if _INTEGER.fullmatch(truth):
        number = int(truth)
        yield "one more", str(number + 1)
        yield "one less, as decimal", f"{number - 1}.0"
        yield "a little more", f"{number}.01"
        yield "ten times", str(number * 10) if number else "10"
        if number:
            yield "other sign", str(-number)
            yield "one part in a million", f"{number}.00000{abs(number) % 9 + 1}"
        if number not in (0, 1, -1):
            yield "reciprocal", f"\\frac{{1}}{{{number}}}"
        if abs(number) >= 10 and truth[-1] != truth[-2]:
            yield "digits swapped", truth[:-2] + truth[-1] + truth[-2]
        if number:
            yield "a variable", f"{number}x"
        yield "a list", f"{number}, {number + 1}"


def _number_misses(truth: str) -> Forms:
    if _DECIMAL.fullmatch(truth):
        yield "last digit", truth[:-1] + str((int(truth[-1]) + 1) % 10)
        yield "ten times", str(Decimal(truth) * 10) if Decimal(truth) else "10"
        if Decimal(truth):
            yield "other sign", truth.removeprefix("-") if truth.startswith("-") else f"-{truth}"
        yield "one digit more", f"{truth}1"
    elif match := _FRACTION.fullmatch(truth):
        above, below = match[2] or match[3], match[4] or match[5]
        yield "numerator", f"{match[1]}\\frac{{{int(above) + 1}}}{{{below}}}"
        yield "denominator", f"{match[1]}\\frac{{{above}}}{{{int(below) + 1}}}"
        yield "upside down", f"{match[1]}\\frac{{{below}}}{{{above}}}"
        yield "other sign", f"{'' if match[1] else '-'}\\frac{{{above}}}{{{below}}}"
        yield (
            "two digits",
            f"{int(match[1] + above) / int(below):.2f}" if 100 * int(above) % int(below) else "7.77",
        )
    elif match := _BASED.fullmatch(truth):
        yield "other base", f"{match[1]}_{int(match[2]) + 1 if match[2] < '9' else 8}"
        yield "no base", match[1]
        yield "other digit", f"{match[1][:-1]}{(int(match[1][-1]) + 1) % int(match[2])}_{match[2]}"


def _other_misses(truth: str) -> Forms:
    if match := _PAIR.fullmatch(truth):
        items = [item.strip() for item in match[2].split(",")]
        yield "swapped", match[1] + ", ".join([*items[2:], items[1], items[0]]) + match[3]
        yield (
            "first item",
            match[1]
            + ", ".join([f"{items[0]}+1" if "infty" not in items[0] else "0", *items[1:]])
            + match[3],
        )
        yield "first left out", match[1] + ", ".join(items[1:]) + match[3]
        if "\\infty" in truth or "[" in truth or "]" in truth:
            yield "other start", {"(": "[", "[": "("}[match[1]] + match[2] + match[3]
            yield "other end", match[1] + match[2] + {")": "]", "]": ")"}[match[3]]
            low, high = items
            yield (
                "other inequality",
                _inequality({"(": "[", "[": "("}[match[1]], low, high, {")": "]", "]": ")"}[match[3]]),
            )
    elif match := re.fullmatch(r"\\text\{\((.)\)\}", truth):
        yield "other option", f"({chr(ord(match[1]) + 1)})"
        yield "other bare option", "A"
    elif re.fullmatch(r"\\text\{(\w+)\}", truth):
        yield "other word", "\\text{odd}"
    elif match := _UNIT.fullmatch(truth):
        yield "other unit", f"{match[1]} \\text{{ miles}}"


def _changed_expression(truth: str) -> Forms:
    if (
        _INTEGER.fullmatch(truth)
        or _DECIMAL.fullmatch(truth)
        or _FRACTION.fullmatch(truth)
        or _BASED.fullmatch(truth)
    ):
        return
    if match := re.search(r"(?<=[\w}]) ?([+-]) ?(?=[\w\\])", truth):
        sign = "-" if match[1] == "+" else "+"
        yield "other sign inside", truth[: match.start(1)] + sign + truth[match.end(1) :]
    if match := re.search(r"\\sqrt\{?(\d+)\}?", truth):
        yield "other root", f"{truth[: match.start()]}\\sqrt{{{int(match[1]) + 1}}}{truth[match.end() :]}"
    digits = [
        match
        for match in re.finditer(r"\d", truth)
        if truth[match.start() - 1 : match.start()] not in ("^", "_")
    ]
    if digits and not _UNIT.fullmatch(truth):
        last = digits[-1]
        yield "one digit", f"{truth[: last.start()]}{(int(last[0]) + 1) % 10 or 1}{truth[last.end() :]}"
    if "," in truth and not re.search(r"[(\[{$]|\d,\d{3}|\\!", truth):
        yield "one left out", ", ".join(truth.split(",")[1:])
        yield "one too many", f"{truth}, 99"


def _finite(value: Fraction) -> str | None:
    below = value.denominator
    for factor in (2, 5):
        while below % factor == 0:
            below //= factor
    return None if below > 1 else str(Decimal(value.numerator) / Decimal(value.denominator))


def sentences(answer: str, number: int) -> str:
    """Return a response that gives the answer. `number` chooses one of several forms, so that each form occurs with
    each."""
    is_bare_text = re.fullmatch(r"[A-Z]\.|.*\bbase\b.*|[^\\$]*[a-z]{3,}[^\\$]*", answer)
    return [
        f"Adding both, we get $\\boxed{{{answer}}}$.",
        f"<think>Perhaps $\\boxed{{17}}$? No.</think>\n\nThe result is\n\\[ \\boxed{{{answer}}} \\]",
        f"So $2 + 2 = 4$.\n\n<answer>{answer}</answer>",
        f"Therefore, the answer is {answer}"
        if is_bare_text
        else f"Therefore, the final answer is ${answer}$.",
        f"**Final Answer**\n\n$$\\boxed{{{answer}}}$$",
    ][number % 5]


def bare(text: str, truth: str) -> bool:
    """Grade with math-verify as its README shows."""
    gold = parse(f"${truth}$", parsing_timeout=None)  # type: ignore[arg-type]
    return verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None)  # type: ignore[arg-type]


def ours(text: str, truth: str) -> bool:
    try:
        return grade(text, truth) == 1.0
    except ValueError:  # an unreadable truth has no grade
        return False


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("folder", nargs="?", default=os.environ.get("MEGATRON_CHORD_DATA"))
    options.add_argument("--mistakes", type=int, default=40, help="mistakes of the grader to print")
    arguments = options.parse_args()
    if arguments.folder is None:
        options.error("name the folder of the data sets, or set MEGATRON_CHORD_DATA")
    logging.disable(logging.WARNING)  # math-verify warns that its time limits are off
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("math-verify", "sympy"))
    print(f"Python {sys.version.split()[0]}, {versions}\n")
    print(
        "| set | truths | right forms | near misses | grader: precision | recall | math-verify: precision | recall |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    mistakes: Counter[str] = Counter()
    by_form: dict[str, Counter[str]] = defaultdict(Counter)
    worst = 1.0
    for name, files in SETS.items():
        counts = _graded(Path(arguments.folder) / "math", files, mistakes, by_form)
        cells = []
        for grader in ("ours", "bare"):
            hits, false = counts[f"{grader} right"], counts[f"{grader} wrong"]
            precision, recall = hits / max(hits + false, 1), hits / counts["right"]
            cells += [f"{precision:.2%}", f"{recall:.2%}"]
            if grader == "ours":
                worst = min(worst, precision, recall)
        print(
            f"| {name} | {counts['truths']} | {counts['right']} | {counts['wrong']} | {' | '.join(cells)} |",
            flush=True,
        )
    print("\n| form or mistake | cases | grader is wrong | math-verify is wrong |\n|---|--:|--:|--:|")
    for form, counts in sorted(by_form.items()):
        print(f"| {form} | {counts['all']} | {counts['ours']} | {counts['bare']} |")
    print(f"\nMistakes of the grader, {min(len(mistakes), arguments.mistakes)} of {len(mistakes)}:")
    for line, count in mistakes.most_common(arguments.mistakes):
        print(f"  {count} x {line}")
    print("PASS" if worst >= LIMIT else f"FAIL: {worst:.2%} is below {LIMIT:.0%}")
    return 0 if worst >= LIMIT else 1


def _graded(
    folder: Path, files: list[str], mistakes: Counter[str], by_form: dict[str, Counter[str]]
) -> Counter[str]:
    truths = Counter(
        str(json.loads(line)["answer"])
        for file in files
        for line in (folder / f"{file}.jsonl").open(encoding="utf-8")
    )
    counts: Counter[str] = Counter(truths=truths.total())
    number = 0
    for truth, times in truths.items():
        for is_right, forms in ((True, rewritten), (False, near_misses)):
            for form, answer in forms(truth):
                number += 1
                counts["right" if is_right else "wrong"] += times
                row = by_form[f"{'=' if is_right else 'x'} {form}"]
                row["all"] += times
                text = sentences(answer, number)
                graders: tuple[tuple[str, Callable[[str, str], bool]], ...] = (("ours", ours), ("bare", bare))
                for name, grader in graders:
                    says = grader(text, truth)
                    counts[f"{name} {'right' if is_right else 'wrong'}"] += times * says
                    if says != is_right:
                        row[name] += times
                        if name == "ours":
                            mistakes[
                                f"{form}: {text!r} for {truth!r} is {'right' if is_right else 'wrong'}"
                            ] += times
    return counts


if __name__ == "__main__":
    sys.exit(main())
