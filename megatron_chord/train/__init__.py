"""The training. A call of this package, ``megatron_chord.train(run)``, is a training from a script or a notebook."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """``from megatron_chord import train`` gives this package, whatever else the name is wanted for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from megatron_chord.train.from_python import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
