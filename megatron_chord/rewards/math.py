"""Compares mathematical answers with math-verify, and corrects its known mistakes.

`answers` finds the answer, `math_forms` reads the forms that math-verify reads wrongly, and this module compares.
Numbers are compared exactly, or to 100 significant digits if they are irrational; math-verify rounds to 6 decimals.

Of math-verify only the LaTeX parser is used, because its other mode passes text to Python's `eval`. Its own time
limits are off, because they use signals, which do not work in threads. `rewards.pool` kills late processes instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from megatron_chord.rewards.answers import Stated, marked_answer, stated_answer
from megatron_chord.rewards.math_forms import (
    Collection,
    Interval,
    cleaned,
    is_empty_set,
    is_equation,
    read_based,
    read_collection,
    read_intervals,
    read_matrix,
    read_option,
    read_options,
    read_quantity,
    read_words,
    split_label,
)

_LATEX = (
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
        ),
    ),
)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)")
_PLAIN_FRACTION = re.compile(
    r"([+-]?)\\frac\{([0-9]{1,100})\}\{([0-9]{1,100})\}|([+-]?)([0-9]{1,100}) ?/ ?([0-9]{1,100})"
)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_LETTER = re.compile(r"[a-zA-Z]")
_LONG_WORD = re.compile(r"[a-zA-Z]{15}")
_MAX_CHARACTERS = 4000
_MAX_PARSED = 1000
_MAX_DEPTH = 6
_SIGNIFICANT = 6
"""A decimal with at least this many significant digits may equal a number that has no finite decimal form."""


def grade(text: str, truth: str, *, marker: str = "####") -> float:
    """1.0 if the answer of `text` equals `truth`, else 0.0. A missing or unreadable answer is wrong.

    `answers.stated_answer` finds the answer. The truth is read in the same way, but without box or marker the whole
    truth is used.

    Raises: ValueError: the truth cannot be read, so the answer cannot be graded.
    """
    marked = marked_answer(truth, marker) if _is_marked(truth, marker) else None
    expected = (truth if marked is None else marked).strip()
    if not expected:
        raise ValueError("the truth is empty")
    stated = stated_answer(text, marker)
    if stated is None:
        return 0.0
    return float(any(equal(answer, expected) for answer in _candidates(stated, expected)))


def _is_marked(truth: str, marker: str) -> bool:
    return "boxed" in truth or marker in truth or "<answer>" in truth


def _candidates(stated: Stated, truth: str) -> Sequence[str]:
    """The answer. If the truth has several parts and the response has as many boxes, also all boxes together."""
    parts = read_collection(cleaned(truth)) if len(stated.boxes) > 1 else None
    if parts is None or len(parts.items) != len(stated.boxes):
        return (stated.text,)
    return (stated.text, ", ".join(stated.boxes))


def equal(answer: str, truth: str) -> bool:
    """True if two written answers mean the same. The truth determines the expected form.

    Raises:
        ValueError: the truth cannot be read.
    """
    if answer.strip() == truth.strip():
        return True
    if len(answer) > _MAX_CHARACTERS:
        return False
    return _equal(cleaned(answer), cleaned(truth), 0)


def _equal(answer: str, truth: str, depth: int) -> bool:
    if answer == truth:
        return True
    if not answer or depth > _MAX_DEPTH:
        return False
    given, meant = _plain_number(answer), _plain_number(truth)
    if given is not None and meant is not None:
        return _numbers_equal(given, meant, answer, truth)
    for compare in (_as_based, _as_option, _as_empty, _as_words, _as_matrix, _as_intervals, _as_collection):
        verdict = compare(answer, truth, depth)
        if verdict is not None:
            return verdict
    return _as_quantity(answer, truth)


# Each of these compares one form: None means that the truth, or the answer, is of another form.


def _as_based(answer: str, truth: str, depth: int) -> bool | None:
    given, meant = (read_based(split_label(text)[1]) for text in (answer, truth))
    if meant is not None:
        return given == meant
    if given is None:
        return None
    number = _plain_number(truth)
    return number is not None and given.value == number


def _as_option(answer: str, truth: str, depth: int) -> bool | None:
    several = read_options(truth), read_options(answer)
    if None not in several:
        return several[0] == several[1] or None
    meant = read_option(truth)
    if meant is None:
        return None
    given = read_option(answer)
    if given is not None:
        return given[0] == meant[0]
    if meant[1]:
        return _equal(answer, cleaned(meant[1]), depth + 1)
    return answer.strip().upper() == meant[0]


def _as_empty(answer: str, truth: str, depth: int) -> bool | None:
    given, meant = is_empty_set(answer), is_empty_set(truth)
    return given and meant if given or meant else None


def _as_words(answer: str, truth: str, depth: int) -> bool | None:
    meant = read_words(truth)
    if meant is None:
        return None
    _, unlabelled = split_label(answer)
    given = read_words(unlabelled) or (unlabelled if unlabelled.isalpha() else None)
    if given is not None:
        return given.lower() == meant
    return False if r"\text" in truth or len(meant) > 3 else None


def _as_matrix(answer: str, truth: str, depth: int) -> bool | None:
    meant = read_matrix(truth)
    if meant is None:
        return None
    _, unlabelled = split_label(answer)
    given = read_matrix(unlabelled)
    if given is not None:
        return [len(row) for row in given] == [len(row) for row in meant] and all(
            _equal(*pair, depth + 1)
            for rows in zip(given, meant, strict=True)
            for pair in zip(*rows, strict=True)
        )
    entries = [entry for row in meant for entry in row]
    vector = read_collection(unlabelled)
    if vector is not None and vector.opening in ("(", "[") and 1 in (len(meant), len(meant[0])):
        return _in_order(vector.items, entries, depth)
    return None


def _as_collection(answer: str, truth: str, depth: int) -> bool | None:
    meant = read_collection(truth) or read_collection(split_label(truth)[1])
    if r"\cup" in truth or r"\cup" in answer or (meant is None and is_equation(split_label(truth)[1])):
        return None
    given = read_collection(answer) or read_collection(split_label(answer)[1])
    if meant is None:
        return None if given is None else _all_equal(given, truth, depth)
    if given is None:
        bare = split_label(answer)[1]
        return len(meant.items) == 1 and _equal(bare, meant.items[0], depth + 1)
    return _collections_equal(given, meant, depth)


def _collections_equal(given: Collection, meant: Collection, depth: int) -> bool:
    """Compare a set or bare list in any order, a tuple in its order. Brackets may be left out but not exchanged."""
    if meant.is_set or meant.is_list:
        return not given.is_tuple and _in_any_order(given.items, meant.items, depth)
    same_brackets = (given.opening, given.closing) == (meant.opening, meant.closing)
    return (same_brackets or given.is_list) and _in_order(given.items, meant.items, depth)


def _all_equal(given: Collection, truth: str, depth: int) -> bool | None:
    """Compare a list with one value: each item is that value, or the truth was a list without blanks, such as
    100,200."""
    if given.is_tuple:
        return None
    if (
        _PLAIN_NUMBER.fullmatch(truth)
        and "," in truth
        and _in_any_order(given.items, truth.split(","), depth)
    ):
        return True
    return all(_equal(item, truth, depth + 1) for item in given.items)


def _in_order(given: Sequence[str], meant: Sequence[str], depth: int) -> bool:
    return len(given) == len(meant) and all(
        _items_equal(item, other, depth) for item, other in zip(given, meant, strict=True)
    )


def _in_any_order(given: Sequence[str], meant: Sequence[str], depth: int) -> bool:
    return _matched(_distinct(given), _distinct(meant), lambda a, b: _items_equal(a, b, depth))


def _items_equal(given: str, meant: str, depth: int) -> bool:
    """Compare values without their names. If both have a name, the names must be equal."""
    given_label, given_value = split_label(given)
    meant_label, meant_value = split_label(meant)
    if given_label and meant_label and given_label != meant_label:
        return False
    return _equal(cleaned(given_value), cleaned(meant_value), depth + 1)


def _distinct(items: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(item.replace(" ", "") and item for item in items))


def _matched(given: Sequence[Any], meant: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    if len(given) != len(meant) or len(given) > 200:
        return False
    left = list(meant)
    for item in given:
        for other in left:
            if same(item, other):
                left.remove(other)
                break
        else:
            return False
    return True


def _as_intervals(answer: str, truth: str, depth: int) -> bool | None:
    given, meant = read_intervals(answer), read_intervals(truth)
    if given is None or meant is None:
        return None
    if _matched(given, meant, lambda a, b: _intervals_equal(a, b, depth)):
        return True
    return False if len(given) == len(meant) == 1 else None  # else unions may overlap: left to math-verify


def _intervals_equal(given: Interval, meant: Interval, depth: int) -> bool:
    return (
        (given.low_is_open, given.high_is_open) == (meant.low_is_open, meant.high_is_open)
        and _equal(cleaned(given.low), cleaned(meant.low), depth + 1)
        and _equal(cleaned(given.high), cleaned(meant.high), depth + 1)
    )


def _as_quantity(answer: str, truth: str) -> bool:
    given_label, given_text = split_label(answer)
    meant_label, meant_text = split_label(truth)
    are_equations = is_equation(answer) and is_equation(truth)
    if are_equations and (given_label is None or given_label != meant_label):
        return _by_math_verify(answer, truth)
    if is_equation(given_text) or is_equation(meant_text):
        return _by_math_verify(answer, truth)
    given, meant = read_quantity(given_text, other=meant_text), read_quantity(meant_text)
    if not given.text or (given.unit and meant.unit and given.unit != meant.unit):
        return False
    if given.is_percent == meant.is_percent:
        return _values_equal(given.text, meant.text)
    ratio, whole = (given.text, meant.text) if given.is_percent else (meant.text, given.text)
    number = _plain_number(whole)
    may_be_percent = number is None or abs(number) >= 1  # 20 for 20 %, but not 0.5 for 0.5 %
    return _values_equal(f"\\frac{{{ratio}}}{{100}}", whole) or (
        may_be_percent and _values_equal(given.text, meant.text)
    )


def _values_equal(answer: str, truth: str) -> bool:
    given, meant = _plain_number(answer), _plain_number(truth)
    if given is not None and meant is not None:
        return _numbers_equal(given, meant, answer, truth)
    return cleaned(answer) == cleaned(truth) or _by_math_verify(answer, truth)


# --- numbers -----------------------------------------------------------------------------------------------------


def _plain_number(text: str) -> Fraction | None:
    """The exact value of a written number or fraction; None for anything else, and for numbers that are too long."""
    if len(text) > 1000:
        return None
    if _PLAIN_NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if match := _PLAIN_FRACTION.fullmatch(text):
        sign, above, below = match.groups()[:3] if match[2] else match.groups()[3:]
        return Fraction(int(sign + above), int(below)) if int(below) else None
    return None


def _numbers_equal(given: Fraction, meant: Fraction, answer: str, truth: str) -> bool:
    return given == meant or _stands_for(answer, given, meant) or _stands_for(truth, meant, given)


def _stands_for(written: str, value: Fraction, exact: Fraction) -> bool:
    """True if a decimal with enough digits is `exact`, rounded or truncated. `exact` has no finite decimal form."""
    _, point, decimals = written.partition(".")
    if not point or not decimals.isdigit() or _is_finite_decimal(exact):
        return False
    return _agrees(written, value, exact)


def _agrees(written: str, value: Fraction, exact: Fraction) -> bool:
    """True if all digits of a decimal, at least six, are those of `exact`, rounded or truncated."""
    decimals = written.partition(".")[2]
    significant = re.sub(r"\D", "", written).lstrip("0")
    return len(significant) >= _SIGNIFICANT and abs(value - exact) < Fraction(1, 10 ** len(decimals))


def _is_finite_decimal(number: Fraction) -> bool:
    below = number.denominator
    for factor in (2, 5):
        while below % factor == 0:
            below //= factor
    return below == 1


# --- expressions -------------------------------------------------------------------------------------------------

_PRECISION = 120
_MAX_DIGITS = 100_000
"""Numbers with more digits are compared as they are written."""
_AGREEMENT = sympy.Float("1e-100", _PRECISION)
_TINY = sympy.Float("1e-110", _PRECISION)
_POINTS = (sympy.Rational(13, 7), sympy.Rational(-29, 11), sympy.Rational(101, 37))


def _by_math_verify(answer: str, truth: str) -> bool:
    parsed_truth = _parsed(truth)
    if not parsed_truth:
        raise ValueError(f"the truth cannot be read: {truth[:80]!r}")
    parsed_answer = [] if _is_prose(answer) else _parsed(answer)
    if not parsed_answer:
        return False
    given, meant = parsed_answer[0], parsed_truth[0]
    if isinstance(given, sympy.Expr) and isinstance(meant, sympy.Expr):
        verdict = _expressions_equal(given, meant)
        if verdict is not None:
            return verdict or _rounds(answer, meant) or _rounds(truth, given)
    return verify(parsed_truth, parsed_answer, timeout_seconds=None, allow_set_relation_comp=True)


def _is_prose(text: str) -> bool:
    """True if the text is not a formula. The parser would take minutes for a page of such text."""
    letters = _COMMAND.sub(" ", text)
    return (
        len(text) > _MAX_PARSED
        or len(_LETTER.findall(letters)) > 100
        or _LONG_WORD.search(letters) is not None
    )


def _parsed(text: str) -> list:
    return parse(
        f"\\boxed{{{text}}}",
        extraction_config=_LATEX,
        fallback_mode="no_fallback",
        parsing_timeout=None,  # type: ignore[arg-type]
    )


def _expressions_equal(given: sympy.Expr, meant: sympy.Expr) -> bool | None:
    """True if two expressions are equal; None if that cannot be computed.

    Numbers are compared exactly or to 100 digits. Expressions with variables are compared at three points: different
    expressions that agree there to 100 digits are practically impossible.
    """
    if _has_undefined(given) or _has_undefined(meant):
        return None
    if max(_digits(given), _digits(meant)) > _MAX_DIGITS:
        return given == meant
    given, meant = _exact(given), _exact(meant)
    symbols = sorted(given.free_symbols | meant.free_symbols, key=str)
    if not symbols:
        return _constants_equal(given, meant)
    for shift, point in enumerate(_POINTS, start=2):
        at = [
            (symbol, point + sympy.Rational(index * shift, 5 + index)) for index, symbol in enumerate(symbols)
        ]
        verdict = _constants_equal(given.subs(at), meant.subs(at))
        if not verdict:
            return verdict
    return True


def _has_undefined(expression: sympy.Expr) -> bool:
    return bool(expression.atoms(sympy.core.function.AppliedUndef)) or expression.has(
        sympy.Integral, sympy.Derivative, sympy.Sum, sympy.Product, sympy.Limit
    )


def _digits(expression: sympy.Basic) -> float:
    """Estimate of the number of decimal digits that appear when `expression` is evaluated; capped at 1e300."""
    if isinstance(expression, sympy.Integer):
        return abs(int(expression)).bit_length() * 0.302
    parts = [_digits(part) for part in expression.args]
    own = sum(parts)
    if isinstance(expression, sympy.Pow):
        own = max(parts[0], 0.3) * 10.0 ** min(parts[1], 200)
    elif isinstance(expression, sympy.factorial):
        own = max(parts[0], 1) * 10.0 ** min(parts[0], 200)
    elif isinstance(expression, sympy.binomial):
        own = max(parts[0], 1) * 10.0 ** min(parts[1], 200)
    return min(max([own, *parts], default=0.3), 1e300)


def _constants_equal(given: Any, meant: Any) -> bool | None:
    given, meant = given.doit(), meant.doit()
    if given == meant:
        return given not in (sympy.nan, sympy.zoo)
    if given.is_Rational and meant.is_Rational:
        return False
    if given.is_infinite or meant.is_infinite:
        return None if given in (sympy.nan, sympy.zoo) or meant in (sympy.nan, sympy.zoo) else False
    try:
        first, second = sympy.N(given, _PRECISION), sympy.N(meant, _PRECISION)
        size = max(abs(first), abs(second))
        if size < _TINY:  # perhaps 0, of which no digit can be computed
            return bool(sympy.simplify(given - meant) == 0)
        return bool(abs(first - second) <= _AGREEMENT * size)
    except (TypeError, ValueError, AttributeError):
        return None


def _exact(expression: sympy.Expr) -> Any:
    """The evaluated expression, with decimals as exact fractions."""
    floats = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    return expression.xreplace(floats).doit()


def _rounds(written: str, exact: sympy.Expr) -> bool:
    """True if `written` is a decimal with enough digits that equals `exact`, an irrational number."""
    value = _plain_number(written)
    if value is None or "." not in written or exact.free_symbols:
        return False
    number = _exact(exact)
    if number.is_Rational:
        return _stands_for(written, value, Fraction(int(number.p), int(number.q)))
    return bool(number.is_real) and _agrees(written, value, Fraction(str(sympy.N(number, _PRECISION))))
