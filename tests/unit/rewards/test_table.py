from __future__ import annotations

import typing

import pytest

from megatron_chord.config import RewardConfig
from megatron_chord.rewards.table import EXAMPLES, GRADERS


def test_every_kind_of_the_settings_has_a_grader() -> None:
    assert set(typing.get_args(typing.get_type_hints(RewardConfig)["kind"])) <= set(GRADERS)


@pytest.mark.parametrize("kind", GRADERS)
def test_example_is_right(kind: str) -> None:
    assert GRADERS[kind](*EXAMPLES[kind], marker="####") == 1.0
