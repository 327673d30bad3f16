"""``benchmarks/paper_in_small.py``: criteria, records and tables, and which results of an earlier plan are used
again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.criteria import CRITERIA, Comparison, Records, judge, mean_of_steps, value, verdict
from benchmarks.paper.figures import draw, mean_curve
from benchmarks.paper.origin import is_same, origin_of
from benchmarks.paper.page import criteria_table, fill, methods_table, put_between
from benchmarks.paper.plan import FIRST_STAGE, NAMES, SMALLEST, WHOLE, WORLD, Job, checkable
from benchmarks.paper.record import read_record
from benchmarks.paper.work import Place, finished
from megatron_chord.train.setup import check_run
from tests.support.files import write_rows

ROOT = Path(__file__).resolve().parents[3]


def record(**accuracy: float) -> dict[str, Any]:
    """A run of 100 steps whose last evaluation has the given accuracy for each source."""
    start = {
        source: {"accuracy": 0.4, "length": 8.0, "murmurs": 0.0, "steps_style": 0.1} for source in accuracy
    }
    end = {source: {**start[source], "accuracy": number} for source, number in accuracy.items()}
    return {
        "evaluations": [{"step": 0, **start}, {"step": 100, **end}],
        "steps": [{"step": step, "entropy": 0.01 * step} for step in range(100)],
        "cpu_seconds": 60.0,
        "finished": "2026-11-28 12:00:00",
        "versions": {"torch": "2.13.0"},
    }


def records(**last: list[float]) -> Records:
    """Records by method and seed. ``last`` has the first ability's accuracy at the end."""
    return {
        name: {seed: record(first=number, second=0.9, transfer=0.9) for seed, number in enumerate(numbers)}
        for name, numbers in last.items()
    }


def better(bound: float | None = 0.0, below: float | None = None) -> Comparison:
    return Comparison(
        text="a - b",
        methods=("a", "b"),
        number=lambda runs: value(runs["a"]) - value(runs["b"]),
        above=bound,
        below=below,
    )


# ---- criteria


def test_the_interval_of_equal_differences_is_their_value() -> None:
    result = judge(better(), records(a=[0.7, 0.6, 0.8], b=[0.5, 0.4, 0.6]))
    assert result.interval is not None
    assert (result.interval.low, result.interval.high) == pytest.approx((0.2, 0.2))
    assert result.verdict == "met"


def test_differences_are_paired_by_seed() -> None:
    """Without pairing, the two methods' accuracies would overlap."""
    assert judge(better(), records(a=[0.3, 0.6, 0.9], b=[0.2, 0.5, 0.8])).verdict == "met"


@pytest.mark.parametrize(
    ("a", "b", "bound", "below", "expected"),
    [
        ([0.5, 0.5], [0.5, 0.5], 0.0, None, "not met"),
        ([0.6, 0.4], [0.5, 0.5], 0.0, None, "not met"),
        ([0.5, 0.5], [0.51, 0.51], -0.02, None, "met"),
        ([0.5, 0.5], [0.53, 0.53], -0.02, None, "not met"),
        ([0.54, 0.54], [0.5, 0.5], -0.05, 0.05, "met"),
        ([0.56, 0.56], [0.5, 0.5], -0.05, 0.05, "not met"),
    ],
)
def test_the_whole_interval_must_be_on_the_right_side(
    a: list[float], b: list[float], bound: float, below: float | None, expected: str
) -> None:
    assert judge(better(bound, below), records(a=a, b=b)).verdict == expected


@pytest.mark.parametrize("present", [{}, {"a": [0.5, 0.5]}, {"a": [0.5, 0.5], "b": [0.4]}])
def test_a_comparison_without_two_common_seeds_is_not_run(present: dict[str, list[float]]) -> None:
    result = judge(better(), records(**present))
    assert (result.interval, result.verdict) == (None, "not run")


def test_a_criterion_is_met_only_when_all_comparisons_are() -> None:
    met = judge(better(), records(a=[0.6, 0.6], b=[0.5, 0.5]))
    unmet = judge(better(), records(a=[0.4, 0.4], b=[0.5, 0.5]))
    missing = judge(better(), {})
    assert verdict([met, met]) == "met"
    assert verdict([met, unmet]) == "not met"
    assert verdict([met, unmet, missing]) == "not run"


def test_every_criterion_reads_its_methods_runs() -> None:
    """The plan has runs of every method of a criterion, and each number of the criterion can be computed from them."""
    runs = records(**{name: [0.5, 0.5] for name in NAMES})
    for by_seed in runs.values():
        for run in by_seed.values():
            for row in run["steps"]:
                row["sft_nll"] = 1.0
    for criterion in CRITERIA:
        for comparison in criterion.comparisons:
            assert set(comparison.methods) <= set(WHOLE.methods)
            assert judge(comparison, runs).verdict != "not run"


def test_numbers_are_read_at_a_share_of_the_run() -> None:
    run = record(first=0.7)
    assert [value(run, share=0.0), value(run, share=0.4), value(run)] == [0.4, 0.4, 0.7]
    assert mean_of_steps(run, "entropy", (0.2, 0.6)) == pytest.approx(0.01 * sum(range(20, 60)) / 40)


def test_a_second_stage_starts_from_the_policy_of_the_first(tmp_path: Path) -> None:
    first, last = Place(tmp_path).load(Job("sft_best_rl", 0), WHOLE)
    assert last.model.path == first.output / "policy"
    assert first.model.path == WORLD / "policy"
    assert first.output != last.output


# ---- records, tables, figures


