"""JSON-like values that also contain arrays: the arrays go to a file of their own, and return from it.

A checkpoint's run state is JSON. Routes of answers that it keeps are bytes, which JSON would make several times larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load_file, save_file

from megatron_chord.files import sync_path

T = TypeVar("T")
_KEY = "array in the file"


def without_arrays(value: Any) -> tuple[Any, list[np.ndarray]]:
    """``value`` with every array replaced by its number in the list, as plain JSON, and the list."""
    arrays: list[np.ndarray] = []

    def number(array: np.ndarray) -> dict[str, int]:
        arrays.append(array)
        return {_KEY: len(arrays) - 1}

    return with_replaced(value, np.ndarray, number), arrays


def with_replaced(value: Any, kind: type[T], by: Callable[[T], Any]) -> Any:
    """JSON-like ``value`` with every object of type ``kind`` in it replaced; tuples that may contain one are lists.

    Lists are of one kind, so their first value decides; most are long lists of numbers.
    """
    if isinstance(value, kind):
        return by(value)
    if isinstance(value, Mapping):
        return {key: with_replaced(inner, kind, by) for key, inner in value.items()}
    if isinstance(value, list | tuple) and value and isinstance(value[0], (kind, Mapping, list, tuple)):
        return [with_replaced(inner, kind, by) for inner in value]
    return value


def with_arrays_of(value: Any, arrays: Sequence[np.ndarray]) -> Any:
    """The value that ``without_arrays`` was given; tuples are lists."""
    if isinstance(value, dict):
        if value.keys() == {_KEY}:
            return arrays[value[_KEY]]
        return {key: with_arrays_of(inner, arrays) for key, inner in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [with_arrays_of(inner, arrays) for inner in value]
    return value


def write_arrays(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write a file of arrays, and wait until it is on the disk."""
    save_file({str(number): np.ascontiguousarray(array) for number, array in enumerate(arrays)}, path)
    sync_path(path)


def read_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of ``write_arrays``, in order. Raises ValueError if the file is not one."""
    try:
        found = load_file(path)
        return [found[str(number)] for number in range(len(found))]
    except Exception as error:  # safetensors' own errors, and missing numbers
        raise ValueError(f"{path} cannot be read: {error}") from error
