"""What came of a run, as a table on the console, from its metrics.jsonl alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def summary(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy at every evaluation, and the first and last training numbers."""
    table = Table(title="what the run learned")
    table.add_column("")
    evaluations = [row for row in rows if "accuracy" in row]
    steps = [row for row in rows if "loss" in row]
    for row in evaluations:
        when = "before" if row["step"] == 0 else f"after step {row['step']}"
        table.add_column(when, justify="right")
    if evaluations:
        table.add_row("held-out accuracy", *(f"{100 * row['accuracy']:.1f} %" for row in evaluations))
        table.add_row("tokens per answer", *(f"{row['response_length']:.1f}" for row in evaluations))
        gained = 100 * (evaluations[-1]["accuracy"] - evaluations[0]["accuracy"])
        table.caption = f"{gained:+.1f} points in {len(steps)} steps"
    return table


def step_line(row: Mapping[str, Any], steps: int) -> str:
    """One training step for the console: what a person watches."""
    parts = [f"step {row['step'] + 1:>{len(str(steps))}}/{steps}", f"mu {row['mu']:.3f}"]
    if "reward_mean" in row:
        parts.append(f"reward {row['reward_mean']:.3f}")
    if "policy_loss" in row:
        parts.append(f"policy loss {row['policy_loss']:+.4f}")
    if "expert_loss" in row:
        parts.append(f"expert loss {row['expert_loss']:.4f} (p {row['expert_p']:.2f})")
    if "entropy" in row:
        parts.append(f"entropy {row['entropy']:.2f}")
    if "response_length" in row:
        parts.append(f"length {row['response_length']:.0f}")
    parts += [f"grad {row['grad_norm']:.2f}", f"{row['seconds']['total']:.1f} s"]
    return "  ".join(parts)
