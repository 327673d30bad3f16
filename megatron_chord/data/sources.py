"""Reads the sources of ``data.prompts``, ``data.demonstrations`` or ``data.evaluation``, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from megatron_chord.config import SourceConfig
from megatron_chord.data.rows import LoadReport
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.records import Demonstration, Prompt

R = TypeVar("R", Prompt, Demonstration)


@dataclass(frozen=True, kw_only=True)
class LoadedSources(Generic[R]):
    records: list[R]
    """The records, ordered by source. Each has the label of its source. With several sources, its id also begins with
    the label."""
    labels: list[str]
    """Label of each source."""
    reports: list[LoadReport]
    """Load report of each source."""
    shares: list[float]
    """Share of the draws that come from each source; the shares add up to 1."""

    def left_out(self, data: str) -> list[dict[str, Any]]:
        """Every row that was left out, and the reason, as plain JSON. ``data``: prompts, demonstrations or
        evaluation."""
        return [
            {
                "data": data,
                "source": source,
                "file": fault.position.rpartition(":")[0],
                "row": fault.number,
                "position": fault.position,
                "reason": fault.reason,
            }
            for source, report in zip(self.labels, self.reports, strict=True)
            for fault in (*report.dropped, *report.overlong)
        ]

    def lines(self, title: str) -> list[str]:
        """Lines for the start of a run: how the rows of each source were read."""
        if len(self.reports) == 1:
            return [f"{title} {self.reports[0]}"]
        return [
            f"{title} {100 * share:.1f} % {report}"
            for share, report in zip(self.shares, self.reports, strict=True)
        ]


def load_sources(
    sources: Sequence[SourceConfig] | None,
    template: ChatTemplate,
    load: Callable[..., tuple[list[R], LoadReport]],
) -> LoadedSources[R]:
    """Read every source with its own mapping and system prompt. The result is empty if ``sources`` is None.

    Args:
        load: ``load_prompts`` or ``load_demonstrations`` with the limits that hold for all.
    """
    records: list[R] = []
    reports: list[LoadReport] = []
    sources = sources or ()
    for source in sources:
        own = template
        if source.system_prompt is not None:
            own = replace(template, system_prompt=source.system_prompt)
        loaded, report = load(source.path, own, fields=source.fields, source=source.label)
        if len(sources) > 1:
            loaded = [replace(record, id=f"{source.label}/{record.id}") for record in loaded]
        records += loaded
        reports.append(report)
    total = sum(source.weight for source in sources)
    return LoadedSources(
        records=records,
        labels=[source.label for source in sources],
        reports=reports,
        shares=[source.weight / total for source in sources],
    )
