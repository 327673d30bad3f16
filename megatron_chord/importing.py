"""Importing many modules in less time."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Switch the garbage collector off while the block imports modules.

    Imports make hundreds of thousands of objects that live as long as the process, and the collector would visit them
    again and again. That is a third of the time in which vLLM's server starts, and a fifth of a rank's imports.
    Afterwards the collector no longer visits them at all (``gc.freeze``). So use this only where a process begins:
    garbage that is there at the end of the block is never freed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
