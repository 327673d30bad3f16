"""Statistics of a run's data: counts, lengths, truths, duplicates, overlaps and a few rendered rows.

``Inspector`` observes the rows while they are read, with one ``Watcher`` for each data set. Only the examples are
stored completely; of the other rows only what the statistics need is stored.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_chord.data.observed import Observed
from megatron_chord.data.problems import Pair, Problem, overlap, problem_of, repeated
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.data.token_texts import RenderedTokens, rendered_tokens
from megatron_chord.rewards.reading import DOUBTFUL, MEANING, TruthReading, readings

Grader = Callable[[str], "tuple[str, str] | None"]
"""Maps the name of a data source to the way its truths are read: a kind of ``rewards.reading`` and its marker, or
None."""
MAX_TRUTHS = 2000
"""Maximum number of different truths of each data set that are read."""


@dataclass(frozen=True)
class Lengths:
    """Number of tokens of one part of each row, over-long rows included."""

    part: str
    values: tuple[int, ...]
    limit: int
    setting: str
    """The setting that sets the limit."""

    @property
    def num_over(self) -> int:
        return sum(value > self.limit for value in self.values)

    def quantile(self, share: float) -> int:
        """The smallest value that at least ``share`` of all values do not exceed."""
        ordered = sorted(self.values)
        return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]

    def bins(self, count: int) -> list[tuple[int, int, int]]:
        """(first, last, rows): at most ``count`` equal ranges of lengths, from the smallest to the greatest."""
        least = min(self.values)
        width = -(-(max(self.values) - least + 1) // count)
        rows = Counter((value - least) // width for value in self.values)
        return [(least + i * width, least + (i + 1) * width - 1, rows[i]) for i in range(max(rows) + 1)]


@dataclass(frozen=True)
class TruthKind:
    """Truths that the grader reads in the same way."""

    kind: str
    """A key of ``rewards.reading.MEANING``."""
    count: int
    examples: tuple[tuple[str, str, str], ...]
    """(place, truth, what is read)"""


@dataclass(frozen=True)
class Example:
    title: str
    seen: Observed
    rendered: RenderedTokens


@dataclass(frozen=True, kw_only=True)
class SetReport:
    """One of the run's data sets."""

    name: str
    files: tuple[tuple[str, int, int], ...]
    """(file, number of rows, number of rows left out as over-long)"""
    lengths: tuple[Lengths, ...]
    repeated: tuple[tuple[str, ...], ...]
    """Places of rows with the same problem."""
    identical: tuple[tuple[str, ...], ...]
    """Places of demonstrations that are the same from the first token to the last."""
    contradicting: tuple[tuple[str, str, str, str], ...]
    """(place, truth, other place, other truth): the same problem with two truths."""
    truths: tuple[TruthKind, ...]
    num_truths_read: int
    """Different truths, at most ``MAX_TRUTHS``."""
    num_truths: int
    examples: tuple[Example, ...]

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows, _ in self.files)

    @property
    def num_kept(self) -> int:
        return sum(rows - overlong for _, rows, overlong in self.files)


@dataclass(frozen=True)
class Overlap:
    """Problems that occur in both ``one`` and ``other``."""

    one: str
    other: str
    pairs: tuple[Pair, ...]
    num_other: int

    @property
    def is_contamination(self) -> bool:
        return self.other == "evaluation"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    reports: tuple[str, ...]
    """One line for each file, as at the start of a run."""
    sets: tuple[SetReport, ...]
    overlaps: tuple[Overlap, ...]


