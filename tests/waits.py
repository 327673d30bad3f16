"""Where tests wait: a pytest plugin that lists, by test, the time, the CPU time, and the time when nothing computed.

python -m pytest -p tests.waits tests/e2e/test_frozen.py       without -n

A thread looks four times a second at this process and at all its descendants. When together they used almost no CPU
time and none was waiting for a core, the quarter of a second counts as idle, for the test's line that waited. Idle time
is worth removing: a limit that the test sets, or processes that could start together.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_chord.process_table import descendants

PERIOD_S = 0.25
IDLE = 0.06
"""Number of cores. Processes that only wait use less than this, all together."""
MOST_ROWS = 40
_TICKS = os.sysconf("SC_CLK_TCK")
_TESTS = Path(__file__).parent


@dataclass
class _Seen:
    wall_s: float = 0.0
    cpu_s: float = 0.0
    idle_s: float = 0.0
    lines: Counter[str] = field(default_factory=Counter)
    """Samples in which nothing computed, by the line of the test that waited."""


class Waits:
    def __init__(self) -> None:
        self.seen: dict[str, _Seen] = defaultdict(_Seen)
        self._test = "collection"
        self._main = threading.main_thread().ident or 0
        threading.Thread(target=self._watch, daemon=True).start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = nodeid

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("seconds: in all, of CPU, idle; and the line that waited idle most")
        slowest = sorted(self.seen.items(), key=lambda item: -item[1].wall_s)
        for test, seen in slowest[:MOST_ROWS]:
            lines = " ".join(f"{line}({n * PERIOD_S:.1f})" for line, n in seen.lines.most_common(2))
            terminalreporter.write_line(
                f"{seen.wall_s:6.1f} {seen.cpu_s:6.1f} {seen.idle_s:6.1f}  {test}  {lines}"
            )

    def _watch(self) -> None:
        before, then = _usage(), time.monotonic()
        while True:
            time.sleep(PERIOD_S)
            test, now, usage = self._test, time.monotonic(), _usage()
            cpu_s = sum(cpu - before.get(pid, (0.0, 0.0))[0] for pid, (cpu, _) in usage.items())
            queued_s = sum(queued - before.get(pid, (0.0, queued))[1] for pid, (_, queued) in usage.items())
            seen, passed_s = self.seen[test], now - then
            seen.wall_s += passed_s
            seen.cpu_s += cpu_s
            if cpu_s + queued_s < IDLE * passed_s:
                seen.idle_s += passed_s
                seen.lines[self._waiting_line()] += 1
            before, then = usage, now

    def _waiting_line(self) -> str:
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.name.startswith(("test_", "conftest")) or path.is_relative_to(_TESTS):
                return f"{path.name}:{frame.f_lineno}"
            frame = frame.f_back
        return "pytest"


def _usage() -> dict[str, tuple[float, float]]:
    """CPU time of each process and the time that its main thread waited for a core, in seconds. Only the main thread of
    this process counts."""
    found = {}
    own = os.getpid()
    for place in (f"{own}/task/{own}", *map(str, descendants(own))):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{place}/stat").read_text().rpartition(")")[2].split()
            queued_ns = int(Path(f"/proc/{place}/schedstat").read_text().split()[1])
            found[place] = ((int(fields[11]) + int(fields[12])) / _TICKS, queued_ns / 1e9)
    return found


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Waits())
