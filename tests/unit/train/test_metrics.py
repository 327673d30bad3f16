"""The log of a run: each warning is printed once, also if the run is stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_chord.train.metrics import RunLog, read_metrics


def steps(log: RunLog, first: int, last: int) -> list[str]:
    said: list[str] = []
    log.say = said.append  # type: ignore[method-assign]
    for step in range(first, last):
        row: dict[str, Any] = {"step": step, "truncated_fraction": 1.0}
        log.finish_step(row, f"step {step}")
    return said


def test_a_warning_is_said_once_also_over_a_resume(tmp_path: Path) -> None:
    settings = {"data": {"max_response_tokens": 48}}
    with RunLog(tmp_path, steps=9, first_step=0, settings=settings) as log:
        log.begin()
        first, warning, second = steps(log, 0, 2)
    assert (first, second) == ("step 0", "step 1")
    assert warning.startswith("warning: all answers of the step were cut off at 48 tokens. ")
    assert "data.max_response_tokens" in warning
    with RunLog(tmp_path, steps=9, first_step=2, settings=settings) as log:
        log.begin()
        assert steps(log, 2, 4) == ["step 2", "step 3"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_an_evaluation_that_is_repeated_has_one_row(tmp_path: Path) -> None:
    """That of the start is always repeated. A later one is repeated if a stop has interrupted it."""
    rows: list[dict[str, Any]] = [{"step": 0, "evaluation": {}}, {"step": 0}, {"step": 1, "evaluation": {}}]
    for first, evaluates_first, kept in ((1, False, rows), (1, True, rows[:2]), (0, True, [])):
        with RunLog(tmp_path, steps=9, first_step=0, settings={}) as log:
            log.begin()
            for row in rows:
                log.write(row)
        with RunLog(tmp_path, steps=9, first_step=first, settings={}) as log:
            log.begin(evaluates_first=evaluates_first)
        assert read_metrics(tmp_path) == kept


def test_a_start_that_is_refused_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    with RunLog(tmp_path, steps=9, first_step=0, settings={}) as log:
        log.begin()
        steps(log, 0, 4)
        log.write_samples(3, [{"response": "x"}])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with RunLog(tmp_path, steps=9, first_step=2, settings={}):
        pass  # the start is refused after this, so begin is never called
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with RunLog(tmp_path, steps=9, first_step=2, settings={}) as log:
        log.begin()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    assert list((tmp_path / "samples").iterdir()) == []


def test_samples_that_a_resume_collects_again_are_kept(tmp_path: Path) -> None:
    """A resume collects the steps that were sampled ahead before its start can no longer be refused."""
    with RunLog(tmp_path, steps=9, first_step=0, settings={}) as log:
        log.begin()
        log.write_samples(4, [{"response": "of the run that went further"}])
    with RunLog(tmp_path, steps=9, first_step=3, settings={}) as log:
        log.write_samples(3, [{"response": "sampled ahead"}])
        assert not (tmp_path / "samples" / "step-000003.jsonl").exists()
        log.begin()
    (path,) = (tmp_path / "samples").iterdir()
    assert json.loads(path.read_text()) == {"response": "sampled ahead"}
