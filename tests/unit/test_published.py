"""The presets have every row of the paper's table, for mathematics and for tool calls, with the paper's sizes.

`check` accepts all of them with a stand-in for the model and the data, and so do the suites.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_chord.cli import main
from megatron_chord.config import ObjectiveConfig, RunConfig
from megatron_chord.config_io import load_config, load_suite
from megatron_chord.evaluation.evaluate import check_suite, load_suite_data
from megatron_chord.evaluation.policy import Policy
from megatron_chord.families.table import read_shape
from megatron_chord.methods.table import method_of
from megatron_chord.schedules import ScheduleInput
from megatron_chord.train.setup import check_run
from tests.support.files import rows_of, write_rows
from tests.support.ranks import ROOT
from tools import table

EXAMPLE = ROOT / "examples" / "arithmetic"
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


def preset(row: str, domain: str) -> RunConfig:
    return load_config(FOLDER / f"{row}_{domain}.yaml")


def mu_of(run: RunConfig, step: int) -> float:
    schedule = method_of(run).schedule()
    assert schedule is not None
    return schedule.value(ScheduleInput(step=step))


@pytest.mark.parametrize("domain", SIZES)
@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_the_papers_sizes(row: str, domain: str) -> None:
    run = preset(row, domain)
    prompts, rollouts, demonstrations, _ = SIZES[domain]
    samples = method_of(run).uses_rollouts(run.batch)
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
    light, best = preset("sft_light", domain), preset("sft_best", domain)
    assert light.steps == rows // demonstrations
    assert best.steps == 3 * light.steps
    assert best.checkpoint.export == "best"
    assert mu_of(light, 0) == mu_of(light, light.steps - 1) == 1.0
    assert mu_of(preset("grpo", domain), 0) == 0.0
    for kind, run in (("light", light), ("best", best)):
        start = preset(f"sft_{kind}_rl", domain).model.path
        assert start.resolve() == (ROOT / run.output / "policy").resolve()


READ_DIFFERENTLY = ("sft_best", "luffy")
"""Rows whose data are read: demonstrations with held-out problems, and prompts with demonstrations of their own. The
other rows read a part of these."""


def stand_in(folder: Path) -> Path:
    """Write the quick start's policy with as many positions as the presets' lengths need."""
    policy = folder / "policy"
    shutil.copytree(EXAMPLE / "policy", policy)
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    return policy


def test_check_accepts_every_preset_with_a_model_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = stand_in(tmp_path)
    for domain, name in (("math", "problems"), ("tools", "calls")):
        demonstrations = "demonstrations_aligned" if domain == "math" else "calls_demonstrations"
        for kind, file in (("rl", f"{name}_train"), ("sft", demonstrations), ("held_out", f"{name}_heldout")):
            lines = (EXAMPLE / f"{file}.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / f"{domain}_{kind}.jsonl").write_text("".join(lines[:12]))
    settings = [
        *(f"{who}model.path={policy}" for who in ("", "sft_light_rl:", "sft_best_rl:")),
        *(f"{domain}:data.prompts={domain}_rl.jsonl" for domain in table.DOMAINS),
        *(f"{domain}:data.demonstrations={domain}_sft.jsonl" for domain in table.DOMAINS),
        *(f"sft_best_{domain}:data.evaluation={domain}_held_out.jsonl" for domain in table.DOMAINS),
    ]
    rows = [row for row in table.rows_of(table._arguments(settings)) if row.key != table.BASE]
    assert {row.preset for row in rows} == set(FOLDER.glob("*.yaml"))
    for row in rows:
        if row.key in READ_DIFFERENTLY:
            code = main(["check", str(row.preset), *row.settings])
            printed = capsys.readouterr()
            assert (code, printed.err) == (0, ""), f"{row.name}: {printed.err}"
            assert "No fault found" in printed.out
        else:
            run = load_config(row.preset, row.settings)
            check_run(run, run.parallel.ranks)


def test_every_suite_accepts_a_policy_and_files(tmp_path: Path) -> None:
    folder = stand_in(tmp_path)
    policy = Policy(folder=folder, source=folder, digest="")
    shape = read_shape(folder)
    problems, calls = (rows_of(EXAMPLE / f"{name}_heldout.jsonl")[:2] for name in ("problems", "calls"))
    suites = sorted((ROOT / "examples" / "suites").glob("*.yaml"))
    assert suites
    for path in suites:
        data = tmp_path / path.stem
        for item in load_suite(path).benchmarks:
            suite_reward = item.reward or load_suite(path).reward
            rows = calls if suite_reward.kind == "tool_calls" else problems
            (data / item.file).parent.mkdir(parents=True, exist_ok=True)
            write_rows(data / item.file, *[row | {"subject": "a", "category": "b"} for row in rows])
        suite = load_suite(path, [f"data={data}"])
        check_suite(suite)
        # One benchmark of each prompt style and reward.
        kinds = {
            (item.system_prompt, (item.reward or suite.reward).kind): item.name for item in suite.benchmarks
        }
        loaded = load_suite_data(policy, replace(suite, only=tuple(kinds.values())), shape)
        assert {item.benchmark.name for item in loaded} == set(kinds.values())
        assert all(len(item.prompts) == 2 for item in loaded)