def test_a_record_has_what_the_run_measured_by_source(tmp_path: Path) -> None:
    """Answers may contain any character. A line separator inside an answer does not end its row."""
    (tmp_path / "samples").mkdir()
    answers = [
        {"prompt_id": "first/heldout-0", "response": "{1+2=3\u2028ab}#3", "score": 1.0, "num_tokens": 10},
        {"prompt_id": "first/heldout-1", "response": "#3", "score": 0.0, "num_tokens": 4},
        {"prompt_id": "second/second-0", "response": "#12", "score": None, "num_tokens": 3},
        {"prompt_id": "second/second-1", "response": "#12", "score": 1.0, "num_tokens": 3},
    ]
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    (tmp_path / "samples" / "evaluation-000000.jsonl").write_text(lines, encoding="utf-8")
    write_rows(
        tmp_path / "metrics.jsonl",
        {"step": 0, "evaluation": {"accuracy": 0.5}},
        {"step": 0, "mu": 0.5, "entropy": 0.2, "loss": 1.0, "seconds": {"total": 1.5}},
    )
    assert read_record(tmp_path) == {
        "evaluations": [
            {
                "step": 0,
                "first": {"accuracy": 0.5, "length": 7.0, "murmurs": 1.0, "steps_style": 0.5},
                "second": {"accuracy": 1.0, "length": 3.0, "murmurs": 0.0, "steps_style": 0.0},
            }
        ],
        "steps": [{"step": 0, "mu": 0.5, "entropy": 0.2}],
        "seconds": 1.5,
    }


def test_tables_say_what_was_not_run() -> None:
    table = methods_table({})
    assert table.count("not run yet") == len(NAMES)
    assert "**not run**" in criteria_table({})
    some = methods_table(records(grpo=[0.5, 0.7]))
    assert "| GRPO | 2 | 60.0 % (50.0 to 70.0) |" in some
    assert "| base policy | 2 | 40.0 % (40.0 to 40.0) |" in some


def test_only_what_is_between_the_markers_changes() -> None:
    begin, end = "<!-- a: written by benchmarks/paper_in_small.py -->", "<!-- end of a -->"
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    assert put_between(page, "a", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="no markers"):
        put_between(page, "b", "new")


def test_the_page_has_a_place_for_every_part(tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text((ROOT / "docs" / "evidence.md").read_text())
    fill(page, dict.fromkeys(("provenance", "criteria", "methods", "figures"), "here"))
    assert page.read_text().count("\nhere\n") == 4


def test_figures_are_drawn_for_the_runs_that_are_there(tmp_path: Path) -> None:
    paths = draw(records(grpo=[0.5, 0.7]), tmp_path)
    assert [path.name for path in paths] == ["first.svg", "second.svg", "length.svg", "entropy.svg"]
    assert all(path.read_text().count("<svg") == 1 for path in paths)


def test_a_mean_curve_has_the_steps_that_all_curves_have() -> None:
    assert mean_curve([([0, 5, 10], [1.0, 2.0, 3.0]), ([0, 10], [3.0, 5.0])]) == ([0, 10], [2.0, 4.0])


# ---- the plan


def test_every_method_has_its_file_and_is_accepted(tmp_path: Path) -> None:
    assert {path.stem for path in WORLD.glob("*.yaml")} - {"common"} == {*NAMES, *FIRST_STAGE.values()}
    place = Place(tmp_path)
    place.prepare(WHOLE)
    for name in NAMES:
        stages = place.load(Job(name, 0), WHOLE)
        assert len(stages) == (2 if name in FIRST_STAGE else 1)
        for run in stages:
            check_run(checkable(run), world_size=1)


def test_a_result_is_used_again_only_for_the_same_settings(tmp_path: Path) -> None:
    place, job = Place(tmp_path / "one"), SMALLEST.jobs[0]
    place.prepare(SMALLEST)
    origin = json.loads(json.dumps(origin_of(place.load(job, SMALLEST))))
    place.result(job).write_text(json.dumps({"origin": origin}))
    assert list(finished(place, SMALLEST)) == [job]
    assert list(finished(place, replace(SMALLEST, settings=(*SMALLEST.settings, "optim.lr=1e-5")))) == []

    elsewhere = Place(tmp_path / "another")
    elsewhere.prepare(SMALLEST)
    assert is_same(origin, elsewhere.load(job, SMALLEST, "http://127.0.0.1:2"))
    changed = elsewhere.folder / f"demonstrations-{job.seed}.jsonl"
    changed.write_text("".join(reversed(changed.read_text().splitlines(keepends=True))))
    assert not is_same(origin, elsewhere.load(job, SMALLEST))


def test_a_result_stays_valid_when_a_setting_with_a_default_is_new(tmp_path: Path) -> None:
    place, job = Place(tmp_path), SMALLEST.jobs[0]
    place.prepare(SMALLEST)
    stages = place.load(job, SMALLEST)
    before = json.loads(json.dumps(origin_of(stages)))
    del before["settings"][0]["batch"]["share_prompts"]
    assert is_same(before, stages)
    batch = replace(stages[0].batch, share_prompts=False)
    assert not is_same(before, [replace(stages[0], batch=batch)])
    before["settings"][0]["batch"]["a_setting_that_is_gone"] = 1
    assert not is_same(before, stages)


def test_seeds_draw_different_demonstrations(tmp_path: Path) -> None:
    Place(tmp_path).prepare(WHOLE)
    drawn = [set((tmp_path / f"demonstrations-{seed}.jsonl").read_text().splitlines()) for seed in (0, 1)]
    assert [len(rows) for rows in drawn] == [WHOLE.demonstrations] * 2
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("options", [["--methods", "none"], ["--workers", "0"], ["--publish", "--quick"]])
def test_wrong_options_are_refused_at_once(options: list[str]) -> None:
    command = [sys.executable, "benchmarks/paper_in_small.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert options[0] in done.stderr
