"""Reads the forms in which people write mathematical answers.

`cleaned` normalises notation (Unicode, spacing, thousands, fonts) without changing the meaning. The `read_...`
functions recognise forms that math-verify reads wrongly or not at all: number bases, options, words, intervals, lists,
units. Each returns None for text of another form. Nothing is evaluated here.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "≈": r"\approx ", "°": r"^{\circ}", "ℝ": r"\mathbb{R}",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi ", "μ": r"\mu ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
    "∖": r"\setminus ", "⟨": r"\langle ", "⟩": r"\rangle ", "′": "'", "’": "'", "∛": r"\sqrt[3]", "…": r"\ldots ",
    "€": r"\text{ euros}", "£": r"\text{ pounds}", "¥": r"\text{ yen}", "₹": r"\text{ rupees}", "¢": r"\text{ cents}",
    "\u2009": r"\,", "\u202f": r"\,", "\u00a0": " ", "\u2062": "", "\u200b": "",
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE)

_SCRIPT_RUN = re.compile(f"([{''.join(_SUPERSCRIPTS)}]+)|([{''.join(_SUBSCRIPTS)}]+)")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+(?:\.[0-9]+)?|\\?[a-zA-Z]+))")
_THOUSANDS_SPACE = re.compile(
    r"(?<![\d.])\d{1,3}(?:(?:\\[,:; ]|~|\\thinspace\s*|\{\s*,\s*\}|,\s*\\!\s*|'|\s)\d{3})+(?![\d'])"
)
_NOT_DIGITS = re.compile(r"\D")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?(?=[\s()\[\]{}|.\\]|$)", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it)(?![a-zA-Z])", ""),
        (r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|boxed|fbox|underline)\s*(?=\{)", ""),
        (r"\\(?:text)?color\s*\{\w+\}", ""),
        (r"\\pounds(?![a-zA-Z])", r"\\text{ pounds}"),
        (r"\^\{?\s*\\text\s*\{(?:st|nd|rd|th)\}\s*\}?", ""),
        (r"(?<=\d) \((?!base|mod|in base)[a-z -]+\)$", ""),
        (
            r"\\(?:textbf|textit|textrm|textnormal|textsf|mbox|hbox|mathrm|operatorname\*?)\s*(?=\{)",
            r"\\text",
        ),
        (r"\{\s*,\s*\}", ","),
        (r",\s*\\!\s*", ","),
        (r"(?<!\\)\\(?:!|allowbreak)", ""),
        (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z])|thinspace(?![a-zA-Z]))|~", " "),
        (r"\\(?:leq|leqslant)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\\text\s*\{\s*(\\text\s*\{[^{}]*\}|\^\{\\circ\})\s*\}", r"\1"),
        (r"\^\s*\{\s*\\text\s*\{o\}\s*\}", r"^{\\circ}"),
        (r"^(\d+) ?\\text\s*\{ ?to ?\} ?(\d+)$", r"\1:\2"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-zA-Z])", r"^{\\circ}"),
        (
            r"\\(sin|cos|tan|cot|sec|csc)\s*[({]?\s*([0-9.]+)\s*\^\{\\circ\}\s*[)}]?",
            r"\\\1(\\frac{\2\\pi}{180})",
        ),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(?:to|rightarrow)(?![a-zA-Z])", r"\\to "),
        (r"\*\*", "^"),
        (r"(?<=[\w)}])\s*\*\s*(?=[\w({\\])", r"\\cdot "),
        (r"(?<![\w.])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([+-]?)0*([0-9]+)(?![\w.])", r"\1 \\times 10^{\2\3}"),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])sqrt\s*\{", r"\\sqrt{"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\s*\\text\s*\{\s*(?:percent|per cent|pct\.?)\s*\}|(?<=\d)\s*(?:percent|per cent|pct)\b", r"\\%"),
        (r"(?<!\\)%", r"\\%"),
        (r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
        (r"(?<![\d.])(\d+)\s*\\frac\s*(?=[\d{])", r"\1\\frac"),
        (r"\^\s*(-?[0-9]{2,}|-[0-9])", r"^{\1}"),
        (r"\^\{\s*([0-9a-zA-Z])\s*\}", r"^\1"),
        (r"\\sqrt\[(\w)\]\s*([0-9]+|[a-zA-Z])", r"\\sqrt[\1]{\2}"),
        (r"\s+", " "),
    ]
]
_OUTER = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`")]
_PREFIX = re.compile(
    r"(?:\\(?:approx|sim|simeq|cong|implies|Rightarrow|therefore)(?![a-zA-Z])|≃|=(?!=)|:"
    r"|(?:about|approximately|roughly|exactly|is|are|be)\b"
    r"|[a-z][a-z ]{1,40}? (?:is|are|equals) (?=[-\d\\$])|\\text\s*\{[^{}]*[:=]\s*\}"
    r"|\\text\s*\{[^{}]*\b(?:is|are|be|equals|about|approximately|roughly|exactly)[\s:~]*\}|\\text\s*\{\s*[=:]\s*\})\s*",
    re.IGNORECASE,
)
_REPEATING = re.compile(r"(?<![\d.])(\d{1,50})\.(\d{0,50})\\(?:overline|bar)\s*\{(\d{1,50})\}")
_DOLLAR = re.compile(r"(?<!\\)\$")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def cleaned(text: str) -> str:
    """The same answer in plain LaTeX, without delimiters, fonts, a final period and words such as "approximately"."""
    text = unicodedata.normalize("NFC", text).translate(_TRANSLATION)
    text = "".join(unicodedata.normalize("NFKC", c) if "\uff01" <= c <= "\uff5e" else c for c in text)
    text = _SCRIPT_RUN.sub(_script, text)
    text = _ROOT.sub(
        lambda match: "\\sqrt{" + next(group for group in match.groups() if group is not None) + "}", text
    )
    text = _bare(text)
    text = _THOUSANDS_SPACE.sub(lambda match: _NOT_DIGITS.sub("", match[0]), text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _REPEATING.sub(_as_fraction, text)
    if len(_DOLLAR.findall(text)) % 2 == 0:
        text = _DOLLAR.sub("", text)
    text = _bare(text)
    while (match := _PREFIX.match(text)) and match.end() < len(text):
        text = _bare(text[match.end() :])
    return text


def _as_fraction(match: re.Match[str]) -> str:
    whole, start, period = match.groups()
    below = 10 ** len(start) * (10 ** len(period) - 1)
    above = int(whole + start + period) - int(whole + start)
    return f"\\frac{{{above}}}{{{below}}}"


def _script(match: re.Match[str]) -> str:
    if match[1]:
        return "^{" + "".join(_SUPERSCRIPTS[c] for c in match[1]) + "}"
    return "_{" + "".join(_SUBSCRIPTS[c] for c in match[2]) + "}"


def _bare(text: str) -> str:
    """The text without outer blanks, without a final period or comma, and without delimiters around all of it."""
    previous = None
    while text != previous:
        previous = text
        text = text.strip()
        text = re.sub(r"(?:(?<!\\)[.,;]|\\\.|\\\\)$", "", text).strip()
        for start, end in _OUTER:
            inner = text[len(start) : -len(end)]
            if (
                len(text) > len(start) + len(end) - 1
                and text.startswith(start)
                and text.endswith(end)
                and end not in inner
            ):
                text = inner
        if text.startswith("{") and _closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        if (match := re.fullmatch(r"\\text\s*\{([^{}]*\d[^{}]*)\}", text)) is not None:
            text = match[1]
    return text


# --- brackets and lists ------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|.", re.DOTALL)
_OPENING = {"(", "[", "{", r"\{", r"\langle"}
_CLOSING = {")", "]", "}", r"\}", r"\rangle"}


def _closing(text: str, start: int) -> int:
    """The index where the bracket that opens at `start` closes, or -1. ( and [ may close one another."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        if match[0] in _OPENING:
            depth += 1
        elif match[0] in _CLOSING:
            depth -= 1
            if depth == 0:
                return match.end() - 1
    return -1


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """The pieces between the matches of `separator` outside of brackets and of LaTeX commands."""
    pieces, start, depth, position = [], 0, 0, 0
    while position < len(text):
        if depth == 0 and (match := separator.match(text, position)) and match.end() > position:
            pieces.append(text[start:position])
            start = position = match.end()
            continue
        token = _TOKEN.match(text, position)
        assert token is not None
        depth += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if depth < 0:
            return [text]
        position = token.end()
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces]


_COMMA = re.compile(r"[,;]")
_LIST_SEPARATOR = re.compile(
    r"\s*[,;]?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|,?\s+(?:and|or)\s+|[,;]\s*(?:(?:and|or)\s)?|\\lor(?![a-zA-Z])"
)
_SPACED_SEPARATOR = re.compile(
    r"\s*[,;]?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|,?\s+(?:and|or)\s+|(?:,\s|;)\s*(?:(?:and|or)\s)?|\\lor(?![a-zA-Z])"
)
_THOUSANDS = re.compile(r"[+-]?(?:\\?\$\s?)?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)")
_PART = re.compile(r"\(([a-h]|i{1,3}|iv|[1-4])\)\s*")


@dataclass(frozen=True)
class Collection:
    """Several answers, or one answer with several parts."""

    opening: str
    """``(``, ``[``, ``{``; empty for a bare list."""
    closing: str
    items: tuple[str, ...]

    @property
    def is_set(self) -> bool:
        return self.opening == "{"

    @property
    def is_tuple(self) -> bool:
        return self.opening in ("(", "[")

    @property
    def is_list(self) -> bool:
        return self.opening == ""


def read_collection(text: str) -> Collection | None:
    """A bracketed tuple, vector or set, or a bare list; ``\\pm`` counts as two items there and in sets."""
    for opening, opens in (("(", "("), ("[", "["), ("{", r"\{"), ("(", r"\langle")):
        if not text.startswith(opens):
            continue
        end = _closing(text, 0)
        if end != len(text) - 1:
            break
        closes = r"\}" if opens == r"\{" else r"\rangle" if opens == r"\langle" else text[-1]
        inner = text[len(opens) : len(text) - len(closes)]
        items = split_outside(inner, _COMMA)
        if opening == "{":
            if not inner.strip() or "|" in inner or r"\mid" in inner:
                return None
            return Collection("{", "}", tuple(_signs(items)))
        return (
            Collection(opening, closes if closes in ")]" else ")", tuple(items)) if len(items) > 1 else None
        )
    wrapped = _TEXT.fullmatch(text)
    return _read_list(wrapped[1] if wrapped else text)


def _read_list(text: str) -> Collection | None:
    if _THOUSANDS.fullmatch(text):
        return None
    parts = _PART.split(text)
    if len(parts) > 3 and not parts[0].strip():
        items = [_bare(part) for part in parts[2::2]]
        if all(items):
            return Collection("", "", tuple(items))
    spaced = split_outside(text, _SPACED_SEPARATOR)
    items = spaced if len(spaced) > 1 and _THOUSANDS.search(text) else split_outside(text, _LIST_SEPARATOR)
    items = _signs([item for item in items if item])
    return Collection("", "", tuple(items)) if len(items) > 1 else None


def _signs(items: list[str]) -> list[str]:
    found: list[str] = []
    for item in items:
        first, sign, rest = item.partition(r"\pm")
        if sign and r"\pm" not in rest and r"\mp" not in item:
            found += [f"{first}+{rest}" if first.strip() else rest.strip(), f"{first}-{rest}"]
        else:
            found.append(item)
    return found


_MATRIX = re.compile(
    r"\\begin\s*\{([pbB]?)(?:matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\s*\{\1(?:matrix|array)\}", re.DOTALL
)


def read_matrix(text: str) -> tuple[tuple[str, ...], ...] | None:
    """Rows of entries."""
    match = _MATRIX.fullmatch(text)
    if match is None or r"\begin" in match[2]:
        return None
    rows = re.split(r"\\\\(?:\[[^\]]*\])?", match[2])
    return tuple(tuple(entry.strip() for entry in row.split("&")) for row in rows if row.strip())


# --- sets of real numbers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    low: str
    high: str
    low_is_open: bool
    high_is_open: bool


_EMPTY = re.compile(
    r"\\emptyset|\\\{\s*\\\}|\{\s*\}|(?:the )?empty set|no (?:real |integer )?solutions?(?: exists?)?|none",
    re.IGNORECASE,
)
_REALS = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?|\\R|(?:all |the )?(?:set of )?(?:all )?(?:real numbers|reals)", re.IGNORECASE
)
_MEMBER = re.compile(r"(?:\\text\s*\{[^{}]*\}\s*)?(?:[a-zA-Z]|\\[a-z]+)\s*\\in\s+(?=[(\[\\])")
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\s+or\s+|,|\\lor(?![a-zA-Z])|\\cup(?![a-zA-Z])")
_BOTH = re.compile(r"\\text\s*\{\s*and\s*\}|\s+and\s+|,|\\land(?![a-zA-Z])")
_ORDER = re.compile(r"(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z]))")
_VARIABLE = re.compile(r"[a-zA-Z]|\\(?:alpha|beta|theta|lambda|phi|mu)")
_INFINITY = r"\infty"


