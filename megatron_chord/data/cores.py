"""Runs one function on all cores, with results in order and with limited memory.

The work is done by threads: tokenizers and template processes run without Python's global interpreter lock (GIL),
which is held for only a few percent of the time.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
N = TypeVar("N")

ALONE_S = 3.0
"""Seconds in which this thread works alone. Starting a helper's template process takes one to two seconds."""
_AHEAD = 4
"""Maximum number of unfinished items for each core."""


def on_all_cores(
    items: Iterable[T],
    prepare: Callable[[T], tuple[N, Any]],
    work: Callable[[Any], Any],
    *,
    cores: int | None = None,
) -> Iterator[tuple[N, Callable[[], Any]]]:
    """For each item, in order: a name, and a function that returns the result of ``work`` or raises its exception.

    Args:
        prepare: called in the caller's thread for one item after another. It returns the name and the argument of
            ``work``, or an exception that the returned function raises.
        cores: number of threads. Default: all cores that this process may use.
    """
    count = len(os.sched_getaffinity(0)) if cores is None else cores
    spread_from = time.monotonic() + ALONE_S
    pending: deque[tuple[N, Callable[[], Any]]] = deque()
    with ThreadPoolExecutor(max(1, count)) as pool:
        try:
            for item in items:
                name, prepared = prepare(item)
                alone = count < 2 or time.monotonic() < spread_from
                if isinstance(prepared, Exception):
                    pending.append((name, partial(_raise, prepared)))
                elif alone:
                    pending.append((name, partial(work, prepared)))
                else:
                    pending.append((name, pool.submit(work, prepared).result))
                while pending and (alone or len(pending) >= _AHEAD * count):
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _raise(error: Exception) -> None:
    raise error
