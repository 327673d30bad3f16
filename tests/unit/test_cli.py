"""The command line refuses wrong arguments with a helpful message."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.cli import main


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the error line of the command."""
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (("train",), "RUN.yaml"),
        (("check",), "RUN.yaml"),
        (("data",), "RUN.yaml"),
        (("mu", "preview"), "RUN.yaml"),
        (("evaluate",), "POLICY"),
    ],
)
def test_only_what_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], missing: str
) -> None:
    assert refused(capsys, *argv) == f"the following arguments are required: {missing}"


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (
            ("train", "x", "--optim.lr=1e-6"),
            "--optim.lr=1e-6 is a setting, not an option: write optim.lr=1e-6",
        ),
        (("train", "x", "--optim.lr", "1e-6"), "--optim.lr is a setting, not an option: write optim.lr=1e-6"),
        (("train", "--lr=1e-6", "x"), "--lr=1e-6 is a setting, not an option: write optim.lr=1e-6"),
        (
            ("check", "x", "--trace-steps=2"),
            "--trace-steps=2 is a setting, not an option: write trace_steps=2",
        ),
        (("evaluate", "x", "--samples=2"), "--samples=2 is a setting, not an option: write samples=2"),
    ],
)
def test_a_setting_with_dashes(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], answer: str
) -> None:
    assert refused(capsys, *argv) == f"{answer} without dashes"


def test_unknown_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "train", "x", "--nonsense=2") == "unrecognized arguments: --nonsense=2"
    assert refused(capsys, "doctor", "optim.lr=1") == "unrecognized arguments: optim.lr=1"


def test_overrides_stand_before_and_after_an_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{}")
    assert main(["train", str(file), "lrr=1", "--overwrite", "stepz=2"]) == 2
    said = capsys.readouterr().err
    assert "'lrr'" in said
    assert "did you mean steps?" in said
