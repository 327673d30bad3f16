"""The console output of a run: a line for each step, and a table of the result, both made from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def summary(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """A table of held-out accuracy before, during and after training; None if nothing was evaluated."""
    evaluations = [(row["step"], row["evaluation"]) for row in rows if "evaluation" in row]
    if not evaluations:
        return None
    # A resumed run may have changed from data.evaluation to evaluation.sets: the rows as of the last one count.
    is_plain = [isinstance(found.get("accuracy"), float) for _, found in evaluations]
    evaluations = [item for item, plain in zip(evaluations, is_plain, strict=True) if plain == is_plain[-1]]
    if not is_plain[-1]:
        return _summary_of_sets(evaluations)
    table = Table(title="what the run learned")
    for name in ("weights", "held-out accuracy", "tokens per answer", "cut off"):
        table.add_column(name, justify="right")
    for step, result in evaluations:
        when = "before" if step == 0 else f"after {step} steps"
        cut_off = f"{100 * result['truncated']:.1f} %" if "truncated" in result else ""
        table.add_row(when, f"{100 * result['accuracy']:.1f} %", f"{result['response_length']:.1f}", cut_off)
    gained = 100 * (evaluations[-1][1]["accuracy"] - evaluations[0][1]["accuracy"])
    table.caption = f"{gained:+.1f} points"
    return table


def _summary_of_sets(evaluations: Sequence[tuple[int, Mapping[str, Any]]]) -> Table:
    """The first and the last evaluation of each set (``evaluation.sets``) that was evaluated at least twice."""
    table = Table(title="what the run learned")
    for column in ("set", "metric", "before", "after", "points"):
        table.add_column(column, justify="left" if column in ("set", "metric") else "right")
    for name in dict.fromkeys(name for _, found in evaluations for name in found):
        of_set = [found[name] for _, found in evaluations if name in found]
        if len(of_set) < 2:
            continue
        metrics = [metric for metric in of_set[0] if "@" in metric and metric in of_set[-1]]
        for metric in metrics:
            before, after = 100 * of_set[0][metric], 100 * of_set[-1][metric]
            table.add_row(name, metric, f"{before:.1f} %", f"{after:.1f} %", f"{after - before:+.1f}")
    return table


def step_line(row: Mapping[str, Any], steps: int) -> str:
    """The console line of one training step."""
    parts = [f"step {row['step'] + 1:>{len(str(steps))}}/{steps}"]
    if "mu" in row:
        parts.append(f"mu {row['mu']:.3f}")
    if "reward_mean" in row:
        parts.append(f"reward {row['reward_mean']:.3f}")
    if "policy_loss" in row:
        parts.append(f"policy loss {row['policy_loss']:+.4f}")
    if "sft_loss" in row and "sft_p" in row:
        parts.append(f"SFT loss {row['sft_loss']:.4f} (p {row['sft_p']:.2f})")
    if "entropy" in row:
        parts.append(f"entropy {row['entropy']:.2f}")
    if "response_length" in row:
        parts.append(f"length {row['response_length']:.0f}")
    if row.get("skipped_updates"):
        parts.append(f"{row['skipped_updates']} update(s) skipped: not finite, see nonfinite/")
    if "grad_norm" in row:
        parts.append(f"grad {row['grad_norm']:.2f}")
    parts.append(f"{row['seconds']['total']:.1f} s")
    return "  ".join(parts)