def is_empty_set(text: str) -> bool:
    return _EMPTY.fullmatch(_words(text)) is not None


def read_intervals(text: str) -> tuple[Interval, ...] | None:
    """The union of intervals in `text`, written with brackets, with inequalities in one variable, or as a set."""
    text = re.sub(
        r"^\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|\||:)(.*)\\\}$", r"\2", text
    ).strip()
    if match := _MEMBER.match(text):
        text = text[match.end() :]
    if _REALS.fullmatch(_words(text)):
        return (Interval(f"-{_INFINITY}", _INFINITY, True, True),)
    by_brackets = [_bracketed(part) for part in split_outside(text, _CUP)]
    if all(by_brackets):
        return tuple(part for part in by_brackets if part is not None)
    by_order: list[Interval] = []
    for part in split_outside(text, _OR):
        found = _ordered(part)
        if found is None:
            break
        by_order += found
    else:
        return _bounded(text) or tuple(by_order)
    return _bounded(text)


def _bracketed(text: str) -> Interval | None:
    if not text or text[0] not in "([" or text[-1] not in ")]" or _closing(text, 0) != len(text) - 1:
        return None
    ends = split_outside(text[1:-1], _COMMA)
    if len(ends) != 2 or not all(ends):
        return None
    return Interval(ends[0], ends[1], text[0] == "(", text[-1] == ")")


