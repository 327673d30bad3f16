"""An ``Inspection`` as one HTML page that needs no network. All text of the data is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from megatron_chord.data.inspect import Example, Inspection, Lengths, Overlap, SetReport, findings
from megatron_chord.data.page_style import SCRIPT, STYLE
from megatron_chord.data.token_texts import TokenText
from megatron_chord.rewards.reading import DOUBTFUL, MEANING

_BINS = 28
_SHOWN = 12
_KINDS = {(False, True): "o", (True, False): "a", (True, True): "s"}
"""The CSS class of a token by (is trained, was written by the template)."""
_LEGEND = (
    ("a", "text that is trained"),
    ("s", "text of the template, trained"),
    ("o", "text of the template, not trained"),
    ("", "text that is not trained"),
)


def page(inspection: Inspection, *, title: str, more: Sequence[tuple[str, str, str]] = ()) -> str:
    """The page's text.

    Args:
        title: name of the data, such as that of the YAML file.
        more: further sections, each (anchor, heading, HTML).
    """
    sections = [
        *((one.name, one.name.capitalize(), "".join(_set(one))) for one in inspection.sets),
        ("overlap", "The same problems in two sets", "".join(map(_overlap, inspection.overlaps))),
        *more,
    ]
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(heading)}</h2>{html}</section>'
        for anchor, heading, html in sections
        if html
    )
    links = "".join(
        f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, html in sections if html
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}: what will be trained</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>What will be trained</h1><p class=soft><code>{escape(title)}</code></p><nav>{links}</nav>"
        f"{_figures(inspection)}{_findings(inspection)}{_reports(inspection)}</header>{body}"
        "<footer>Written by <code>megatron-chord data</code>. Point at a token, or tap it, to see what it is.</footer>"
        f'</main><div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n'
    )


def token_spans(tokens: Iterable[TokenText]) -> str:
    """One HTML span for each token. Its class is the kind of token; ``data-i`` is the token id."""
    return "".join(
        span(token, f' class="{kind}"' if (kind := _KINDS.get((token.is_trained, token.is_template))) else "")
        for token in tokens
    )


def span(token: TokenText, attributes: str) -> str:
    """A token with its text made visible. ``attributes`` is HTML."""
    text = token.text or "·"
    shown = escape(text).replace("\n", "<i>↵</i>\n").replace("\t", "<i>→</i>\t")
    own = "" if shown == text else f' data-t="{_attribute(token.text)}"'
    return f'<span data-i="{token.token_id}"{own}{attributes}>{shown}</span>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """The legend for pairs of (class, meaning)."""
    spans = "".join(f'<span class="{kind}">{escape(text)}</span>' for kind, text in entries)
    return f'<div class="legend">{spans}</div>'


def heading_of(example: Example) -> str:
    """The heading of a row: its place, its length, and the messages that the template changed."""
    seen = example.seen
    trained = f", {sum(seen.trainable):,} of them trained" if seen.trainable else ""
    lines = [f"<h3>{escape(example.title.capitalize())}: <code>{escape(seen.place)}</code></h3>"]
    lines.append(f'<p class="soft small">{len(seen.token_ids):,} tokens{trained}</p>')
    lines += [
        f'<p class="bad small">The text of message {index} ({escape(seen.messages[index]["role"])}) is not in it as '
        "it was written: the template or the tokenizer changes or drops it.</p>"
        for index in example.rendered.rewritten
    ]
    return "".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table. Cells are HTML. A column whose heading begins with # contains numbers."""
    numeric = [text.startswith("#") for text in head]

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if number else ''}>{cell}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )

    top = line([text.removeprefix("#") for text in head], "th")
    body = "".join(f"<tr>{line(cells, 'td')}</tr>" for cells in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _figures(inspection: Inspection) -> str:
    cells = []
    for one in inspection.sets:
        left_out = one.num_rows - one.num_kept
        note = f", {left_out:,} left out" if left_out else ""
        cells.append(
            f'<div class="figure"><b>{one.num_kept:,}</b><span>{escape(one.name)}{note}</span></div>'
        )
        if one.name == "demonstrations":
            trained = sum(one.lengths[-1].values)
            cells.append(f'<div class="figure"><b>{_big(trained)}</b><span>trained tokens</span></div>')
    return f'<div class="figures">{"".join(cells)}</div>'


def _findings(inspection: Inspection) -> str:
    found = findings(inspection)
    if not found:
        return '<div class="card"><b class=fine>No problem was found.</b></div>'
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<div class="card findings"><b>Please check</b><ul>{items}</ul></div>'


def _reports(inspection: Inspection) -> str:
    lines = "".join(f"<p class=small><code>{escape(text)}</code></p>" for text in inspection.reports)
    return f"<details><summary>How the files were read</summary>{lines}</details>"


def _set(report: SetReport) -> Iterator[str]:
    yield '<div class="card">'
    if len(report.files) > 1:
        yield table(
            ("file", "#rows", "#left out as over-long"),
            ([f"<code>{escape(file)}</code>", f"{rows:,}", f"{over:,}"] for file, rows, over in report.files),
        )
    yield f'<div class="charts">{"".join(map(_chart, report.lengths))}</div></div>'
    if report.truths:
        yield f'<div class="card"><h3 style="margin-top:0">Truths, as the grader reads them</h3>{_truths(report)}</div>'
    repeats = list(_repeats(report))
    if repeats:
        yield f'<div class="card">{"".join(repeats)}</div>'
    if report.examples:
        yield '<div class="card">'
        yield legend(
            entry for entry in _LEGEND if report.name == "demonstrations" or entry[0] not in ("a", "s")
        )
        for example in report.examples:
            yield f'{heading_of(example)}<pre class="tokens">{token_spans(example.rendered.tokens)}</pre>'
        yield "</div>"


def _chart(lengths: Lengths) -> str:
    """A histogram, 320 units wide. The limit is a line in it, unless it is far outside."""
    bins = lengths.bins(_BINS)
    most = max(rows for _, _, rows in bins)
    width, height = 320.0, 110.0
    first, last = bins[0][0], bins[-1][1]
    end = max(last, lengths.limit) if lengths.limit <= 2 * last else last
    scale = width / (end - first + 1)
    bars = []
    for low, high, rows in bins:
        tall = max(height * rows / most, 1.5 if rows else 0)
        color = "var(--over)" if low > lengths.limit else "var(--bar)"
        bars.append(
            f'<rect x="{(low - first) * scale:.1f}" y="{height - tall:.1f}" '
            f'width="{max((high - low + 1) * scale - 1, 0.6):.1f}" height="{tall:.1f}" rx="1.5" fill="{color}">'
            f"<title>{low:,} to {high:,} tokens: {rows:,} rows</title></rect>"
        )
    limit = ""
    if first <= lengths.limit <= end:
        x = (lengths.limit - first + 1) * scale
        anchor = "end" if x > width / 2 else "start"
        limit = (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="-6" y2="{height}" stroke="var(--over)" stroke-dasharray="3 3"/>'
            f'<text x="{x + (-4 if anchor == "end" else 4):.1f}" y="-1" text-anchor="{anchor}">'
            f"limit {lengths.limit:,}</text>"
        )
    over = f' <span class="bad">{lengths.num_over:,} over the limit</span>' if lengths.num_over else ""
    return (
        f"<figure style='margin:0'><figcaption><b>Tokens, {escape(lengths.part)}</b></figcaption>"
        f'<p class="soft small">median {lengths.quantile(0.5):,} · 95 % up to {lengths.quantile(0.95):,} · longest '
        f"{max(lengths.values):,} · limit {lengths.limit:,} <code>{escape(lengths.setting)}</code>{over}</p>"
        f'<svg viewBox="0 -14 {width:.0f} {height + 32:.0f}" role="img" aria-label="histogram of lengths">'
        f"{''.join(bars)}"
        f'<line x1="0" x2="{width:.0f}" y1="{height}" y2="{height}" stroke="var(--line)"/>{limit}'
        f'<text x="0" y="{height + 14}">{first:,}</text>'
        f'<text x="{width:.0f}" y="{height + 14}" text-anchor="end">{end:,}</text></svg></figure>'
    )


def _truths(report: SetReport) -> str:
    rows = []
    for kind in report.truths:
        style = "bad" if kind.kind in DOUBTFUL else "fine"
        examples = "<br>".join(
            f"<code>{_short(truth)}</code> → <code>{_short(read)}</code> "
            f"<span class='soft small'>{escape(place)}</span>"
            for place, truth, read in kind.examples[: 5 if kind.kind in DOUBTFUL else 2]
        )
        rows.append(
            [f"{kind.count:,}", f'<span class="{style}">{escape(MEANING[kind.kind])}</span>', examples]
        )
    note = ""
    if report.num_truths_read < report.num_truths:
        note = (
            f'<p class="soft small">Of the first {report.num_truths_read:,} of {report.num_truths:,} '
            "different truths.</p>"
        )
    return table(("#rows", "read as", "for example"), rows) + note


def _repeats(report: SetReport) -> Iterator[str]:
    if report.repeated:
        yield _listed(
            f"Problems that occur in several rows: {len(report.repeated):,}",
            [" = ".join(f"<code>{escape(place)}</code>" for place in places) for places in report.repeated],
        )
    if report.identical:
        yield _listed(
            f"Demonstrations that occur twice, including the answer: {len(report.identical):,}",
            [" = ".join(f"<code>{escape(place)}</code>" for place in places) for places in report.identical],
        )
    if report.contradicting:
        yield _listed(
            f"Problems with two different truths: {len(report.contradicting):,}",
            [
                f"<code>{escape(a)}</code> says <code>{_short(x)}</code>, "
                f"<code>{escape(b)}</code> says <code>{_short(y)}</code>"
                for a, x, b, y in report.contradicting
            ],
        )


def _overlap(found: Overlap) -> str:
    title = f"{len(found.pairs):,} of {found.num_other:,} problems of {found.other} are also in {found.one}"
    if not found.pairs:
        return f'<div class="card"><span class="fine">{escape(title)}</span></div>'
    items = [
        f"<code>{escape(pair.other)}</code> = <code>{escape(pair.place)}</code>"
        + ("" if pair.shared == 1 else f" <span class='soft small'>{pair.shared:.0%}</span>")
        for pair in found.pairs
    ]
    return f'<div class="card">{_listed(title, items, bad=found.is_contamination)}</div>'


def _listed(title: str, items: Sequence[str], *, bad: bool = False) -> str:
    lines = "".join(f"<li>{item}</li>" for item in items[:_SHOWN])
    more = f"<li class=soft>and {len(items) - _SHOWN:,} more</li>" if len(items) > _SHOWN else ""
    style = ' class="bad"' if bad else ""
    return f"<details><summary><b{style}>{escape(title)}</b></summary><ul class=small>{lines}{more}</ul></details>"


def _short(text: str) -> str:
    return escape(text if len(text) <= 80 else f"{text[:77]}...")


def _attribute(text: str) -> str:
    return escape(text).replace("\n", "&#10;").replace("\t", "&#9;").replace("\r", "&#13;")


def _big(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if count >= size:
            return f"{count / (1000 if unit == 'k' else size):.3g} {unit}"
    return f"{count:,}"
