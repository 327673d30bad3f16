"""The checks that settings are made of. Each raises a ValueError that names the setting and its value."""

from __future__ import annotations

MAX_TEMPERATURE = 2
"""vLLM refuses to sample at a higher one."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def positive(**values: float) -> None:
    for name, value in values.items():
        require(value > 0, f"{name} must be > 0, got {value}")


def not_negative(**values: float) -> None:
    for name, value in values.items():
        require(value >= 0, f"{name} must be >= 0, got {value}")


def allowed_temperature(**temperatures: float) -> None:
    for name, value in temperatures.items():
        require(
            value <= MAX_TEMPERATURE,
            f"{name} must be <= {MAX_TEMPERATURE}, got {value}: vLLM refuses to sample at a higher one",
        )
