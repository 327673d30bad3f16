"""Writes one HTML page about one or several runs. The page is self-contained and needs no network."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import yaml

from megatron_chord.config import BatchConfig, DataConfig, ModelConfig, RunConfig, sources_of
from megatron_chord.config_io import dump_config
from megatron_chord.files import write_whole
from megatron_chord.judgement import judge
from megatron_chord.report.curves import all_charts, curves, evaluation_lines, totals
from megatron_chord.report.folder import RunRecord, read_runs
from megatron_chord.report.samples import MOST_CHARACTERS, samples
from megatron_chord.report.suites import suite_rows
from megatron_chord.settings_tree import flat, setting

REPORT = "report.html"
_HERE = Path(__file__).parent
_EVERY_RUN_HAS_ITS_OWN = ("output",)
_WITHOUT_DEFAULT = (
    "output",
    "steps",
    "model.path",
    "data.prompts[0].path",
    "batch.prompts",
    "batch.rollouts",
    "batch.demonstrations",
)


def write_report(folders: Sequence[Path], to: Path) -> Path:
    """Write the page about the runs in ``folders`` to the file ``to``. The file is replaced only by a complete page.

    Raises:
        ValueError: a folder holds no run, or a file of it cannot be read.
        OSError: the page cannot be written.
    """
    write_whole(to, page(read_runs(folders)))
    return to


def page(runs: Sequence[RunRecord]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(
        title=" · ".join(run.name for run in runs),
        data=_in_script(_data(runs)),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        library=(_HERE / "vendor" / "echarts.common.min.js").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


def _data(runs: Sequence[RunRecord]) -> dict[str, Any]:
    charts = all_charts(runs)
    suites = [suite_rows(run.folder) for run in runs]
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "charts": [asdict(chart) for chart in charts],
        "settings": _settings(runs),
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder.resolve()),
                "headline": headline(run),
                "warnings": [asdict(finding) for finding in judge(run.steps, run.settings)],
                "suites": of_suites,
                "curves": curves(run, charts) | {"lines": evaluation_lines(run, of_suites)},
                "samples": samples(run.folder, most_characters=MOST_CHARACTERS // len(runs)),
            }
            for run, of_suites in zip(runs, suites, strict=True)
        ],
    }


def headline(run: RunRecord) -> dict[str, Any]:
    """The most important numbers of a run."""
    tokens, hours = totals(run)
    gpus = [row["gpus"] for row in run.steps if row.get("gpus")]
    servers = len(setting(run.settings, "rollout.servers", ())) * setting(run.settings, "rollout.tensor", 1)
    processors = gpus[-1] + servers if gpus else setting(run.settings, "parallel.ranks", 1)
    return {
        "method": _method(run.settings),
        "steps": run.steps[-1]["step"] + 1 if run.steps else 0,
        "planned": setting(run.settings, "steps"),
        "tokens": tokens,
        "hours": hours,
        "processor_hours": hours * processors,
        "has_gpus": bool(gpus),
    }


def _method(settings: Mapping[str, Any]) -> str:
    """A short description of the method: ``chord, mu constant 0.5, weight phi``."""
    mu, weight = setting(settings, "method.mu.schedule"), setting(settings, "method.token_weight.kind")
    parts = [str(setting(settings, "method.name", ""))]
    if mu is not None:
        peak = setting(settings, "method.mu.peak")
        parts.append(f"mu {mu}" + (f" {peak:g}" if isinstance(peak, int | float) else ""))
    if weight is not None:
        parts.append(f"weight {weight}")
    return ", ".join(parts)


def _settings(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The table of settings: of several runs side by side, or of one run beside the defaults."""
    columns = {run.name: run.settings for run in runs}
    if len(runs) == 1:
        columns = {"this run": runs[0].settings, "default": _defaults()}
    return {"columns": list(columns), "rows": differences(list(columns.values()))}


def _defaults() -> dict[str, Any]:
    """The defaults of all settings that have one."""
    nothing = Path()
    run = RunConfig(
        output=nothing,
        steps=1,
        model=ModelConfig(path=nothing),
        data=DataConfig(prompts=sources_of(nothing)),
        batch=BatchConfig(prompts=1, rollouts=2, demonstrations=0),
    )
    return {
        name: value
        for name, value in flat(yaml.safe_load(dump_config(run))).items()
        if name not in _WITHOUT_DEFAULT
    }


def differences(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All settings of the runs with the value in each run. ``differs`` says whether the values are not all the same."""
    flattened = [flat(one) for one in settings]
    names = dict.fromkeys(name for one in flattened for name in one)
    found: list[dict[str, Any]] = []
    for name in names:
        values = [_shown(one[name]) if name in one else None for one in flattened]
        differs = len(set(values)) > 1 and name not in _EVERY_RUN_HAS_ITS_OWN
        found.append({"name": name, "values": values, "differs": differs})
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _in_script(data: Any) -> str:
    """JSON that is safe inside a script tag, because it contains no ``<``, even if a model's text does."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
