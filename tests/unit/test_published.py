"""The presets have every row of the paper's table, for mathematics and for tool calls, with the paper's sizes."""

from __future__ import annotations

import pytest

from megatron_chord.config import ObjectiveConfig, RunConfig
from megatron_chord.config_io import load_config
from megatron_chord.methods.table import method_of
from megatron_chord.schedules import ScheduleInput
from tests.support.ranks import ROOT

FOLDER = ROOT / "examples" / "published"
ROWS = (
    "sft_light",
    "sft_best",
    "grpo",
    "sft_best_rl",
    "sft_light_rl",
    "luffy",
    "sasr",
    "chord_mu",
    "chord_phi",
)
# Prompts, rollouts and demonstrations of a step (arXiv 2508.11408, A.1), and the number of rows of demonstrations.
SIZES = {"math_qwen7b": (32, 8, 64, 5000), "tools_llama3b": (96, 8, 96, 500)}


def load(row: str, domain: str) -> RunConfig:
    return load_config(FOLDER / f"{row}_{domain}.yaml")


def mu_of(run: RunConfig, step: int) -> float:
    schedule = method_of(run).schedule(run)
    assert schedule is not None
    return schedule.value(ScheduleInput(step=step))


@pytest.mark.parametrize("domain", SIZES)
@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_the_papers_sizes(row: str, domain: str) -> None:
    run = load(row, domain)
    prompts, rollouts, demonstrations, _ = SIZES[domain]
    samples = method_of(run).uses_rollouts(run)
    assert samples == (row not in ("sft_light", "sft_best"))
    if samples:
        assert run.batch.prompts == prompts
        # LUFFY's group of eight has seven rollouts and the prompt's own demonstration.
        assert run.batch.rollouts == (7 if row == "luffy" else rollouts)
    if row in ("sft_light", "sft_best", "sasr", "chord_mu", "chord_phi"):
        assert run.batch.demonstrations == demonstrations
    assert run.output.name == f"{row}_{domain}"
    if row not in ("luffy", "sasr"):  # these methods have aggregations of their own
        assert run.objective == ObjectiveConfig()
    assert run.data.max_response_tokens == 16384


@pytest.mark.parametrize("domain", SIZES)
def test_sft_takes_one_epoch_or_three_and_rl_starts_from_its_policy(domain: str) -> None:
    _, _, demonstrations, rows = SIZES[domain]
    light, best = load("sft_light", domain), load("sft_best", domain)
    assert light.steps == rows // demonstrations
    assert best.steps == 3 * light.steps
    assert best.checkpoint.export == "best"
    assert mu_of(light, 0) == mu_of(light, light.steps - 1) == 1.0
    assert mu_of(load("grpo", domain), 0) == 0.0
    for kind, run in (("light", light), ("best", best)):
        start = load(f"sft_{kind}_rl", domain).model.path
        assert start.resolve() == (ROOT / run.output / "policy").resolve()
