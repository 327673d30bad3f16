"""The report is parsed, and if Chromium is installed, it is rendered."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.cli import main
from megatron_chord.config_suite import BenchmarkConfig, MeanConfig, SamplingConfig, SuiteConfig
from megatron_chord.evaluation import results
from megatron_chord.report.folder import read_runs
from megatron_chord.report.page import differences, page, write_report
from tests.unit.report.runs import SETTINGS, answer, made_up_rows, make_run, rows_of_quickstart

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=http://example.com/x onerror=alert(1)>\u2028"
)
SAMPLES = {
    "evaluation-000000": [answer("a", HOSTILE, 0.0), answer("b", "7", 1.0)],
    "step-000000": [
        answer("t", "#### 7", 1.0, tokens=[["####", -0.1], [" 7", -2.0]]),
        answer("t", "#### 8", 0.0),
    ],
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._in = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style" and data.strip():
            self.texts.append(data.strip())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first", rows_of_quickstart(), SAMPLES)


def test_the_page_needs_no_other_file(run: Path) -> None:
    parsed = Page(page(read_runs([run])))
    assert len(parsed.scripts) == 3  # the data, the library and the page's own script
    loads = [(tag, at) for tag, at in parsed.tags if {"src", "srcset", "data", "action"} & set(at)]
    assert loads == []
    links = [at["href"] for tag, at in parsed.tags if "href" in at]
    assert all(link and link.startswith("#") for link in links)
    policies = [at["content"] for tag, at in parsed.tags if at.get("http-equiv") == "Content-Security-Policy"]
    assert policies
    assert (policies[0] or "").startswith("default-src 'none'")


def test_text_of_a_model_is_escaped(run: Path) -> None:
    parsed = Page(page(read_runs([run])))
    entry = parsed.data["runs"][0]["samples"][0]
    assert HOSTILE in {one["text"] for prompt in entry["prompts"] for one in prompt["answers"]}
    assert "img" not in {tag for tag, _ in parsed.tags}


def test_the_numbers_are_those_of_the_run(run: Path) -> None:
    data = Page(page(read_runs([run]))).data
    rows = [row for row in rows_of_quickstart() if "evaluation" not in row]
    (shown,) = data["runs"]
    assert shown["headline"]["steps"] == shown["headline"]["planned"] == len(rows) == 60
    assert shown["headline"]["processor_hours"] == pytest.approx(
        sum(row["seconds"]["total"] for row in rows) / 3600
    )
    assert shown["curves"]["series"]["reward_mean"]["mean"] == pytest.approx(
        [row["reward_mean"] for row in rows], rel=1e-4
    )
    (held_out,) = shown["curves"]["evaluations"]
    assert [one["accuracy"] for one in held_out["points"]] == [
        row["evaluation"]["accuracy"] for row in rows_of_quickstart() if "evaluation" in row
    ]


def evaluated(folder: Path, grades: list[list[float]], policy: str = "run/policy") -> None:
    """Write what ``megatron-chord evaluate`` writes for a suite with one benchmark and these grades."""
    sums = BenchmarkConfig(
        name="sums",
        file=folder / "sums.jsonl",
        metrics=("avg@2",),
        sampling=SamplingConfig(samples=2, temperature=1.0),
    )
    suite = SuiteConfig(benchmarks=(sums,), means=(MeanConfig(name="overall", of=("sums",), metric="avg@2"),))
    problems = [
        results.ProblemResult(
            benchmark="sums",
            problem=str(index),
            category=None,
            question=str(index),
            truth="7",
            scores=tuple(scores),
            values={"avg@2": sum(scores) / len(scores)},
        )
        for index, scores in enumerate(grades)
    ]
    found = {
        "suite": "mine",
        "policy": {"name": policy, "path": "policy", "digest": "0"},
        "seed": 0,
        "benchmarks": {"sums": results.benchmark_result(sums, problems, [], resamples=100, seed=0)},
        "means": results.means(suite, problems),
    }
    folder.mkdir(parents=True)
    results.write(folder, found, problems)


def test_evaluations_on_a_suite_are_in_the_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows_of_quickstart()[:3])
    evaluated(run / "evaluations" / "mine", [[1.0, 0.0], [1.0, 1.0]])
    (run / "evaluations" / "other").mkdir()
    (run / "evaluations" / "other" / "results.json").write_text('["of another program"]')
    one, mean = Page(page(read_runs([run]))).data["runs"][0]["suites"]
    low, high = one.pop("low"), one.pop("high")
    assert one == {
        "suite": "mine",
        "policy": "run/policy",
        "step": None,
        "benchmark": "sums",
        "metric": "avg@2",
        "value": 0.75,
        "problems": 2,
    }
    assert 0.5 <= low <= 0.75 <= high <= 1.0
    assert (mean["benchmark"], mean["metric"], mean["value"]) == ("overall", "avg@2", 0.75)


def test_accuracy_by_source_and_benchmarks_of_checkpoints_are_curves(tmp_path: Path) -> None:
    rows = [row for row in rows_of_quickstart() if "evaluation" not in row][:2]
    evaluations = [
        {
            "step": step,
            "evaluation": {"accuracy": 0.5, "num_problems": 4, "accuracy_by_source": {"sums": a, "tools": b}},
        }
        for step, a, b in ((0, 0.25, 0.75), (2, 0.5, 0.5))
    ]
    run = make_run(tmp_path / "run", [evaluations[0], *rows, evaluations[1]])
    for step, grades in ((1, [[1.0, 0.0]]), (2, [[1.0, 1.0]])):
        name = f"step-{step:06d}"
        evaluated(run / "evaluations" / "mine" / name, grades, policy=f"run/checkpoints/{name}")
    evaluated(run / "evaluations" / "mine" / "policy", [[0.0, 0.0]])
    lines = Page(page(read_runs([run]))).data["runs"][0]["curves"]["lines"]
    found = {
        title: {line: [(point["step"], point["value"]) for point in points] for line, points in chart.items()}
        for title, chart in lines.items()
    }
    assert found == {
        "Held-out accuracy by source": {"sums": [(0, 0.25), (2, 0.5)], "tools": [(0, 0.75), (2, 0.5)]},
        "Suite mine": {"sums avg@2": [(1, 0.5), (2, 1.0)], "overall avg@2": [(1, 0.5), (2, 1.0)]},
    }
    last = lines["Suite mine"]["sums avg@2"][1]
    assert last["hours"] == pytest.approx(sum(row["seconds"]["total"] for row in rows) / 3600, rel=1e-4)


SETS = """
evaluation:
  sets:
  - {name: amc, path: amc.jsonl, samples: 2, temperature: 1.0, metrics: [avg@2, pass@2]}
  - {name: "2024", path: words.jsonl, samples: 1, metrics: []}
