"""The token lens as a section of the page: the deeper the colour of a token, the greater its phi."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import numpy as np

from megatron_chord.data.lens import KNOWN, SURPRISING, Lens, LensedRow
from megatron_chord.data.page import heading_of, span, table

_SHADES = 20
_BINS = 50

LENS_STYLE = "".join(
    [
        ":root { --phi: #7c3aed; --known: #98a0ad; --surprise: #d1433f; }",
        "@media (prefers-color-scheme: dark) { :root { --phi: #9b6bff; --known: #6f7887; --surprise: #ff7b72; } }",
        *(
            f".f{shade} {{ background: color-mix(in oklab, var(--phi) {round(100 * (shade / _SHADES) ** 0.8)}%, "
            f"var(--paper)); color: {'#fff' if shade > 11 else 'var(--ink)'}; }}"
            for shade in range(1, _SHADES + 1)
        ),
        ".known { color: var(--known); } .surprise { text-decoration: underline wavy var(--surprise) 1.5px;",
        " text-underline-offset: .22em; } .lens .context { color: var(--own); }",
        ".lens .context, .lens .context * { box-shadow: none; }",
        ".classes table { table-layout: fixed; } ",
        ".strip { display: flex; margin-top: .15rem; height: 12px; border-radius: 6px; overflow: hidden; ",
        "border: 1px solid var(--line); }",
        ".strip i { flex: 1; }",
    ]
)


def lens_section(lens: Lens, *, shown: int) -> tuple[str, str, str]:
    """(anchor, heading, HTML) of the section, with ``shown`` rows token by token."""
    return "lens", "The token lens", f"<style>{LENS_STYLE}</style>{''.join(_parts(lens, shown))}"


def _parts(lens: Lens, shown: int) -> Iterator[str]:
    p = lens.all("p")
    yield (
        f"<p class=soft>The probability that <code>{escape(lens.policy)}</code> gives to each trained token, and the "
        "weight that the run gives to it. <b>p</b> is the policy's probability of the token, <b>φ = p(1 − p)</b>. "
        "The share of the gradient is weight × (1 − p) divided by its sum over the demonstration. Weight: "
        f"{escape(lens.weighting)}.</p>"
    )
    figures = (
        (f"{len(p):,}", f"trained tokens of {len(lens.rows):,} demonstrations"),
        (f"{p.mean():.3f}", "mean p"),
        (f"{lens.all('phi').mean():.3f}", "mean φ, at most 0.25"),
        (f"{lens.dropped:.0%}", f"of the tokens are dropped by φ (p > {KNOWN} or < {SURPRISING})"),
    )
    cells = "".join(
        f'<div class="figure"><b>{number}</b><span>{text}</span></div>' for number, text in figures
    )
    yield f'<div class="figures">{cells}</div>'
    yield f'<div class="card"><div class="charts">{_curve(p)}{_histogram(lens)}</div></div>'
    rows = [
        [escape(one.name), *(_meter(share) for share in (one.tokens, one.plain, one.weighted))]
        for one in lens.classes()
    ]
    head = ("where p is", "tokens", "gradient with weight 1", "gradient with this weight")
    yield f'<div class="card classes">{table(head, rows)}</div>'
    yield '<div class="card lens">'
    yield (
        '<div class="legend"><span class="f20">φ = 0.25</span><span class="f10">φ = 0.125</span>'
        '<span class="f3">φ = 0.04</span><span class="known">known already</span>'
        '<span class="surprise">a surprise</span><span class="context">not trained</span></div>'
    )
    most = max(float(lens.all("weight").max()), 0.0)
    for row in lens.rows[:shown]:
        yield f'{heading_of(row.example)}<pre class="tokens">{"".join(_spans(row, most))}</pre>'
    yield "</div>"


def _spans(row: LensedRow, most: float) -> Iterator[str]:
    numbers = zip(row.p, row.phi, row.weight, row.share, strict=True)
    of = dict(zip(row.positions.tolist(), numbers, strict=True))
    for index, token in enumerate(row.example.rendered.tokens):
        if index not in of:
            yield span(token, ' class="context"')
            continue
        p, phi, weight, share = of[index]
        names = [f"f{shade}"] if (shade := round(4 * phi * _SHADES)) else []
        names += ["known"] if p > KNOWN else ["surprise"] if p < SURPRISING else []
        values = f"{p:.6g} {phi:.6g} {weight:.6g} {share:.6g} {most:.6g}"
        yield span(token, f' class="{" ".join(names)}" data-p="{values}"')


def _curve(p: np.ndarray) -> str:
    """phi over p, filled with its colour, above the tokens by p."""
    width, height, below = 320.0, 90.0, 46.0
    counts, _ = np.histogram(p, bins=_BINS, range=(0, 1))
    step = width / _BINS
    slices, bars = [], []
    for index, count in enumerate(counts):
        middle = (index + 0.5) / _BINS
        phi = middle * (1 - middle)
        tall = 4 * phi * height
        slices.append(
            f'<rect x="{index * step:.1f}" y="{height - tall:.1f}" width="{step + 0.3:.1f}" height="{tall:.1f}" '
            f'fill="var(--phi)" fill-opacity="{(4 * phi) ** 0.8:.2f}"/>'
        )
        deep = below * (count / counts.max()) ** 0.5
        bars.append(
            f'<rect x="{index * step:.1f}" y="{height + 3}" width="{step - 0.8:.1f}" '
            f'height="{max(deep, 1.0 if count else 0):.1f}" fill="var(--bar)">'
            f"<title>p from {index / _BINS:.2f} to {(index + 1) / _BINS:.2f}: {count:,} tokens</title></rect>"
        )
    points = " ".join(
        f"{width * x / 60:.1f},{height - 4 * height * x / 60 * (1 - x / 60):.1f}" for x in range(61)
    )
    foot = height + below + 18
    return (
        "<figure style='margin:0'><figcaption><b>φ over p, and the tokens by p</b> "
        "<span class='soft small'>(square root of their number)</span></figcaption>"
        f'<svg viewBox="0 -6 {width:.0f} {foot + 10:.0f}" role="img" aria-label="phi over p and the tokens by p">'
        f'{"".join(slices)}<polyline points="{points}" fill="none" stroke="var(--phi)" stroke-width="2"/>'
        f'{"".join(bars)}<text x="0" y="{foot}">p = 0, a surprise</text>'
        f'<text x="{width:.0f}" y="{foot}" text-anchor="end">p = 1, known</text></svg></figure>'
    )


def _histogram(lens: Lens) -> str:
    """Tokens by phi."""
    width, height = 320.0, 139.0
    bins = 25
    counts, edges = np.histogram(lens.all("phi"), bins=bins, range=(0, 0.25))
    step = width / bins
    bars = []
    for index, count in enumerate(counts):
        tall = max(height * (count / counts.max()) ** 0.5, 1.5 if count else 0)
        bars.append(
            f'<rect x="{index * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}" rx="1.5" '
            f'fill="color-mix(in oklab, var(--phi) {round(15 + 85 * (index + 0.5) / bins)}%, var(--card))" '
            f'stroke="var(--phi)" stroke-opacity=".35">'
            f"<title>φ from {edges[index]:.2f} to {edges[index + 1]:.2f}: {count:,} tokens</title></rect>"
        )
    return (
        "<figure style='margin:0'><figcaption><b>Tokens by φ</b> "
        "<span class='soft small'>(square root of their number)</span></figcaption>"
        f'<svg viewBox="0 -6 {width:.0f} {height + 25:.0f}" role="img" aria-label="tokens by phi">{"".join(bars)}'
        f'<text x="0" y="{height + 15}">φ = 0</text>'
        f'<text x="{width:.0f}" y="{height + 15}" text-anchor="end">φ = 0.25</text></svg></figure>'
    )


def _meter(share: float) -> str:
    part = f'<i style="flex:{share:.4f};background:var(--phi)"></i><i style="flex:{max(0.0, 1 - share):.4f}"></i>'
    return f'{share:.1%}<div class="strip" aria-hidden="true">{part}</div>'
