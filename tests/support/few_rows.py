"""Runs of a few steps on the first rows of an example's data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_chord.config import RunConfig, SourceConfig

ROWS = 100


def few_rows(data: Path, folder: Path) -> Path:
    """Write the first ``ROWS`` rows of a file of JSON lines into a file of the same name in ``folder``. Return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = data.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / data.name).write_text("".join(rows[:ROWS]), encoding="utf-8")
    return folder / data.name


def with_few_rows(run: RunConfig) -> RunConfig:
    """Return the run with the first ``ROWS`` rows of each data file. Reading all of them takes longer than a few steps.

    The short files are beside the run's folder. All of its data must be JSON lines.
    """
    folder = run.output.parent / "few_rows"

    def shortened(sources: tuple[SourceConfig, ...] | None) -> tuple[SourceConfig, ...] | None:
        if sources is None:
            return None
        return tuple(
            replace(source, path=tuple(few_rows(path, folder) for path in source.path)) for source in sources
        )

    data = run.data
    prompts = shortened(data.prompts)
    assert prompts is not None
    return replace(
        run,
        data=replace(
            data,
            prompts=prompts,
            demonstrations=shortened(data.demonstrations),
            evaluation=shortened(data.evaluation),
        ),
    )
