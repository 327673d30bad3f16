"""The token lens in a terminal: the deeper the colour of a token, the greater its phi."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.style import Style
from rich.text import Text

from megatron_chord.data.lens import KNOWN, SURPRISING, Lens, LensedRow, words
from megatron_chord.data.screen import visible

_BAR = 40
_MOST = 8
_NEAR, _FAR = (236, 232, 250), (109, 40, 217)
"""Colours of phi = 0 and of phi = 1/4."""


def show_lens(lens: Lens, console: Console, *, shown: int) -> None:
    """Print the summary of all rows, and ``shown`` rows token by token."""
    console.print("")
    console.print(Rule(Text("the token lens", "bold"), align="left", style="dim"))
    p = lens.all("p")
    console.print(
        Text(
            f"  {len(lens.rows):,} demonstrations, {len(p):,} trained tokens, seen by {lens.policy}\n"
            f"  weight: {lens.weighting}\n"
            f"  mean p {p.mean():.3f}, mean phi {lens.all('phi').mean():.4f}; "
            f"phi drops {lens.dropped:.0%} of the tokens"
        )
    )
    for part in (*_classes(lens), *_histogram(lens)):
        console.print(part)
    plain = console.color_system is None or console.no_color
    for row in lens.rows[:shown]:
        console.print("")
        console.print(Text(f"  {row.example.seen.place}: {len(row.p):,} trained tokens", "bold"))
        if not plain:
            console.print(_tokens(row))
        for line in _greatest(row):
            console.print(line)


def _classes(lens: Lens) -> Iterator[Text]:
    yield Text(f"\n  {'':<28}{'tokens':>10}{'gradient, weight 1':>22}{'gradient, this weight':>24}", "bold")
    for one in lens.classes():
        yield Text(f"  {one.name:<28}{one.tokens:>10.1%}{one.plain:>22.1%}{one.weighted:>24.1%}")


def _histogram(lens: Lens) -> Iterator[Text]:
    counts, edges = np.histogram(lens.all("phi"), bins=10, range=(0, 0.25))
    yield Text("\n  tokens by phi", "bold")
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * max(round(_BAR * count / counts.max()), int(count > 0))
        yield Text.assemble(
            (f"  {low:.3f} - {high:.3f} ", "dim"), (f"{bar:<{_BAR}}", _shade((low + high) / 2)), f" {count:,}"
        )


def _tokens(row: LensedRow) -> Text:
    text = Text()
    of = dict(zip(row.positions.tolist(), zip(row.p, row.phi, strict=True), strict=True))
    for index, token in enumerate(row.example.rendered.tokens):
        if index not in of:
            text.append(visible(token.text), "bright_black")
            continue
        p, phi = of[index]
        style = _shade(phi) + Style(underline=bool(p < SURPRISING), dim=bool(p > KNOWN))
        text.append(visible(token.text), style)
    return text


def _greatest(row: LensedRow) -> Iterator[Text]:
    found = sorted(words(row), key=lambda word: -word[3])[:_MOST]
    yield Text(f"  {'greatest shares of the gradient':<34}{'p':>8}{'phi':>8}{'weight':>9}{'share':>8}", "dim")
    for text, p, weight, share in found:
        yield Text(f"    {text!r:<32.32}{p:>8.3f}{p * (1 - p):>8.3f}{weight:>9.3f}{share:>8.1%}", "dim")


def _shade(phi: float) -> Style:
    part = min(1.0, 4 * float(phi))
    red, green, blue = (round(near + (far - near) * part) for near, far in zip(_NEAR, _FAR, strict=True))
    return Style(color="white" if part > 0.45 else "black", bgcolor=f"#{red:02x}{green:02x}{blue:02x}")