def findings(inspection: Inspection) -> list[str]:
    """What the user should check before the run, one sentence each."""
    found = []
    for one in inspection.sets:
        if one.num_kept < one.num_rows:
            left_out = one.num_rows - one.num_kept
            found.append(
                f"{one.name}: {left_out:,} of {one.num_rows:,} rows are over a limit and are left out "
                f"({left_out / one.num_rows:.1%})"
            )
        for kind in one.truths:
            if kind.kind in DOUBTFUL:
                place, truth, _ = kind.examples[0]
                found.append(
                    f"{one.name}: {kind.count:,} of the truths are read as {MEANING[kind.kind]}; the first is "
                    f"{truth[:60]!r} ({place})"
                )
        if one.contradicting:
            found.append(
                f"{one.name}: {len(one.contradicting):,} times the same problem has two different truths"
            )
        if one.identical:
            found.append(
                f"{one.name}: {len(one.identical):,} times the same row, including the answer, occurs twice"
            )
        rewritten = [example.seen.place for example in one.examples if example.rendered.rewritten]
        if rewritten:
            found.append(
                f"{one.name}: the chat template or the tokenizer changes or drops a message ({', '.join(rewritten)})"
            )
    for overlapping in inspection.overlaps:
        if overlapping.is_contamination and overlapping.pairs:
            found.append(
                f"{len(overlapping.pairs):,} of {overlapping.num_other:,} problems of {overlapping.other} are also "
                f"in {overlapping.one}: the measurement then includes trained problems"
            )
    return found


@dataclass
class Watcher:
    """Collects the statistics of one data set. Call it with every row."""

    name: str
    max_prompt_tokens: int
    max_response_tokens: int
    num_examples: int
    num_sampled: int = 0
    problems: list[Problem] = field(default_factory=list)
    _files: dict[str, list[int]] = field(default_factory=dict)
    _lengths: list[tuple[int, int]] = field(default_factory=list)
    _truths: list[tuple[Problem, str, str]] = field(default_factory=list)
    _answers: list[Problem] = field(default_factory=list)
    _examples: dict[str, Observed] = field(default_factory=dict)
    sampled: list[Observed] = field(default_factory=list)
    """``num_sampled`` rows of all rows that are not left out, drawn uniformly and reproducibly."""
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def __call__(self, seen: Observed) -> None:
        counts = self._files.setdefault(seen.place.rpartition(":")[0], [0, 0])
        counts[0] += 1
        counts[1] += seen.is_overlong
        trained = sum(seen.trainable)
        self._lengths.append((len(seen.token_ids) - trained, trained))
        if seen.is_overlong:
            return
        self.problems.append(problem_of(seen))
        if seen.truth:
            self._truths.append((self.problems[-1], seen.truth, seen.source))
        if seen.trainable:
            ids = hashlib.blake2b(array("q", seen.token_ids).tobytes(), digest_size=16).digest()
            self._answers.append(Problem(seen.place, ids, frozenset()))
        self._keep(seen)
        if len(self.sampled) < self.num_sampled:
            self.sampled.append(seen)
        elif self.num_sampled and (place := self._random.randrange(len(self.problems))) < self.num_sampled:
            self.sampled[place] = seen

    def report(self, template: ChatTemplate, grader: Grader) -> SetReport:
        """The statistics of all rows that were observed."""
        truths, num_read = _truth_kinds(self._truths, grader)
        return SetReport(
            name=self.name,
            files=tuple((file, rows, overlong) for file, (rows, overlong) in self._files.items()),
            lengths=self._all_lengths(),
            repeated=tuple(map(tuple, repeated(self.problems))),
            identical=tuple(map(tuple, repeated(self._answers))),
            contradicting=tuple(self._contradicting()),
            truths=truths,
            num_truths_read=num_read,
            num_truths=len({truth for _, truth, _ in self._truths}),
            examples=tuple(
                Example(title, seen, rendered_tokens(template, seen)) for title, seen in self._chosen()
            ),
        )

    def _keep(self, seen: Observed) -> None:
        """The first rows, and those with the fewest and the most tokens in the relevant part."""
        for index in range(self.num_examples):
            if f"row {index}" not in self._examples:
                self._examples[f"row {index}"] = seen
                break
        for title, is_better in (
            ("shortest", lambda new, old: new < old),
            ("longest", lambda new, old: new > old),
        ):
            kept = self._examples.get(title)
            if kept is None or is_better(_size(seen), _size(kept)):
                self._examples[title] = seen

    def _chosen(self) -> list[tuple[str, Observed]]:
        """The rows to show, at most ``num_examples``, none of them twice."""
        first = self._examples.get("row 0")
        order = ["row 0", "longest", "shortest", *(f"row {index}" for index in range(1, self.num_examples))]
        chosen: dict[str, tuple[str, Observed]] = {}
        for title in order:
            seen = self._examples.get(title)
            if seen is not None and len(chosen) < self.num_examples:
                name = "first" if seen is first else title if title in ("longest", "shortest") else "another"
                chosen.setdefault(seen.place, (name, seen))
        return list(chosen.values())

    def _all_lengths(self) -> tuple[Lengths, ...]:
        prompts, responses = zip(*self._lengths, strict=True)
        asked = Lengths(
            "prompt" if not any(responses) else "not trained (the prompt)",
            prompts,
            self.max_prompt_tokens,
            "data.max_prompt_tokens",
        )
        if not any(responses):
            return (asked,)
        answered = Lengths("trained", responses, self.max_response_tokens, "data.max_response_tokens")
        return asked, answered

    def _contradicting(self) -> Iterable[tuple[str, str, str, str]]:
        first: dict[bytes, tuple[str, str]] = {}
        for problem, truth, _ in self._truths:
            known = first.setdefault(problem.key, (problem.place, truth))
            if known[1] != truth:
                yield (*known, problem.place, truth)


