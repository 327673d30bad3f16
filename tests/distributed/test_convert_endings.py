"""A conversion that is killed, interrupted, paused or started twice leaves a whole model or no target.

One process imports everything and forks the conversions, so that a random moment falls into the conversion itself.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.ranks import ROOT, run_ranks
from tests.support.tiny import save_qwen2

KILL, INTERRUPT, TERMINATE = signal.SIGKILL, signal.SIGINT, signal.SIGTERM
ROUNDS = (
    *(("one", number) for number in (KILL, INTERRUPT, TERMINATE)),
    *(("one of two", number) for number in (KILL, INTERRUPT, signal.SIGSTOP)),
    ("two", None),
)
"""What runs in each round, and the signal that the first process gets at a random moment."""


@dataclass(frozen=True)
class Conversion:
    """One forked process that runs the tool."""

    pid: int
    said: Path

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, list[str]]:
        """Return the exit code (negative for a signal) and the lines of stdout and stderr."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self.said.read_text().splitlines()


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "tools" / "convert.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fork(tool: ModuleType, said: Path, *arguments: str | Path) -> Conversion:
    pid = os.fork()
    if pid:
        return Conversion(pid, said)
    code = 99
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        code = tool.main([*map(str, arguments)])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for_hidden(folder: Path, at_most_s: float) -> None:
    deadline = time.monotonic() + at_most_s
    while not list(folder.glob(".*.partial")) and time.monotonic() < deadline:
        time.sleep(0.002)


def disturb(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Disturb conversions of both directions at random moments. Return what happened to each."""
    import rich.progress  # noqa: F401

    from megatron_chord.convert import directions

    tool = load_tool()
    # With many pieces and files a conversion lasts long enough for a signal to reach every part of it.
    directions.PIECE_BYTES, directions.SHARD_BYTES = 2000, 20_000
    model = save_qwen2(folder / "hf", layers=6)
    draw = random.Random(seed)

    def run(said: str, *arguments: str | Path) -> tuple[int, list[str]]:
        return fork(tool, folder / said, *arguments).wait()

    begin = time.monotonic()
    first = run("first", "hf-to-megatron", model, folder / "megatron")
    duration = time.monotonic() - begin
    second = run("first", "megatron-to-hf", folder / "megatron", folder / "back")
    if (first[0], second[0]) != (0, 0):
        raise RuntimeError(f"{first}, {second}")
    sources = {"hf-to-megatron": model, "megatron-to-hf": folder / "megatron"}
    found = []
    for number, (kind, sent) in enumerate(ROUNDS):
        here = folder / f"round-{number}"
        here.mkdir()
        direction = draw.choice(sorted(sources))
        arguments = (direction, sources[direction], here / "target")
        processes = [fork(tool, folder / "one", *arguments)]
        if kind != "one":
            time.sleep(draw.uniform(0, 0.3) * duration)
            processes.append(fork(tool, folder / "two", *arguments))
        if sent is not None:
            if draw.random() < 0.7:
                wait_for_hidden(here, duration)
            time.sleep(draw.uniform(0, 0.4) * duration)
            processes[0].send(sent)
        if sent == signal.SIGSTOP:
            time.sleep(duration)
            processes[0].send(signal.SIGCONT)
        codes_and_lines = [process.wait() for process in processes]
        left = sorted(path.name for path in here.iterdir())
        whole = (here / "target").exists() and run("check", "verify", model, here / "target")[0] == 0
        found.append(
            {
                "kind": kind,
                "sent": sent,
                "codes": [code for code, _ in codes_and_lines],
                "lines": [lines for _, lines in codes_and_lines],
                "left": left,
                "whole": whole,
            }
        )
        if "target" not in left:  # the next conversion replaces what is left
            found[-1]["next"] = run("next", *arguments)
            found[-1]["after"] = sorted(path.name for path in here.iterdir())
    return found


def interrupt_while_reading(folder: Path) -> dict[str, Any]:
    """Send SIGINT to each command while its threads wait for the disk. Return the exit code, the lines and what is
    left."""
    import rich.progress  # noqa: F401

    from megatron_chord.weights.reader import HFReader
    from megatron_chord.weights.torch_dist import Checkpoint

    tool = load_tool()
    model, megatron = save_qwen2(folder / "hf", layers=1), folder / "megatron"
    assert fork(tool, folder / "said", "hf-to-megatron", model, megatron).wait()[0] == 0
    reading = folder / "reading"

    def stuck(*args: Any, **kwargs: Any) -> Any:
        reading.touch()
        time.sleep(3600)

    HFReader.read = stuck
    Checkpoint.read = stuck
    found = {}
    for command, *arguments in (
        ("hf-to-megatron", model),
        ("megatron-to-hf", megatron),
        ("megatron-to-megatron", megatron),
        ("verify", model, megatron),
    ):
        here = folder / command
        here.mkdir()
        target = () if command == "verify" else (here / "target",)
        process = fork(tool, folder / "said", command, *arguments, *target)
        while not reading.exists():
            if os.waitpid(process.pid, os.WNOHANG)[0]:
                raise RuntimeError(process.said.read_text())
            time.sleep(0.01)
        process.send(INTERRUPT)
        found[command] = *process.wait(), [path.name for path in here.iterdir()]
        reading.unlink()
    return found


def test_an_interrupted_command_does_not_wait_for_its_threads(tmp_path: Path) -> None:
    """It would wait for an hour. No time is measured."""
    (found,) = run_ranks(interrupt_while_reading, 1, tmp_path)
    assert len(found) == 4
    for command, (code, lines, left) in found.items():
        line = "ended by SIGINT"
        if command != "verify":
            line += f": {tmp_path / command / 'target'} has not been written"
        assert (code, lines, left) == (130, [line], []), command


def test_a_conversion_that_ends_early_leaves_a_whole_target_or_none(tmp_path: Path) -> None:
    (found,) = run_ranks(disturb, 1, tmp_path, 13)
    for case in found:
        assert case["whole"] == ("target" in case["left"]), case
        for code, lines in zip(case["codes"], case["lines"], strict=True):
            assert code in (0, 2, 128 + INTERRUPT, 128 + TERMINATE, -KILL), case
            told = [line for line in lines if "which a killed process had left" not in line]
            # A signal may arrive right after the line that reports the written target.
            endings = [line for line in told if not line.endswith(" GB")]
            assert len(told) - len(endings) <= 1, case
            assert len(endings) == (code not in (0, -KILL)), case
            if code == 2:
                assert "another process" in endings[0] or "already exists" in endings[0], case
        if case["sent"] in (None, signal.SIGSTOP):
            assert sorted(case["codes"]) == [0, 2], case
        if -KILL not in case["codes"]:
            assert set(case["left"]) <= {"target"}, case
        if "next" in case:
            code, lines = case["next"]
            assert code == 0, case
            assert case["after"] == ["target"], case
            dead = [name for name in case["left"] if name.endswith(".partial")]
            assert all(any(name in line for line in lines) for name in dead), case
    assert any(code not in (0, 2) for case in found for code in case["codes"]), "no signal met a conversion"
