"""Prints an ``Inspection`` in a terminal. Without colours the same tokens are marked with brackets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.text import Text

from megatron_chord.data.inspect import Example, Inspection, Lengths, Overlap, SetReport, findings
from megatron_chord.data.token_texts import TokenText
from megatron_chord.rewards.reading import DOUBTFUL, MEANING

_BAR = 40
_BINS = 12
_SHOWN = 3
MAX_TOKENS = 400
"""Number of tokens that a terminal shows from the beginning of an example. It shows half as many from the end."""

_STYLES = {  # (is trained, is text of the template) -> styles of neighbouring tokens, in turn
    (False, False): ("default", "bright_black"),
    (False, True): ("blue", "bright_blue"),
    (True, False): ("black on green", "black on bright_green"),
    (True, True): ("black on yellow", "black on bright_yellow"),
}
_NAMES = {
    (False, False): ("text that is not trained", "", ""),
    (False, True): ("text of the template, not trained", "[~", "~]"),
    (True, False): ("text that is trained", "{+", "+}"),
    (True, True): ("text of the template, trained", "{~", "~}"),
}


def show(inspection: Inspection, console: Console) -> None:
    """Print the whole inspection."""
    for report in inspection.reports:
        console.print(Text(report))
    for one in inspection.sets:
        for part in _set(one, plain=console.color_system is None or console.no_color):
            console.print(part)
    if inspection.overlaps:
        console.print("")
        console.print(Rule(Text("the same problems in two sets", "bold"), align="left", style="dim"))
        for found in inspection.overlaps:
            console.print(_overlap(found))
    worth = findings(inspection)
    if worth:
        console.print("")
        console.print(Rule(Text("worth a look", "bold yellow"), align="left", style="dim"))
        for text in worth:
            console.print(Text(f"  {text}"))


def _set(report: SetReport, *, plain: bool) -> Iterator[RenderableType]:
    yield ""
    yield Rule(
        Text(f"{report.name}: {report.num_kept:,} of {report.num_rows:,} rows", "bold"),
        align="left",
        style="dim",
    )
    if len(report.files) > 1:
        wide = max(len(file) for file, _, _ in report.files)
        for file, rows, overlong in report.files:
            left_out = f", {overlong:,} left out as over-long" if overlong else ""
            yield Text(f"  {file:<{wide}}  {rows:>9,} rows{left_out}")
    for lengths in report.lengths:
        yield ""
        yield from _lengths(lengths)
    if report.truths:
        yield ""
        yield from _truths(report)
    yield ""
    yield from _repeats(report)
    if report.examples:
        yield ""
        yield _legend(plain=plain)
    for example in report.examples:
        yield ""
        yield from _example(example, plain=plain)


def _lengths(lengths: Lengths) -> Iterator[Text]:
    over = f", {lengths.num_over:,} over it" if lengths.num_over else ""
    yield Text.assemble(
        (f"  tokens, {lengths.part}: ", "bold"),
        f"median {lengths.quantile(0.5):,}, 95 % up to {lengths.quantile(0.95):,}, longest {max(lengths.values):,}; ",
        (f"limit {lengths.limit:,}{over}", "red" if over else ""),
        (f" ({lengths.setting})", "dim"),
    )
    bins = lengths.bins(_BINS)
    most = max(rows for _, _, rows in bins)
    wide = len(f"{bins[-1][1]:,}")
    for first, last, rows in bins:
        bar = "#" * max(round(_BAR * rows / most), rows > 0)
        beyond = first > lengths.limit
        yield Text.assemble(
            (f"  {first:>{wide},} - {last:>{wide},} ", "dim"),
            (f"{bar:<{_BAR}}", "red" if beyond else "cyan"),
            f" {rows:,}",
            (" over the limit" if beyond and rows else "", "red"),
        )


def _truths(report: SetReport) -> Iterator[Text]:
    yield Text("  truths, as the grader reads them", "bold")
    if report.num_truths_read < report.num_truths:
        yield Text(f"  (the first {report.num_truths_read:,} of {report.num_truths:,} different ones)", "dim")
    for kind in report.truths:
        yield Text.assemble(
            f"  {kind.count:>9,}  ", (MEANING[kind.kind], "bold red" if kind.kind in DOUBTFUL else "green")
        )
        for place, truth, read in kind.examples[: 5 if kind.kind in DOUBTFUL else 2]:
            yield Text(f"             {place}  {_short(truth)} is read as {_short(read)}", "dim")


def _repeats(report: SetReport) -> Iterator[Text]:
    yield _listed(
        f"problems that occur in several rows: {len(report.repeated):,}",
        [" = ".join(places) for places in report.repeated],
    )
    if any(lengths.part == "trained" for lengths in report.lengths):
        yield _listed(
            f"demonstrations that occur twice, including the answer: {len(report.identical):,}",
            [" = ".join(places) for places in report.identical],
            bad=True,
        )
    if report.truths:
        yield _listed(
            f"problems with two different truths: {len(report.contradicting):,}",
            [f"{a} says {_short(x)}, {b} says {_short(y)}" for a, x, b, y in report.contradicting],
            bad=True,
        )


def _overlap(found: Overlap) -> Text:
    equal = sum(pair.shared == 1 for pair in found.pairs)
    return _listed(
        f"{len(found.pairs):,} of {found.num_other:,} problems of {found.other} are also in {found.one}"
        + (f" ({len(found.pairs) - equal:,} of them nearly)" if equal < len(found.pairs) else ""),
        [f"{pair.other} = {pair.place} ({pair.shared:.0%})" for pair in found.pairs],
        bad=found.is_contamination,
    )


def _listed(title: str, items: Sequence[str], *, bad: bool = False) -> Text:
    text = Text(f"  {title}", "bold red" if bad and items else "")
    for item in items[:_SHOWN]:
        text.append(f"\n    {item[:200]}", "not bold dim")
    if len(items) > _SHOWN:
        text.append(f"\n    and {len(items) - _SHOWN:,} more", "not bold dim")
    return text


def _legend(*, plain: bool) -> Text:
    text = Text("  examples: ", "bold")
    for kind, (name, opening, closing) in _NAMES.items():
        if kind != (False, False):
            text.append(
                f"{opening}{name}{closing}" if plain else f" {name} ", "" if plain else _STYLES[kind][0]
            )
            text.append("  ")
    return text


def _example(example: Example, *, plain: bool) -> Iterator[Text]:
    seen, tokens = example.seen, example.rendered.tokens
    trained = f", {sum(seen.trainable):,} of them trained" if seen.trainable else ""
    yield Text(f"  {example.title}: {seen.place}, {len(tokens):,} tokens{trained}", "bold")
    for index in example.rendered.rewritten:
        yield Text(
            f"  the text of message {index} ({seen.messages[index]['role']}) is not in it as it was written: the "
            "template or the tokenizer changes or drops it",
            "bold red",
        )
    text = Text()
    if len(tokens) <= MAX_TOKENS * 3 // 2:
        _append(text, tokens, plain=plain)
    else:
        _append(text, tokens[:MAX_TOKENS], plain=plain)
        text.append(f"\n... {len(tokens) - MAX_TOKENS * 3 // 2:,} tokens ...\n", "dim italic")
        _append(text, tokens[-MAX_TOKENS // 2 :], plain=plain)
    yield text


def _append(text: Text, tokens: Sequence[TokenText], *, plain: bool) -> None:
    for kind, run in groupby(tokens, key=lambda token: (token.is_trained, token.is_template)):
        _, opening, closing = _NAMES[kind]
        if plain:
            text.append(f"{opening}{''.join(visible(token.text) for token in run)}{closing}")
            continue
        for index, token in enumerate(run):
            text.append(visible(token.text), _STYLES[kind][index % 2])


def visible(text: str) -> str:
    """The text without control characters of terminals; line feeds are kept."""
    return "".join(
        char if char == "\n" or char.isprintable() else "    " if char == "\t" else f"\\x{ord(char):02x}"
        for char in text
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