def _bounded(text: str) -> tuple[Interval, ...] | None:
    """``x > 0 and x < 5``: one bound from either side."""
    bounds = [_ordered(part) for part in split_outside(text, _BOTH)]
    if len(bounds) != 2 or any(found is None or len(found) != 1 for found in bounds):
        return None
    first, second = (found[0] for found in bounds if found)
    low, high = (first, second) if second.low == f"-{_INFINITY}" else (second, first)
    if low.high != _INFINITY or high.low != f"-{_INFINITY}" or re.search(r"\bor\b", text):
        return None
    if "," in text and not _is_below(low.low, high.high):
        return None  # x < 0, x > 5: two rays
    return (Interval(low.low, high.high, low.low_is_open, high.high_is_open),)


def _is_below(low: str, high: str) -> bool:
    try:
        return float(low) < float(high)
    except ValueError:
        return False


def _ordered(text: str) -> list[Interval] | None:
    pieces = [piece.strip() for piece in _ORDER.split(text)]
    if len(pieces) not in (3, 5) or not all(pieces) or "=" in text:
        return None
    sides, signs = pieces[::2], pieces[1::2]
    if len(sides) == 2 and _VARIABLE.fullmatch(sides[1]) and not _VARIABLE.fullmatch(sides[0]):
        sides, signs = sides[::-1], [_flipped(signs[0])]
    if len(sides) == 2 and _VARIABLE.fullmatch(sides[0]) and not _VARIABLE.fullmatch(sides[1]):
        (_, bound), (sign,) = sides, signs
        below = Interval(f"-{_INFINITY}", bound, True, sign != r"\le")
        above = Interval(bound, _INFINITY, sign != r"\ge", True)
        return {"<": [below], r"\le": [below], ">": [above], r"\ge": [above], r"\ne": [below, above]}[sign]
    if len(sides) == 3 and _VARIABLE.fullmatch(sides[1]) and r"\ne" not in signs:
        if signs[0] in (">", r"\ge"):
            sides, signs = sides[::-1], [_flipped(sign) for sign in reversed(signs)]
        if signs[0] in ("<", r"\le") and signs[1] in ("<", r"\le"):
            return [Interval(sides[0], sides[2], signs[0] == "<", signs[1] == "<")]
    return None


