"""Every file of examples/methods trains on real rollouts, and its rows of metrics have the method's own metrics.

One vLLM server samples for all runs. Each run pushes its own weights to it before its first sampling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config_io import load_config
from megatron_chord.rollout.server import RolloutServer
from tests.support.few_rows import with_few_rows
from tests.support.ranks import ROOT, run_ranks
from tests.support.task import metrics_of

EXAMPLES = ROOT / "examples" / "methods"
STEPS = 3

SFT = {"mu", "sft_loss", "sft_nll", "sft_p", "sft_phi", "token_weight"}
GRPO = {"mu", "policy_loss", "entropy", "clip_fraction", "logprob_gap", "reward_mean", "equal_reward_groups"}
GUIDED = {"policy_loss", "demonstration_p", "demonstration_reward", "demonstration_advantage", "logprob_gap"}
OWN: dict[str, set[str]] = {
    "sft": SFT,
    "dft": SFT,
    "grpo": GRPO,
    "sft_then_rl": SFT | GRPO,
    "alternating": SFT | GRPO,
    "constant_mu": SFT | GRPO,
    "is_sft": SFT | GRPO,
    "chord_mu": SFT | GRPO,
    "chord_phi": SFT | GRPO,
    "chord_both": SFT | GRPO,
    "reward_adaptive": SFT | GRPO,
    "sasr": SFT | {"kl"},
    "amft": SFT | GRPO | {"mu_gradient"},
    "gac": SFT | GRPO | {"advantage_variance", "nll_variance", "disagreement"},
    "dapo": GRPO | {"sampling_rounds", "prompts_sampled"},
    "dr_grpo": GRPO,
    "gspo": GRPO,
    "cispo": GRPO,
    "rloo": GRPO | {"correction_weight", "correction_outside"},
    "luffy": GUIDED | {"demonstration_loss", "demonstration_ratio"},
    "rl_plus": GUIDED | {"demonstration_loss", "demonstration_focus"},
    "srft": GUIDED
    | {"demonstration_sft_loss", "demonstration_rl_loss", "demonstration_weight", "right_fraction"},
    "prefix_rft": {"policy_loss", "prefix_loss", "prefix_nll", "prefix_kept", "logprob_gap"},
    "ghpo": {"policy_loss", "hinted_groups", "hint_stage", "logprob_gap"},
    "hpt": {"sft_loss", "sft_prompts"},
    "relift": {"policy_loss", "failed_prompts", "sft_nll", "extra_loss", "extra_grad_norm", "logprob_gap"},
    "remix": {"policy_loss", "stale_loss", "stale_ratio", "stale_age"},
    "self_distillation": {
        "policy_loss",
        "distillation_loss",
        "taught",
        "taught_rollouts",
        "teacher_log_ratio",
        "teacher_log_ratio_max",
        "logprob_gap",
    },
    "trapo": {"policy_loss", "sft_loss", "token_weight", "guided_answers", "prefix_share", "logprob_gap"},
    "dypo": {"sft_prompts", "skipped_prompts"},
    "dpo_mixed_pairs": {"dpo_loss", "dpo_margin", "dpo_accuracy", "logprob_gap"},
}
"""Metrics that some row of metrics.jsonl must have, by the name of the example file."""

SMALL = {
    "batch.prompts": "4",
    "batch.rollouts": "4",
    "data.evaluation": "null",
    "optim.warmup_steps": "1",
    "rollout.kv_cache_bytes": str(64 << 20),
    "reward.workers": "1",
    "steps": str(STEPS),
}
SHORTER = {
    "sft_then_rl": {"method.mu.switch_step": "1"},
    "alternating": {"method.mu.policy_steps": "1"},
    "amft": {"method.mu.sft_steps": "1"},
    "sasr": {"method.mu.warmup_steps": "1"},
    "chord_mu": {"method.mu.decay_steps": "2"},
    "relift": {"method.size": "2"},
    "trapo": {"method.counts": "[2, 1, 1]", "method.shares": "[0, 0.5, 1]", "method.thresholds": "[0.9, 1]"},
    "remix": {"method.mix_steps": "3", "method.stale_share": "0.6"},
}
"""Settings that bring every stage of a method into three steps."""


def train_all(files: list[Path], url: str, out: Path, changes: dict[str, dict[str, str]]) -> None:
    """Train one run after the other. The caller starts a process for it."""
    from megatron_chord.train.loop import train

    for file in files:
        settings = {**SMALL, **changes.get(file.stem, {}), "output": str(out / file.stem)}
        overrides = [*(f"{name}={value}" for name, value in settings.items()), f"rollout.servers=[{url}]"]
        if load_config(file).batch.demonstrations:
            overrides.append("batch.demonstrations=6")
        train(with_few_rows(load_config(file, overrides)))


def own_metrics(folder: Path) -> tuple[list[dict[str, Any]], set[str]]:
    rows = metrics_of(folder)
    return rows, {name for row in rows for name in row}


def test_there_is_an_expectation_for_every_file() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.yaml")} - {"common", "aligned"}
    assert files == set(OWN)


@pytest.mark.usefixtures("server_key")
def test_every_method_trains(server: RolloutServer, tmp_path: Path) -> None:
    files = [EXAMPLES / f"{name}.yaml" for name in OWN]
    run_ranks(train_all, 1, files, server.url, tmp_path, SHORTER, timeout_s=900)
    for name, expected in OWN.items():
        rows, names = own_metrics(tmp_path / name)
        assert [row["step"] for row in rows] == list(range(STEPS)), name
        assert expected <= names, f"{name} lacks {expected - names}"
        assert max(row["grad_norm"] for row in rows) > 0, name
        assert all(row.get("logprob_gap", 0) < 1e-4 for row in rows), name
        assert (tmp_path / name / "policy" / "config.json").is_file()


@pytest.mark.usefixtures("server_key")
def test_methods_whose_terms_talk_across_ranks_train_on_two(server: RolloutServer, tmp_path: Path) -> None:
    """Two ranks sample the same answers as one rank and get the same numbers up to rounding."""
    names = ["dpo_mixed_pairs", "prefix_rft", "luffy", "self_distillation"]
    changes = {name: {**SHORTER.get(name, {}), "steps": "2"} for name in names}
    for name in names:
        for count, folder in ((1, "one"), (2, "two")):
            run_ranks(train_all, count, [EXAMPLES / f"{name}.yaml"], server.url, tmp_path / folder, changes)
    for name in names:
        one, two = metrics_of(tmp_path / "one" / name), metrics_of(tmp_path / "two" / name)
        assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-4, abs=1e-6), name
        assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-4), name
        assert one[1]["reward_mean"] == two[1]["reward_mean"], name
