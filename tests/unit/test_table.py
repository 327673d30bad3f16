"""tools/table.py on real folders: which runs are done, which come next, and the table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_chord.config_io import dump_config, load_config
from megatron_chord.evaluation import results
from megatron_chord.evaluation.evaluate import SUITE
from megatron_chord.families.table import read_shape
from megatron_chord.train.metrics import METRICS
from megatron_chord.train.segments import write_settings
from megatron_chord.train.setup import load_data
from tests.support.files import write_rows
from tests.support.ranks import ROOT
from tools import table

QUICK = f"@{ROOT}/examples/published/quick_start.txt"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in quick_start.txt begin there


def table_rows(tmp_path: Path, *arguments: str) -> dict[str, table.Row]:
    folders = [f"--runs={tmp_path / 'runs'}", f"--evaluations={tmp_path / 'evaluations'}"]
    rows = table.rows_of(table._arguments([*arguments, *folders]))
    return {f"{row.key}_{row.domain}": row for row in rows}


def train(row: table.Row, *, steps: int | None = None, policy: bool = True) -> None:
    """Write what a run leaves after ``steps`` steps (all of them by default)."""
    config = load_config(row.preset, [*row.settings, f"output={row.run}"])
    row.run.mkdir(parents=True, exist_ok=True)
    write_settings(row.run, dump_config(config), first_step=0)
    done = config.steps if steps is None else steps
    write_rows(row.run / METRICS, *[{"step": step} for step in range(done)])
    if policy:
        row.policy.mkdir(exist_ok=True)
        (row.policy / "config.json").write_text("{}")
        (row.policy / "model.safetensors").write_bytes(b"")


def evaluate(row: table.Row, *, missing: int = 0, **values: float) -> None:
    """Write what an evaluation leaves. ``values`` belong to the first metric of a benchmark, or to a mean."""
    benchmarks = {
        item.name: {
            "metrics": {
                item.metrics[0]: {"value": values.get(item.name), "low": 0.0, "high": 1.0, "problems": 1}
            },
            "answers": 1,
            "response_tokens": None,
            "truncated": 0.0,
            "grader_errors": 0,
            "missing": missing,
        }
        for item in row.suite.resolved()
    }
    means = {
        mean.name: {"metric": mean.metric, "value": values[mean.name], "low": 0.0, "high": 1.0, "problems": 1}
        for mean in row.suite.requested_means()
        if mean.name in values
    }
    found = {"suite": "s", "policy": {"name": row.name, "path": "", "digest": ""}, "seed": 0}
    found |= {"benchmarks": benchmarks, "means": means}
    row.evaluation.mkdir(parents=True, exist_ok=True)
    (row.evaluation / SUITE).write_text(dump_config(row.suite))
    results.write(row.evaluation, found | {"row": results.row_of(found)}, [])


def test_a_row_comes_after_the_one_that_it_starts_from(tmp_path: Path) -> None:
    rows = table_rows(tmp_path, "math:model.path=/models/q", "tools:model.path=/models/l")
    order = list(rows)
    assert sorted(order) == sorted(f"{key}_{domain}" for key in table.TITLES for domain in ("math", "tools"))
    for kind in ("light", "best"):
        for domain in ("math", "tools"):
            start, rl = rows[f"sft_{kind}_{domain}"], rows[f"sft_{kind}_rl_{domain}"]
            assert order.index(f"sft_{kind}_{domain}") < order.index(f"sft_{kind}_rl_{domain}")
            # The domain's model is not the model that it starts from.
            config = load_config(rl.preset, rl.settings)
            assert config.model.path == start.policy.resolve()
    assert rows["base_math"].policy == Path("/models/q")
    assert rows["base_tools"].policy == Path("/models/l")


def test_a_setting_reaches_its_rows_and_the_closest_one_wins(tmp_path: Path) -> None:
    given = ("grpo_math:optim.lr=1e-5", "grpo:optim.lr=2e-5", "math:optim.lr=3e-5", "optim.lr=4e-5")
    rows = table_rows(tmp_path, *given, "sft_best_rl_math:model.path=/chosen", "math:model.path=/m")
    rates = {
        name: load_config(row.preset, row.settings).optim.lr
        for name, row in rows.items()
        if row.preset.is_file()
    }
    assert rates["grpo_math"] == 1e-5
    assert rates["grpo_tools"] == 2e-5
    assert rates["sasr_math"] == 3e-5
    assert rates["sasr_tools"] == 4e-5
    rl = rows["sft_best_rl_math"]
    assert load_config(rl.preset, rl.settings).model.path == Path("/chosen")


def test_rows_without_demonstrations_take_none(tmp_path: Path) -> None:
    rows = table_rows(tmp_path, "math:data.demonstrations=/all.jsonl", "luffy:data.demonstrations=/own.jsonl")
    for key in table.TITLES:
        if key != table.BASE:
            row = rows[f"{key}_math"]
            preset = load_config(row.preset).data.demonstrations
            taken = load_config(row.preset, row.settings).data.demonstrations
            assert (taken is None) == (preset is None), key
    luffy = load_config(rows["luffy_math"].preset, rows["luffy_math"].settings).data.demonstrations
    assert luffy is not None
    assert luffy[0].path == (Path("/own.jsonl"),)


def test_the_quick_start_gives_every_row_what_it_can_use(tmp_path: Path) -> None:
    """The settings of each row belong to a run whose data can be read. A tool-call row is graded as in the paper."""
    rows = table_rows(tmp_path, QUICK)
    # Both domains start from the same model here. Its answers to the two suites are two evaluations.
    assert set(rows) == {f"{key}_{domain}" for key in table.TITLES for domain in ("math", "tools")}
    assert (
        len({row.evaluation for row in rows.values()}) == len({row.run for row in rows.values()}) == len(rows)
    )
    for name, row in rows.items():
        if row.key == table.BASE:
            continue
        run, preset = load_config(row.preset, row.settings), load_config(row.preset)
        assert (run.batch.prompts == 0) == (preset.batch.prompts == 0), name
        assert (run.batch.demonstrations == 0) == (preset.batch.demonstrations == 0), name
        assert (run.data.demonstrations is None) == (preset.data.demonstrations is None), name
        if row.domain == "tools":
            assert run.reward == preset.reward
        if name == "luffy_tools":
            shape = read_shape(run.model.path)
            assert run.data.max_prompt_tokens + run.data.max_response_tokens <= shape.max_positions
            assert load_data(run, shape).left_out == (), name


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "grp:optim.lr=1",
            "'grp:optim.lr=1' names no row of the table: there are math, tools, base, sft_light",
        ),
        ("optim.lr", "'optim.lr' is not a setting: expected NAME=VALUE or WHO:NAME=VALUE"),
        ("optim.lrr=1", "optim.lrr"),
        ("--row=ppo", "--row ppo: there are math, tools"),
        ("suite:only=[x]", "only: there is no benchmark x"),
    ],
)
def test_what_will_not_do_is_refused(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([argument]) == 2
    assert message in capsys.readouterr().err


def test_each_model_is_asked_the_benchmarks_of_its_kind(tmp_path: Path) -> None:
    rows = table_rows(tmp_path, "--row=chord_phi")
    math = ["aime24 avg@32", "aime25 avg@32", "amc avg@8", "math500 avg@4", "mmlu_pro avg@1"]
    assert table.columns_of(rows["chord_phi_math"].suite) == math
    tools = ["bfcl_non_live avg@1", "bfcl_live avg@1", "bfcl avg@1"]
    assert table.columns_of(rows["chord_phi_tools"].suite) == tools
    assert set(table.PAPER_COLUMNS) <= {*math, *tools}
    quick = table_rows(tmp_path, QUICK)
    assert table.columns_of(quick["grpo_math"].suite) == ["heldout avg@4"]
    assert table.columns_of(quick["grpo_tools"].suite) == ["calls avg@2"]


def test_what_is_done_and_what_is_not(tmp_path: Path) -> None:
    row = table_rows(tmp_path, QUICK, "steps=4")["grpo_math"]
    assert table.training_state(row) == table.evaluation_state(row) == "missing"
    train(row, steps=3, policy=False)
    assert table.training_state(row) == "step 3 of 4"
    train(row)
    evaluate(row, missing=1)
    assert table.training_state(row) == "done"
    assert table.evaluation_state(row) == "1 answers missing"
    evaluate(row, heldout=0.5)
    assert table.evaluation_state(row) == "done"
    longer = table_rows(tmp_path, QUICK, "steps=8")["grpo_math"]
    assert table.training_state(longer) == "step 4 of 8", "a trial is not the row"
    other = table_rows(tmp_path, QUICK, "suite:samples=2")["grpo_math"]
    assert table.evaluation_state(other) == "of another suite"
    moved = table_rows(tmp_path, QUICK, "suite:server.requests=2")["grpo_math"]
    assert table.evaluation_state(moved) == "done", "how many requests a server gets changes no answer"
    other = table_rows(tmp_path, QUICK, "suite:server.dtype=bf16")["grpo_math"]
    assert table.evaluation_state(other) == "of another suite"
    written = (row.evaluation / results.RESULTS).stat().st_mtime
    os.utime(row.evaluation / SUITE, (written + 1, written + 1))
    assert table.evaluation_state(row) == "not finished", "the results are those before it was begun again"
    evaluate(row, heldout=0.5)
    written = (row.evaluation / results.RESULTS).stat().st_mtime
    os.utime(row.policy / "model.safetensors", (written + 1, written + 1))
    assert table.evaluation_state(row) == "of an older policy"


def test_the_table_has_ours_beside_the_papers(tmp_path: Path) -> None:
    rows = table_rows(tmp_path)
    math, tools = rows["chord_phi_math"], rows["chord_phi_tools"]
    train(math)
    evaluate(math, amc=0.6124, aime24=0.18)
    train(tools)
    evaluate(tools, bfcl=0.7854)
    train(rows["grpo_math"])
    evaluate(rows["grpo_math"], missing=1, amc=0.5)
    lines = {
        line.split("|")[1].strip(): line.split("|")[2:-1]
        for line in table.table_of(list(rows.values())).splitlines()
        if "|" in line
    }
    assert [*lines][2:] == list(table.TITLES.values())
    head = [cell.strip() for cell in lines["row"]]
    found = {
        name: dict(zip(head, map(str.strip, cells), strict=True))
        for name, cells in lines.items()
        if name in table.TITLES.values()
    }
    assert found["CHORD-phi"]["math: amc avg@8"] == "61.2 (62.5)"
    assert found["CHORD-phi"]["math: aime25 avg@32"] == "- (17.2)"
    assert found["CHORD-phi"]["math: math500 avg@4"] == "-"
    assert found["CHORD-phi"]["tools: bfcl avg@1"] == "78.5 (78.5)"
    assert found["GRPO"]["math: amc avg@8"] == "- (52.1)", "an evaluation with missing answers is no result"
    assert found["SFT-light"]["math: amc avg@8"] == "- (-)"


def test_the_papers_numbers_agree_with_what_its_text_says() -> None:
    """arXiv 2508.11408, 4.2: CHORD-mu is above SFT-best + RL by 2.4 on AMC, 1.0 on AIME24 and 1.6 on AIME25."""
    ahead = [
        round(float(mu) - float(rl), 1)
        for mu, rl in zip(table.PAPER["chord_mu"], table.PAPER["sft_best_rl"], strict=True)
    ]
    assert ahead[:3] == [2.4, 1.0, 1.6]
    assert all(len(numbers) == len(table.PAPER_COLUMNS) for numbers in table.PAPER.values())


def test_jobs_for_what_is_missing(tmp_path: Path) -> None:
    rows = table_rows(tmp_path, QUICK, "--row=math")
    train(rows["sft_best_math"])
    train(rows["grpo_math"])
    evaluate(rows["grpo_math"])
    jobs = {job.name.rpartition("-")[0]: job for job in table.jobs_of(list(rows.values()), "paper")}
    assert "train-sft_best_math_qwen7b" not in jobs
    assert "evaluate-grpo_math_qwen7b" not in jobs
    assert "train-base_math_qwen7b" not in jobs

    def after(name: str) -> str | None:
        job = jobs[f"{name}_math_qwen7b"].after
        return None if job is None else job.name.rpartition("-")[0]

    assert after("train-sft_light_rl") == "train-sft_light_math_qwen7b"
    assert after("evaluate-sft_light_rl") == "train-sft_light_rl_math_qwen7b"
    assert after("train-sft_best_rl") is None
    assert after("evaluate-sft_best") is None
    assert after("evaluate-base") is None
    nowhere = table_rows(tmp_path, QUICK, "model.path=/nowhere", "--row=base")["base_math"]
    assert list(table.jobs_of([nowhere], "paper")) == []
    alone = [rows["sft_light_rl_math"]]
    with pytest.raises(
        table.TableError, match="starts from sft_light_math_qwen7b, which is neither done nor requested"
    ):
        list(table.jobs_of(alone, "paper"))


def test_jobs_are_submitted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {
        "sbatch": f'echo "$CHORD_RUN $@" >> {tmp_path}/said; echo "$(wc -l < {tmp_path}/said);cluster"',
        "squeue": f"cat {tmp_path}/queue",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    queue = tmp_path / "queue"
    queue.write_text("")
    rows = [row for name, row in table_rows(tmp_path, QUICK, "--row=math").items() if "sft_light" in name]
    assert table.submit(rows, "paper") == []
    said = [line.split() for line in (tmp_path / "said").read_text().splitlines()]
    assert [words[0] for words in said[::2]] == [str(row.preset) for row in rows]
    names = [
        next(word for word in words if word.startswith("--job-name=")).partition("=")[2] for words in said
    ]
    afters = [[word for word in words if word.startswith("--dependency")] for words in said]
    assert afters == [[], ["--dependency=afterok:1"], ["--dependency=afterok:1"], ["--dependency=afterok:3"]]
    assert f"output={rows[0].run.resolve()}" in said[0]
    queue.write_text(f"17 {names[0]}\n18 {names[1]}\n")
    assert table.submit(rows, "paper") == []
    again = [line.split() for line in (tmp_path / "said").read_text().splitlines()][len(said) :]
    assert len(again) == 2
    assert "--dependency=afterok:17" in again[0]


def test_a_row_that_fails_stops_only_those_that_start_from_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = table_rows(tmp_path, QUICK, "sft_light:model.path=/nowhere")
    chosen = [rows["sft_light_math"], rows["sft_light_rl_math"], rows["grpo_math"]]
    train(chosen[2])
    evaluate(chosen[2])
    assert table.run(chosen, "paper") == [
        "sft_light_math_qwen7b: megatron-chord train ended with 2",
        "sft_light_rl_math_qwen7b: it starts from sft_light_math_qwen7b, which is not done",
    ]
    assert "/nowhere" in capfd.readouterr().err
    states = table.states_of(chosen)
    assert states[3].split() == ["grpo_math_qwen7b", "done", "done"]
    assert json.loads((chosen[2].evaluation / results.RESULTS).read_text())["seed"] == 0
