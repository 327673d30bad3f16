"""A rank that fails alone prints its traceback first, and does not wait for the other ranks when it ends."""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_chord.config_io import dump_config
from megatron_chord.rollout.sync import RankLost, SyncError
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_run

LIMIT_S = 200
"""A process that waits for the other ranks is killed after this time."""


def end_of_a_rank(settings: Path, world_size: int, error: BaseException | None) -> tuple[int, str]:
    """Run the command line in a process, whose first step raises ``error``. Return its exit code and its output.

    Destroying the groups waits without end, as with NCCL, if the other ranks do not do the same.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        signal.alarm(LIMIT_S)
        try:
            code = _command(settings, world_size, error)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as output:
        text = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def _command(settings: Path, world_size: int, error: BaseException | None) -> int:
    from megatron_chord import cli
    from megatron_chord.train import loop

    others_come = error is None or isinstance(error, SyncError)
    exist = True

    def start(run: Any, shape: Any, method: Any, groups: Any, how: Any, stack: Any) -> Any:
        stack.callback(print, "servers are stopped", flush=True)
        if error is not None:
            raise error
        return SimpleNamespace(
            context=SimpleNamespace(coordinator=None),
            step=1,
            memory={},
            chat_template=None,
            evaluates_first=False,
        )

    def do_exist() -> bool:
        return exist

    def destroy() -> None:
        nonlocal exist
        while world_size > 1 and not others_come:
            signal.pause()
        exist = False
        print("groups are destroyed", flush=True)

    names = {
        "check_run": lambda *_: (None, None),
        "coordinator_timeout_s": lambda *_: 1.0,
        "start_run": start,
    }
    groups = SimpleNamespace(rank=0, pulse=SimpleNamespace(enter=lambda phase: None))
    with (
        mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": str(world_size)}),
        mock.patch("megatron_chord.train.setup.check_run"),
        mock.patch.multiple(loop, _run_steps=mock.Mock(), _export=mock.Mock(), **names),
        mock.patch("megatron_chord.runtime.parallel.start", return_value=groups),
        mock.patch("torch.distributed.is_initialized", do_exist),
        mock.patch("torch.distributed.destroy_process_group", destroy),
    ):
        return cli.main(["train", str(settings)])


def ends(settings: Path, cases: list[tuple[int, BaseException | None]]) -> list[tuple[int, str]]:
    return [end_of_a_rank(settings, *case) for case in cases]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """The exit code and the lines of output of each case."""
    folder = tmp_path_factory.mktemp("run")
    settings = folder / "run.yaml"
    settings.write_text(dump_config(tiny_run(folder)))
    cases: dict[str, tuple[int, BaseException | None]] = {
        "no error": (2, None),
        "every rank": (2, SyncError("a server is lost")),
        "this rank": (2, RuntimeError("CUDA out of memory")),
        "another rank": (2, RankLost("rank 1")),
        "a signal": (2, SystemExit(143)),
        "the only rank": (1, RuntimeError("CUDA out of memory")),
    }
    (results,) = run_ranks(ends, 1, settings, list(cases.values()), timeout_s=2 * LIMIT_S)
    return {name: (code, text.splitlines()) for name, (code, text) in zip(cases, results, strict=True)}


def test_ranks_that_end_together_destroy_their_groups(ended: dict[str, tuple[int, list[str]]]) -> None:
    assert ended["no error"] == (0, ["servers are stopped", "groups are destroyed"])
    code, lines = ended["every rank"]
    assert code == 69
    assert lines == ["servers are stopped", "groups are destroyed", "error: SyncError: a server is lost"]


def test_the_traceback_of_a_rank_that_fails_alone_comes_first(
    ended: dict[str, tuple[int, list[str]]],
) -> None:
    code, lines = ended["this rank"]
    assert code == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-3:] == [
        "RuntimeError: CUDA out of memory",
        "servers are stopped",
        "error: RuntimeError: CUDA out of memory",
    ]
    assert lines.count("Traceback (most recent call last):") == 1


def test_a_rank_that_others_left_or_that_a_signal_ends_does_not_wait_for_them(
    ended: dict[str, tuple[int, list[str]]],
) -> None:
    assert ended["another rank"] == (79, ["servers are stopped", "error: RankLost: rank 1"])
    assert ended["a signal"] == (143, ["servers are stopped"])


def test_a_run_of_one_rank_ends_as_any_program(ended: dict[str, tuple[int, list[str]]]) -> None:
    code, lines = ended["the only rank"]
    assert code == 1
    assert lines[:2] == ["servers are stopped", "groups are destroyed"]
    assert lines[-1] == "RuntimeError: CUDA out of memory"
