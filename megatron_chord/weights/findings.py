"""Formats a list of findings for an error message, with a limited length."""

from __future__ import annotations

from collections.abc import Sequence

MAX_SHOWN = 20


def listing(heading: str, findings: Sequence[str]) -> str:
    """The heading, a line for each of the first ``MAX_SHOWN`` findings, and the number of the remaining ones.

    A single finding is on the line of the heading.
    """
    if len(findings) == 1:
        return f"{heading} {findings[0]}"
    shown = list(findings[:MAX_SHOWN])
    if len(findings) > MAX_SHOWN:
        shown.append(f"... and {len(findings) - MAX_SHOWN} more")
    return "\n  ".join([heading, *shown])
