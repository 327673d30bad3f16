"""Each warning is raised for a history that has the fault, and none for the recorded quick start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import yaml

from megatron_chord.config import RunConfig
from megatron_chord.config_io import load_config, plain_settings
from megatron_chord.config_nodes import setting_names
from megatron_chord.judgement import CHECKS, Judge, judge
from tests.support.ranks import ROOT
from tests.unit.report.runs import rows_of_quickstart

QUICKSTART = plain_settings(load_config(ROOT / "examples" / "arithmetic" / "chord_phi.yaml"))
HEALTHY = {
    "mu": 0.5,
    "entropy": 0.5,
    "logprob_gap": 1e-3,
    "num_policy_tokens": 100,
    "num_sft_tokens": 50,
    "reward_mean": 0.4,
    "equal_reward_groups": 0.3,
    "response_length": 100.0,
    "truncated_fraction": 0.05,
    "grader_errors": 0,
    "zero_gradient": 0.0,
    "demonstration_epochs": 1.0,
    "sft_p": 0.9,
    "seconds": {"total": 10.0, "collect": 5.0, "sample": 4.5, "train": 4.5},
}
AHEAD = {"asynchronous": {"max_off_policy_steps": 1}}
ELSEWHERE = {"servers": ["http://node1:8000"]}


def settings(**rollout: Any) -> dict[str, Any]:
    return QUICKSTART | {"rollout": QUICKSTART["rollout"] | rollout}


def history(steps: int, change: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [HEALTHY | {"step": step} | change(step) for step in range(steps)]


def from_step(first: int, **values: Any) -> Callable[[int], dict[str, Any]]:
    return lambda step: values if step >= first else {}


def seconds(**values: float) -> Callable[[int], dict[str, Any]]:
    return lambda step: {"seconds": HEALTHY["seconds"] | values}


CASES: list[tuple[str, str, list[dict[str, Any]], dict[str, Any], int]] = [
    ("truncated", "all answers of the step were cut off at 48 tokens",
     history(8, from_step(3, truncated_fraction=1.0)), settings(), 4),
    ("truncated", "60 % of the answers of the last 5 steps were cut off",
     history(20, from_step(10, truncated_fraction=0.6)), settings(), 15),
    ("equal groups", "for every prompt (mean reward 0)",
     history(8, from_step(2, equal_reward_groups=1.0, reward_mean=0.0)), settings(), 5),
    ("zero gradient", "of 100 % of the step's updates was exactly 0, with 150 trained tokens",
     history(8, from_step(5, zero_gradient=1.0)), settings(), 6),
    ("entropy collapse", "fell from 0.5 to 0.01 nats",
     history(30, from_step(20, entropy=0.01)), settings(), 25),
    ("entropy spike", "rose to 1.5 nats a token; it had been about 0.5",
     history(30, from_step(20, entropy=2.0)), settings(), 22),
    ("failed gradings", "has the reward 0, and 3 gradings failed",
     history(4, from_step(2, reward_mean=0.0, grader_errors=3)), settings(), 3),
    ("length drift", "from 100 to 205 tokens",
     history(60, from_step(40, response_length=250.0)), settings(), 47),
    ("length drift", "from 100 to 46 tokens",
     history(60, from_step(40, response_length=10.0)), settings(), 46),
    ("log-prob gap", "grew from 0.0013 to 0.0039",
     history(60, lambda step: {"logprob_gap": 1e-3 * 1.05**step}), settings(), 33),
    ("temperatures", "mu is 0.5, answers are sampled at temperature 0.7, the SFT loss has temperature 1",
     history(3, lambda step: {}), settings(temperature=0.7), 1),
    ("demonstrations used up", "used 5 times, and their tokens have a mean probability of 0.90",
     history(30, lambda step: {"demonstration_epochs": (step + 1) / 4}), settings(), 20),
    ("idle", "the ranks waited for answers in 70 % of the last 10 steps' time",
     history(12, seconds(collect=7.0, sample=9.0, train=3.0)), settings(**AHEAD), 10),
    ("idle", "the servers had nothing to do in 80 % of",
     history(12, seconds(collect=1.0, sample=2.0, train=9.0)), settings(**AHEAD), 10),
    ("idle", "the ranks waited in 50 % of the last 10 steps' time, and the servers in 45 %",
     history(12, seconds()), settings(**ELSEWHERE), 10),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "rows", "given", "step"), CASES, ids=[case[1] for case in CASES])
def test_a_warning_comes_once_when_it_is_seen(
    name: str, text: str, rows: Sequence[dict[str, Any]], given: dict[str, Any], step: int
) -> None:
    (finding,) = judge(rows, given)
    assert (finding.name, finding.step) == (name, step)
    assert text in finding.saw
    assert all(part in str(finding) for part in (finding.saw, finding.why, *finding.look_at))


def test_every_check_has_a_case() -> None:
    assert {case[0] for case in CASES} == {check.name for check in CHECKS}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_check_names_settings_that_there_are(check: Any) -> None:
    blocks = {name.rpartition(".")[0] for name in setting_names(RunConfig)}
    assert set(check.look_at) <= set(setting_names(RunConfig)) | blocks


def test_the_quick_start_is_not_warned_of() -> None:
    rows = [row for row in rows_of_quickstart() if "evaluation" not in row]
    assert len(rows) == 60
    assert judge(rows, QUICKSTART) == []


FINE: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "nothing changes": (history(100, lambda step: {}), settings()),
    "rows without any number": ([{"step": step} for step in range(100)], settings(**AHEAD)),
    "entropy falls while the reward rises": (
        history(60, lambda step: {"entropy": 0.5 * 0.9**step, "reward_mean": 0.01 * step}), settings()),
    "answers grow while the reward rises": (
        history(80, lambda step: {"response_length": 100 + 10 * step, "reward_mean": 0.01 * step}), settings()),
    "two steps of equal rewards": (
        history(40, lambda step: {"equal_reward_groups": float(step % 3 > 0)}), settings()),
    "equal rewards explain a gradient of 0 without demonstrations": (
        history(2, lambda step: {"equal_reward_groups": 1.0, "zero_gradient": 1.0, "mu": 0.0}), settings()),
    "a gap of rounding grows": (
        history(60, lambda step: {"logprob_gap": 1e-7 * 1.05**step}), settings()),
    "temperature without demonstrations": (
        history(60, lambda step: {"mu": 0.0, "demonstration_epochs": 9.0}), settings(temperature=0.7)),
    "failed gradings beside rewards": (history(60, lambda step: {"grader_errors": 1}), settings()),
    "one machine samples and trains in turn": (history(60, seconds(collect=9.0, train=1.0)), settings()),
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_what_is_fine_is_not_warned_of(name: str) -> None:
    assert judge(*FINE[name]) == []


def test_both_branches_at_one_temperature_are_fine() -> None:
    given = yaml.safe_load("{rollout: {temperature: 0.7}, method: {sft_temperature: 0.7}}")
    assert judge(history(3, lambda step: {}), given) == []


def test_warnings_of_a_long_run_use_its_last_steps() -> None:
    one = Judge(settings=settings())
    found = [finding for row in history(2000, from_step(1900, entropy=2.0)) for finding in one.add(row)]
    assert [finding.step for finding in found] == [1902]
    assert len(one._recent) == 60