def _flipped(sign: str) -> str:
    return {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}[sign]


# --- number bases, options, words --------------------------------------------------------------------------------

_BASE_WORDS = {
    word: number
    for number, word in enumerate(
        re.findall(
            r"\w+",
            "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
        ),
        start=2,
    )
}
_BASED = re.compile(
    r"\(?\s*(-?[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\s*\)?\s*(?:_\s*\{?\s*\(?\s*(?:base\s*)?([0-9]{1,2}|[a-z]+)\s*\)?\s*\}?"
    r"|\(?\s*(?:in )?base[\s-]*([0-9]{1,2}|[a-z]+)\s*\)?)"
)


@dataclass(frozen=True)
class Based:
    digits: str
    base: int

    @property
    def value(self) -> int | None:
        """The value of the number; None if a digit is not valid in its base."""
        try:
            return int(self.digits, self.base)
        except ValueError:
            return None


def read_based(text: str) -> Based | None:
    """``2516_8``, ``2516_{\\text{eight}}``, ``(2516)_8``, ``2516 base 8``."""
    match = _BASED.fullmatch(_words(text))
    if match is None:
        return None
    base_text = match[2] or match[3]
    base = int(base_text) if base_text.isdigit() else _BASE_WORDS.get(base_text, 0)
    sign, digits = ("-", match[1][1:]) if match[1].startswith("-") else ("", match[1])
    if not 2 <= base <= 36 or not (any(c.isdigit() for c in digits) or (base > 10 and digits.isupper())):
        return None
    if not digits[0].isdigit() and not (base > 10 and digits.isupper()):
        return None  # a variable's index: x1_2
    return Based(sign + (digits.upper().lstrip("0") or "0"), base)


