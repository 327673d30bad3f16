"""Reads settings from plain nested mappings, as in config.yaml, by their full names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard


def setting(settings: Mapping[str, Any], name: str, otherwise: Any = None) -> Any:
    """The value of a setting by its full name, such as ``optim.lr``; ``otherwise`` if there is no such setting."""
    value: Any = settings
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return otherwise
        value = value[part]
    return value


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1e-6}}`` -> ``{"optim.lr": 1e-6}``.

    The blocks of a list are numbered: ``data.prompts[0].weight``. Other lists and empty blocks stay as they are.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{name}.")
        elif are_blocks(value):
            for number, block in enumerate(value):
                found |= flat(block, f"{before}{name}[{number}].")
        else:
            found[f"{before}{name}"] = value
    return found


def are_blocks(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """True if ``value`` is a list of at least one block of settings."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
