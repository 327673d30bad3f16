"""The training. A call of this package, ``megatron_chord.train(run)``, is a training from a script or a notebook."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Makes the package ``megatron_chord.train`` callable, so that ``from megatron_chord import train`` works as a
    function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from megatron_chord.train.from_python import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