"""


def run_with_sets(folder: Path) -> Path:
    """Write a run that evaluates two sets: one of them before and after two steps, the other one only before."""
    rows = [row for row in rows_of_quickstart() if "evaluation" not in row][:2]

    def of_set(accuracy: float, **more: Any) -> dict[str, Any]:
        return {"accuracy": accuracy, "num_problems": 4, "interval": [accuracy - 0.1, accuracy + 0.1]} | more

    first = {
        "amc": of_set(0.5, **{"avg@2": 0.5, "pass@2": 0.75}, accuracy_by_source={"a": 0.25, "b": 0.75}),
        "2024": of_set(0.25, **{"avg@1": 0.25}),
    }
    last = {"amc": of_set(0.75, **{"avg@2": 0.75, "pass@2": 1.0})}
    run = make_run(folder, [{"step": 0, "evaluation": first}, *rows, {"step": 2, "evaluation": last}])
    settings = (run / "config.yaml").read_text().replace("\nevaluation: {samples: 1}\n", SETS)
    assert "sets:" in settings
    (run / "config.yaml").write_text(settings)
    return run


def test_every_set_has_its_accuracy_and_its_metrics(tmp_path: Path) -> None:
    curves = Page(page(read_runs([run_with_sets(tmp_path / "run")]))).data["runs"][0]["curves"]
    found = [
        (one["name"], [(point["step"], point["accuracy"], point["low"]) for point in one["points"]])
        for one in curves["evaluations"]
    ]
    assert found == [("amc", [(0, 0.5, 0.4), (2, 0.75, 0.65)]), ("2024", [(0, 0.25, 0.15)])]
    lines = {
        title: {line: [(point["step"], point["value"]) for point in points] for line, points in chart.items()}
        for title, chart in curves["lines"].items()
    }
    assert lines == {
        "Held-out accuracy by source": {"amc a": [(0, 0.25)], "amc b": [(0, 0.75)]},
        "Metrics of the evaluation sets": {
            "amc avg@2": [(0, 0.5), (2, 0.75)],
            "amc pass@2": [(0, 0.75), (2, 1.0)],
            "2024 avg@1": [(0, 0.25)],
        },
    }


def test_gpu_hours_count_the_gpus_of_ranks_and_servers(tmp_path: Path) -> None:
    rows = [row | {"gpus": 8} for row in made_up_rows(3)]
    settings = SETTINGS.replace("servers: [], tensor: 1", "servers: [a, b], tensor: 4")
    data = Page(page(read_runs([make_run(tmp_path / "run", rows, settings=settings)]))).data
    hours = sum(row["seconds"]["total"] for row in rows) / 3600
    assert data["runs"][0]["headline"]["processor_hours"] == pytest.approx(16 * hours)


def test_several_runs_share_charts_and_their_different_settings_are_listed(run: Path, tmp_path: Path) -> None:
    other = make_run(
        tmp_path / "second",
        rows_of_quickstart()[:5],
        settings=SETTINGS.replace("lr: 0.0005", "lr: 0.001, eps: 1.0"),
    )
    data = Page(page(read_runs([run, other]))).data
    assert [one["name"] for one in data["runs"]] == ["first", "second"]
    assert data["settings"]["columns"] == ["first", "second"]
    assert [row for row in data["settings"]["rows"] if row["differs"]] == [
        {"name": "optim.lr", "values": ["0.0005", "0.001"], "differs": True},
        {"name": "optim.eps", "values": [None, "1.0"], "differs": True},
    ]


def test_one_run_is_compared_with_the_defaults(run: Path) -> None:
    data = Page(page(read_runs([run]))).data
    rows = {row["name"]: row for row in data["settings"]["rows"]}
    assert data["settings"]["columns"] == ["this run", "default"]
    assert rows["optim.lr"] == {"name": "optim.lr", "values": ["0.0005", "1e-06"], "differs": True}
    assert not rows["rollout.temperature"]["differs"]
    assert rows["steps"]["values"] == ["60", None]


def test_the_folder_of_a_run_is_no_difference() -> None:
    (row,) = differences([{"output": "a"}, {"output": "b"}])
    assert not row["differs"]


def test_a_run_of_1000_steps_stays_below_5_mb(tmp_path: Path) -> None:
    tokens = [["word ", -0.123]] * 400
    files = {
        f"{kind}-{step:06d}": [
            answer(f"p{index}", "word " * 400, 1.0, tokens=tokens) for index in range(4) for _ in range(8)
        ]
        for kind in ("evaluation", "step")
        for step in range(12)
    }
    target = write_report([make_run(tmp_path / "run", made_up_rows(1000), files)], tmp_path / "report.html")
    assert target.stat().st_size < 5_000_000


def test_a_run_that_has_just_started_has_a_page(tmp_path: Path) -> None:
    assert Page(page(read_runs([make_run(tmp_path / "run", [])]))).data["runs"][0]["headline"]["steps"] == 0


def test_the_command_writes_it_while_the_run_writes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "rew')
    assert main(["report", str(copy)]) == 0
    assert capsys.readouterr().out == f"report in {copy / 'report.html'}\n"
    assert sorted(path.name for path in copy.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "samples",
    ]
    assert main(["report", str(run), str(copy), "--output", str(tmp_path / "both.html")]) == 0
    assert len(Page((tmp_path / "both.html").read_text()).data["runs"]) == 2


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err
    assert main(["report", str(run), str(run)]) == 2
    assert "is named twice" in capsys.readouterr().err
    assert main(["report", str(run), "--output", str(tmp_path / "no" / "report.html")]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_draws_it_without_an_error(run: Path, tmp_path: Path) -> None:
    second = make_run(tmp_path / "second", rows_of_quickstart()[:30])
    evaluated(second / "evaluations" / "mine", [[1.0, 0.0], [1.0, 1.0]])
    for step in ("step-000010", "step-000020"):
        evaluated(second / "evaluations" / "mine" / step, [[1.0, 0.0]], policy=f"second/checkpoints/{step}")
    third = run_with_sets(tmp_path / "third")
    target = write_report([run, second, third], tmp_path / "report.html")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,8000", "--virtual-time-budget=5000",
            "--dump-dom", target.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert re.findall(r"CONSOLE.*", done.stderr) == []
    drawn = Page(done.stdout)
    charts = sum(tag == "canvas" for tag, _ in drawn.tags)
    assert charts >= 15
    for text in (
        "first",
        "second",
        "+55.0 points",
        "Held-out accuracy",
        "reward 1",
        "run/policy",
        "Suite mine",
        "+25.0 points",
        "Metrics of the evaluation sets",
        HOSTILE.strip(),
    ):
        assert any(text in shown for shown in drawn.texts), text
