"""CHORD on Megatron-Core. From Python: ``from megatron_chord import load_config, train, evaluate`` (docs/running.md).

These names are loaded when they are used, so that an import of the package, or of one of its modules, stays cheap.
``train`` is the subpackage, which can be called.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_chord.api import Evaluated, RunFailed, Trained, evaluate, load_config, train

__all__ = ["Evaluated", "RunFailed", "Trained", "evaluate", "load_config", "train"]


def __getattr__(name: str) -> Any:
    if name == "train" or name not in __all__:  # Python imports the subpackage itself
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("megatron_chord.api"), name)
