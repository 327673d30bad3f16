"""The checks that settings are made of. Each raises a ValueError that names the setting and its value."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def positive(**values: float) -> None:
    for name, value in values.items():
        require(value > 0, f"{name} must be > 0, got {value}")


def not_negative(**values: float) -> None:
    for name, value in values.items():
        require(value >= 0, f"{name} must be >= 0, got {value}")
