"""The text about a step's data in the printed plan of a run."""

from __future__ import annotations

import pytest

from megatron_chord.config_io import load_config
from megatron_chord.methods.step_text import step_text
from megatron_chord.methods.table import method_of
from tests.support.ranks import ROOT


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("sft", "32 demonstrations; nothing is sampled"),
        ("grpo", "16 prompts x 8 rollouts; no demonstration is drawn"),
        ("dapo", "16 prompts x 8 rollouts, in up to 3 rounds of sampling; no demonstration is drawn"),
        ("chord_phi", "16 prompts x 8 rollouts + 32 demonstrations"),
        ("chord_both", "16 prompts x 8 rollouts + 32 demonstrations (where mu > 0)"),
        ("amft", "16 prompts x 8 rollouts (where mu < 1) + 32 demonstrations"),
        ("sft_then_rl", "16 prompts x 8 rollouts (where mu < 1) + 32 demonstrations (where mu > 0)"),
        ("remix", "16 prompts x 8 rollouts"),
        ("luffy", "16 prompts x 7 rollouts, each with its own demonstration"),
        ("trapo", "16 prompts x 8 rollouts, each with its own demonstration, in rounds of 4, 2, 1, 1"),
        (
            "relift",
            "16 prompts x 8 rollouts; an SFT update whenever 16 demonstrations of failed prompts are collected",
        ),
    ],
)
def test_what_a_step_samples_and_draws(example: str, expected: str) -> None:
    run = load_config(ROOT / "examples" / "methods" / f"{example}.yaml")
    assert step_text(method_of(run), run.batch) == expected