_OPTION = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s*)?(?:\(\s*([A-Ja-j])\s*\)|([A-J])\s*[.):]|([A-J])(?=\s*$)|([A-J])(?=\s+\())\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)


def read_option(text: str) -> tuple[str, str] | None:
    """(letter, text after it) of an option such as ``(B)``, ``B.``, ``Option B`` or ``(B) 12``."""
    bare = _words(text)
    match = _OPTION.fullmatch(bare)
    if match is None or _PART.search(match[5]):
        return None
    letter = match[1] or match[2] or match[3] or match[4]
    if not match[1] and letter.islower() and "option" not in bare.lower() and "choice" not in bare.lower():
        return None  # a variable
    return letter.upper(), match[5].strip()


_LETTERS = re.compile(r"\(?[A-J]\)?(?:(?:\s*,\s*(?:and )?|\s+and\s+|\s*)\(?[A-J]\)?){1,9}")


def read_options(text: str) -> frozenset[str] | None:
    """Several options: ``ABD``, ``A, B and D``."""
    bare = _words(text)
    return frozenset(c for c in bare if c.isupper()) if _LETTERS.fullmatch(bare) else None


def _words(text: str) -> str:
    """Return the text without ``\\text{}`` around words."""
    return re.sub(r"\s+", " ", _TEXT.sub(r"\1", text)).strip(" .\"'")


