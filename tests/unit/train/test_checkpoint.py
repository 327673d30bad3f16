"""Newer checkpoints are renamed when a run continues from an older one."""

from __future__ import annotations

from pathlib import Path

from megatron_chord.train.checkpoint import RUN_STATE, set_aside


def put(folder: Path, step: int, content: str) -> None:
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / RUN_STATE).write_text(content)


def test_a_checkpoint_that_was_set_aside_before_is_kept(tmp_path: Path) -> None:
    put(tmp_path, 20, "")
    said: list[str] = []
    for attempt in ("first", "second", "third"):
        put(tmp_path, 40, attempt)
        set_aside(tmp_path, after=20, notify=said.append)
    contents = {path.parent.name: path.read_text() for path in tmp_path.glob(f"step-*/{RUN_STATE}")}
    assert contents == {
        "step-000020": "",
        "step-000040.set-aside": "first",
        "step-000040.set-aside-2": "second",
        "step-000040.set-aside-3": "third",
    }
    assert "step-000040 is kept as step-000040.set-aside-3, " in said[-1]
    assert (tmp_path / "latest").read_text() == "step-000020\n"
