"""Findings in one error, as many as a reader looks at."""

from __future__ import annotations

from collections.abc import Sequence

MAX_SHOWN = 20


def listing(heading: str, findings: Sequence[str]) -> str:
    """The heading, and below it a line for each of the first ``MAX_SHOWN`` findings and the number of the others."""
    shown = list(findings[:MAX_SHOWN])
    if len(findings) > MAX_SHOWN:
        shown.append(f"... and {len(findings) - MAX_SHOWN} more")
    return "\n  ".join([heading, *shown])