_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|['’ -])*")
_MATHEMATICAL = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "ln",
    "exp",
    "sqrt",
    "arcsin",
    "arccos",
    "arctan",
}


def read_words(text: str) -> str | None:
    """A word or a few, in lower case and without articles: ``\\text{Evelyn}``, ``east``, ``the ellipse``."""
    bare = _words(text)
    if not _WORDS.fullmatch(bare) or "\\" in bare:
        return None
    words = bare.lower().split()
    if r"\text" not in text and (
        (len(max(words, key=len)) < 3 and bare.lower() != "no") or words[0] in _MATHEMATICAL
    ):
        return None
    if len(bare) == 1:
        return None
    return " ".join(word for word in words if word not in ("the", "a", "an")) or None


# --- quantities --------------------------------------------------------------------------------------------------

_LABEL = re.compile(
    r"(\\text\s*\{[^{}]*\}|[A-Za-z]{2,}(?: [A-Za-z]+){0,3}|[A-Za-z]|\\(?!frac|sqrt|text)[a-zA-Z]+"
    r"|\([a-z](?:\s*,\s*[a-z])+\))"
    r"(_\{?\w+\}?)?('?(?:\s*\([^()]*\))?)\s*(?:=|\\approx(?![a-zA-Z])|\\in(?![a-zA-Z]))\s*"
)
_EQUALS = re.compile(r"=|\\approx(?![a-zA-Z])")


def split_label(text: str) -> tuple[str | None, str]:
    """``x = 4/2 = 2`` -> ("x", "2"). The result is (None, text) if the left side is not a single name."""
    match = _LABEL.match(text)
    if match is None:
        return None, text
    label = _words(match[1]) + (match[2] or "").translate({123: None, 125: None}) + match[3].replace(" ", "")
    return label, split_outside(text[match.end() :], _EQUALS)[-1]


def is_equation(text: str) -> bool:
    return re.search(r"(?<![<>!\\])=", text) is not None


_UNITS = {
    "cm": "cm centimeter centimeters centimetre centimetres cms",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "km": "km kilometer kilometers kilometre kilometres kms",
    "m": "m meter meters metre metres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "g": "g gram grams gm",
    "kg": "kg kilogram kilograms kgs",
    "mg": "mg milligram milligrams",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "l": "l L liter liters litre litres",
    "ml": "ml mL milliliter milliliters millilitre millilitres",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "mph": "mph",
    "km/h": "kmh kph km/h km/hr kmph",
    "m/s": "m/s",
    "degree": "degree degrees deg",
    "celsius": "celsius",
    "fahrenheit": "fahrenheit",
    "radian": "radian radians rad",
    "dollar": "dollar dollars usd",
    "cent": "cent cents",
    "euro": "euro euros eur",
    "yen": "yen",
    "rupee": "rupee rupees rs",
}
_CANONICAL = {name: unit for unit, names in _UNITS.items() for name in names.split()}
_POWER_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_IGNORED_WORDS = {
    "per",
    "of",
    "the",
    "in",
    "each",
    "total",
    "long",
    "old",
    "away",
    "tall",
    "wide",
    "high",
    "unit",
    "units",
}
_CURRENCY_FIRST = re.compile(
    r"(-?)\s*(?:\\?\$|\\text\s*\{\s*(?:\\?\$|euros|pounds|yen|rupees|USD)\s*\}|USD|Rs\.?)\s*(?=[-\d.\\(])"
)
_CURRENCY_NAMES = re.compile(r"euros|pounds|yen|rupees")
_TRAILING_TEXT = re.compile(r"\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*([23])\s*\}?|\{\s*\^\s*([23])\s*\})?$")
_TRAILING_WORDS = re.compile(
    r"(?<=[\d})!'])\s*((?:[a-zA-Z]+(?:/[a-zA-Z]+)?)(?:[ -]+[a-zA-Z]+(?:/[a-zA-Z]+)?){0,6})"
    r"\s*\.?\s*(?:\^\s*\{?\s*([23])\s*\}?)?$"
)
_TRAILING_DEGREE = re.compile(r"\s*\^\{\\circ\}\s*(?:\\text\s*\{\s*)?([CF])?\s*\}?$")
_TRAILING_DOLLAR = re.compile(r"(?<=[\d}])\s*\\?\$$")
_TRAILING_PERCENT = re.compile(r"\s*\\%$")
_ATTACHED = {"m", "g", "s", "h", "l", "L"}