@dataclass
class Inspector:
    """Observes all data sets of a run. Pass ``observe`` to ``train.setup.load_data``."""

    max_prompt_tokens: int
    max_response_tokens: int
    num_examples: int = 3
    num_sampled: int = 0
    """Number of demonstrations in ``sampled`` of their watcher."""
    observe: dict[str, Watcher] = field(init=False)

    def __post_init__(self) -> None:
        limits = (self.max_prompt_tokens, self.max_response_tokens, self.num_examples, self.num_sampled)
        self.observe = {name: Watcher(name, *limits) for name in ("prompts", "demonstrations", "evaluation")}

    def inspection(self, template: ChatTemplate, reports: Iterable[str], grader: Grader) -> Inspection:
        """The statistics of all observed data sets. ``grader`` reads the truths."""
        watched = [watcher for watcher in self.observe.values() if watcher.problems]
        return Inspection(
            reports=tuple(reports),
            sets=tuple(watcher.report(template, grader) for watcher in watched),
            overlaps=tuple(
                Overlap(
                    one.name, other.name, tuple(overlap(one.problems, other.problems)), len(other.problems)
                )
                for index, one in enumerate(watched)
                for other in watched[index + 1 :]
            ),
        )


def _size(seen: Observed) -> int:
    return sum(seen.trainable) or len(seen.token_ids)


def _truth_kinds(
    truths: Sequence[tuple[Problem, str, str]], grader: Grader
) -> tuple[tuple[TruthKind, ...], int]:
    """The kinds, most frequent first, and how many different truths were read for them."""
    read: dict[tuple[Any, str], TruthReading] = {}
    asked = list(dict.fromkeys((grader(source), truth) for _, truth, source in truths))[:MAX_TRUTHS]
    for how in dict.fromkeys(how for how, _ in asked if how is not None):
        own = [truth for other, truth in asked if other == how]
        read |= zip([(how, truth) for truth in own], readings(own, *how), strict=True)
    counts: Counter[str] = Counter()
    examples: dict[str, dict[str, tuple[str, str, str]]] = {}
    for problem, truth, source in truths:
        reading = read.get((grader(source), truth))
        if reading is not None:
            counts[reading.kind] += 1
            examples.setdefault(reading.kind, {}).setdefault(truth, (problem.place, truth, reading.text))
    kinds = tuple(
        TruthKind(kind, count, tuple(list(examples[kind].values())[:5]))
        for kind, count in counts.most_common()
    )
    return kinds, len({truth for _, truth in read})
