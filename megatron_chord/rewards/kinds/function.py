"""A function of the user's own, from a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from megatron_chord.config_checks import positive, require
from megatron_chord.rewards.kinds.base import Permission, RewardKind
from megatron_chord.rewards.response import RowNeeds

_CONCURRENCY = 8
_MODULE = "reward_function"
"""Name of the user's module, whatever its file is called: math.py must not become `math`."""


@dataclass(frozen=True, kw_only=True)
class FunctionReward(RewardKind):
    """The number, or the named numbers, that a function in a Python file of your own returns (docs/rewards.md)."""

    kind: Literal["function"] = "function"
    path: Path
    """Python file. It may import what is installed here, and files in its own folder."""
    name: str
    """The function in it. It is called with a `megatron_chord.rewards.response.Response`. It may be `async`."""
    batch_size: int | None = None
    """Default: the function is called with one response. With a number the function is called with a list of at most
    this number of responses, and returns a list of the same length."""
    concurrency: int | None = None
    """For an `async` function: number of calls that each worker makes at the same time. Default: 8."""
    allow: tuple[Permission, ...] = ()
    """What the function may do: network (open sockets), subprocess (start programs), files (write files). If it does
    something that is not allowed, the grading fails."""
    environment: tuple[str, ...] = ()
    """Environment variables of the run that the function sees, such as OPENAI_API_KEY. It sees no others."""

    RUNS_USERS_CODE: ClassVar[bool] = True
    NEEDS: ClassVar[RowNeeds] = RowNeeds(truth=False, fields=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.name.isidentifier(), f"reward.name must be the name of a function, got {self.name!r}")
        for setting, value in {"batch_size": self.batch_size, "concurrency": self.concurrency}.items():
            if value is not None:
                positive(**{f"reward.{setting}": value})
        for variable in self.environment:
            require(
                re.fullmatch(r"[A-Za-z_]\w*", variable) is not None,
                f"reward.environment lists names of environment variables, got {variable!r}",
            )

    @property
    def label(self) -> str:
        return self.name

    @property
    def permissions(self) -> frozenset[Permission]:
        return frozenset(self.allow)

    @property
    def variables(self) -> tuple[str, ...]:
        return self.environment

    @property
    def list_size(self) -> int | None:
        return self.batch_size

    @property
    def calls_at_once(self) -> int:
        return self.concurrency or _CONCURRENCY

    def load(self) -> Callable[[Any], Any]:
        """Return the user's function. Raise ValueError if it does not exist or cannot be called with one argument."""
        found = vars(_module(self.path)).get(self.name)
        shown = f"`{self.name}` in {self.path}"
        if found is None:
            raise ValueError(f"reward.name: there is no {shown}")
        if not callable(found):
            raise ValueError(f"reward.name: {shown} is not a function, but {found!r:.80}")
        try:
            inspect.signature(found).bind(object())
        except TypeError:
            argument = "a list of responses" if self.batch_size else "the response"
            raise ValueError(
                f"reward.name: {shown} must take one argument, {argument}; its signature is "
                f"{self.name}{inspect.signature(found)}"
            ) from None
        require(
            self.concurrency is None or is_async(found),
            f"reward.concurrency is only for `async` functions, and {shown} is not one; leave it out, or set "
            "reward.workers",
        )
        return found

    def error_text(self, error: BaseException) -> str:
        return last_line(error, self.path)

    def has_answer(self, text: str) -> bool:
        """Return False: only the user's function can find an answer. A response that reached the length limit then
        counts as a response without an answer."""
        return False


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 (an object whose __call__ is async)
    )


def _module(path: Path) -> ModuleType:
    """Import the file. Its folder then comes first in the search path of modules."""
    if not path.is_file():
        raise ValueError(f"reward.path: {path} does not exist")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward.path: {path} is not a Python file, which ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward.path: {path} cannot be imported: {last_line(error, path)}") from error
    return module


def last_line(error: BaseException, path: Path) -> str:
    """The type and the first line of an error, and the last place in ``path`` of its traceback."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    text = f"{type(error).__name__}: {(message.splitlines() or [''])[0]}".removesuffix(": ")
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{text} ({path.name}:{lines[-1]})" if lines else text
