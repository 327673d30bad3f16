"""Seconds of each named phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


class Timer:
    def __init__(self, mark: Callable[[str], AbstractContextManager[Any]] = nullcontext) -> None:
        """``mark`` makes a context manager from a phase's name. It is entered around the phase."""
        self.seconds: dict[str, float] = {}
        self._mark = mark

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``seconds[name]``."""
        start = time.perf_counter()
        try:
            with self._mark(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items`` and add the time that the iterator needs for them to ``seconds[name]``."""
        iterator = iter(items)
        while True:
            with self.phase(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
