from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from megatron_chord.runtime.megatron import hide_warnings


@pytest.fixture(autouse=True)
def _own_filters() -> Iterator[None]:
    logger = logging.getLogger("megatron")
    level = logger.level
    with warnings.catch_warnings():
        yield
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        ("megatron.core.optimizer", False),
        ("megatron_fsdp.mixed_precision", False),
        ("torch.distributed.c10d_logger", False),
        ("torch.nn.modules", True),
        ("megatron_chord.train.loop", True),
    ],
)
def test_only_warnings_of_megatron_and_torch_distributed_are_hidden(module: str, shown: bool) -> None:
    warnings.simplefilter("always")
    hide_warnings()
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit("a warning", UserWarning, f"{module}.py", 1, module=module, registry={})
    assert bool(caught) is shown
