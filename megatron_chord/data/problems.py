"""Finds problems that are in several data sets with the same text, or with nearly the same text.

Two problems are equal when their texts differ only in letter case, white space and Unicode's compatibility forms. They
are nearly the same when at least ``NEAR`` of the shorter one's n-grams (``NGRAM_LENGTH`` words and signs) are in the
longer one. This is so when an instruction was added or a sentence changed. N-grams that many problems have, such as
those of an instruction, do not count.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_chord.data.observed import Observed

NGRAM_LENGTH = 8
NEAR = 0.8
COMMON = 0.01
"""N-grams that occur in more than this share of all problems do not count."""
MIN_NGRAMS = 4
"""A problem with fewer n-grams is only compared as a whole."""
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Problem:
    place: str
    key: bytes
    ngrams: frozenset[int]


@dataclass(frozen=True)
class Pair:
    """A problem of one set, and an equal or nearly equal problem of another set."""

    place: str
    other: str
    shared: float
    """Share of the shorter problem's n-grams that are in the other; 1 if the texts are equal."""


def problem_of(seen: Observed) -> Problem:
    """The question: all messages except the system's, up to the last turn of the assistant."""
    messages = seen.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = "\n".join(message["content"] for message in messages if message["role"] != "system")
    return Problem(seen.place, text_key(text), _ngrams(text))


def text_key(text: str) -> bytes:
    """A key of 16 bytes, equal for texts whose ``plain_text`` is equal."""
    return hashlib.blake2b(plain_text(text).encode(errors="surrogatepass"), digest_size=16).digest()


def plain_text(text: str) -> str:
    """``text`` without differences in letter case, white space and Unicode's compatibility forms."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def overlap(ones: Sequence[Problem], others: Sequence[Problem]) -> list[Pair]:
    """The problems of ``others`` that are equal or nearly equal to one of ``ones``, in order, each with its best
    match."""
    place_of: dict[bytes, str] = {}
    for one in ones:
        place_of.setdefault(one.key, one.place)
    near = _near(ones, [other for other in others if other.key not in place_of])
    pairs = []
    for other in others:
        if other.key in place_of:
            pairs.append(Pair(place_of[other.key], other.place, 1.0))
        elif other.place in near:
            place, shared = near[other.place]
            pairs.append(Pair(place, other.place, shared))
    return pairs


def repeated(problems: Iterable[Problem]) -> list[list[str]]:
    """Groups of two or more indices of equal problems, ordered by the first index of each group."""
    groups: dict[bytes, list[str]] = defaultdict(list)
    for problem in problems:
        groups[problem.key].append(problem.place)
    return [places for places in groups.values() if len(places) > 1]


def _near(ones: Sequence[Problem], others: Sequence[Problem]) -> dict[str, tuple[str, float]]:
    frequency = Counter(ngram for problem in (*ones, *others) for ngram in problem.ngrams)
    often = max(10, (len(ones) + len(others)) * COMMON)
    common = {ngram for ngram, count in frequency.items() if count > often}
    own_ngrams = [other.ngrams - common for other in others]
    holders: dict[int, list[int]] = defaultdict(list)
    for index, ngrams in enumerate(own_ngrams):
        if len(ngrams) >= MIN_NGRAMS:
            for ngram in ngrams:
                holders[ngram].append(index)
    best: dict[str, tuple[str, float]] = {}
    for one in ones:
        ngrams = one.ngrams - common
        if len(ngrams) < MIN_NGRAMS:
            continue
        for index, count in Counter(index for ngram in ngrams for index in holders.get(ngram, ())).items():
            shared = count / min(len(ngrams), len(own_ngrams[index]))
            place = others[index].place
            if shared >= NEAR and shared > best.get(place, ("", 0.0))[1]:
                best[place] = (one.place, shared)
    return best


def _ngrams(text: str) -> frozenset[int]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return frozenset(
        hash(tuple(words[start : start + NGRAM_LENGTH])) for start in range(len(words) - NGRAM_LENGTH + 1)
    )
