"""Paired differences of two evaluations, compared with hand arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_chord.cli import main
from megatron_chord.evaluation.compare import compare
from megatron_chord.evaluation.results import PROBLEMS, ProblemResult
from tests.support.files import write_rows


def write_results(
    folder: Path, values: Sequence[float | None], *, question: str = "q", metric: str = "avg@2"
) -> Path:
    folder.mkdir()
    lines = [
        ProblemResult(
            benchmark="b",
            problem=f"p{i}",
            category=None,
            question=f"{question}{i}",
            truth="1",
            scores=(value,),
            values={metric: value},
        )
        for i, value in enumerate(values)
    ]
    write_rows(folder / PROBLEMS, *map(dataclasses.asdict, lines))
    return folder


def test_differences_are_paired(tmp_path: Path) -> None:
    # Both scores vary much between problems. B is better by 0.25 on every problem, so the paired interval has no width.
    a = write_results(tmp_path / "a", [0.0, 0.5, 0.75, 0.25])
    b = write_results(tmp_path / "b", [0.25, 0.75, 1.0, 0.5])
    ((found,), remarks) = compare(a, b)
    assert (found.a, found.b) == (0.375, 0.625)
    assert (found.difference.value, found.difference.low, found.difference.high) == (0.25, 0.25, 0.25)
    assert (found.gained, found.lost) == (("p3",), ())
    assert remarks == []


def test_the_interval_is_that_of_the_mean_of_differences(tmp_path: Path) -> None:
    # 30 problems gained, 10 lost, 60 as before: the mean is 0.2, its deviation sqrt((0.4 - 0.04) / 100) = 0.06.
    a = write_results(tmp_path / "a", [0.0] * 30 + [1.0] * 10 + [1.0] * 60)
    b = write_results(tmp_path / "b", [1.0] * 30 + [0.0] * 10 + [1.0] * 60)
    ((found,), _) = compare(a, b, resamples=20_000)
    assert found.difference.value == pytest.approx(0.2)
    deviation = math.sqrt((0.4 - 0.2**2) / 100)
    assert found.difference.low == pytest.approx(0.2 - 1.96 * deviation, abs=0.012)
    assert found.difference.high == pytest.approx(0.2 + 1.96 * deviation, abs=0.012)
    assert (len(found.gained), len(found.lost)) == (30, 10)


def test_problems_without_a_value_or_a_partner_are_left_out(tmp_path: Path) -> None:
    a = write_results(tmp_path / "a", [0.0, None, 1.0, 1.0])
    b = write_results(tmp_path / "b", [1.0, 1.0, 1.0])
    ((found,), remarks) = compare(a, b)
    assert found.num_problems == 2
    assert remarks == [f"1 problems are only in {a}"]


def test_refused(tmp_path: Path) -> None:
    a = write_results(tmp_path / "a", [0.0])
    with pytest.raises(ValueError, match="1 problems have other messages or another truth"):
        compare(a, write_results(tmp_path / "b", [0.0], question="other"))
    with pytest.raises(ValueError, match="no common metric of a benchmark"):
        compare(a, write_results(tmp_path / "c", [0.0], metric="pass@2"))
    with pytest.raises(ValueError, match=r"holds no evaluation: problems.jsonl is not there"):
        compare(a, tmp_path)


def test_the_command_names_what_flipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_results(tmp_path / "a", [0.0, 1.0, 1.0])
    b = write_results(tmp_path / "b", [1.0, 0.0, 1.0])
    assert main(["compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    assert "+0.0" in printed
    assert "b avg@2: 1 gained: p0" in printed
    assert "b avg@2: 1 lost: p1" in printed
    assert main(["compare", str(a), str(tmp_path)]) == 2
    assert "holds no evaluation" in capsys.readouterr().err