@dataclass(frozen=True)
class Quantity:
    text: str
    unit: str | None = None
    """The short name of a known unit with its power, such as cm^2. None without a unit, or for a noun such as
    "apples"."""
    is_percent: bool = False


def read_quantity(text: str, *, other: str = "") -> Quantity:
    """Text without units, currency and percent sign.

    Args:
        other: the answer it is compared with. A single letter stuck to a number is a unit only where `other` has no
            letters, and a variable else.
    """
    units: list[str] = []
    is_percent = False
    for _ in range(3):
        before = text
        if match := _CURRENCY_FIRST.match(text):
            name = _CURRENCY_NAMES.search(match[0])
            units.append(_CANONICAL.get(name[0], "dollar") if name else "dollar")
            text = match[1] + text[match.end() :]
        if match := _TRAILING_PERCENT.search(text):
            is_percent, text = True, text[: match.start()]
        if match := _TRAILING_DOLLAR.search(text):
            units.append("dollar")
            text = text[: match.start()]
        if (match := _TRAILING_DEGREE.search(text)) and match.start():
            units.append({"C": "celsius", "F": "fahrenheit"}.get(match[1] or "", "degree"))
            text = text[: match.start()]
        if (match := _TRAILING_TEXT.search(text)) and match.start() and "base" not in match[1]:
            units += _units(match[1], match[2] or match[3])
            text = text[: match.start()]
        elif (match := _TRAILING_WORDS.search(text)) and _are_units(match[1], text[: match.start(1)], other):
            units += _units(match[1], match[2])
            text = text[: match.start()]
        text = text.strip()
        if text == before:
            break
    return Quantity(text, "/".join(units) or None, is_percent)


def _are_units(words: str, number: str, other: str) -> bool:
    names = re.split(r"[ -]+", words)
    if len(names) == 1 and len(words) == 1:
        is_apart = number.endswith(" ")
        return (
            words in _ATTACHED
            and not re.search(r"[a-zA-Z]", other)
            and (is_apart or not re.search(r"[a-zA-Z]", number))
        )
    if len(names) == 1 and words not in _CANONICAL and (len(words) < 3 or not number.endswith(" ")):
        return False
    return names[0] not in _MATHEMATICAL and (
        re.search(r"[a-zA-Z]", number.replace(r"\frac", "").replace(r"\sqrt", "").replace(r"\pi", "")) is None
        or number.endswith(" ")
    )


def _units(words: str, power: str | None) -> list[str]:
    found, exponent = [], int(power) if power else 1
    for word in re.split(r"[\s.-]+", words.strip()):
        word = word.strip(" ,")
        name = _CANONICAL.get(word) or _CANONICAL.get(word.lower())
        if word.lower() in _POWER_WORDS:
            exponent = _POWER_WORDS[word.lower()]
        elif name:
            found.append(name)
    if found and exponent > 1:
        found[-1] += f"^{exponent}"
    return found
