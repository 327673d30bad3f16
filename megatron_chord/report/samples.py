"""Chooses the answers that a report shows: some prompts at some steps, with a limited number of characters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_chord.train.metrics import SAMPLES

MOST_CHARACTERS = 1_500_000
"""Maximum number of characters, for all runs of a report together."""
_MOST_STEPS = {"evaluation": 12, "step": 12}
_MOST_PROMPTS = {"evaluation": 12, "step": 4}
_MOST_ANSWERS = 8
_LONGEST = 6000
"""Maximum number of characters of one text. Of a longer text the beginning and the end are shown."""
_LARGEST_FILE = 64 * 2**20
"""Maximum number of bytes that are read from a file of samples."""

Answers = list[dict[str, Any]]


def samples(folder: Path, *, most_characters: int) -> list[dict[str, Any]]:
    """The chosen answers of the run in ``folder``: ``kind`` (evaluation or step), ``step``, and ``prompts`` with their
    answers, sorted by reward.

    Every evaluation shows the same prompts. A training step first shows prompts whose answers have log-probs of their
    tokens, then those whose rewards differ most. A file that is still being written is read up to its present end.
    """
    found: list[dict[str, Any]] = []
    left = most_characters
    for kind in ("evaluation", "step"):
        files = _evenly(sorted((folder / SAMPLES).glob(f"{kind}-*.jsonl")), _MOST_STEPS[kind])
        share = left // (2 if kind == "evaluation" else 1)
        wanted: list[str] = []
        for index, file in enumerate(files):
            groups = _groups(file)
            chosen = _chosen(groups, wanted if kind == "evaluation" else [], _MOST_PROMPTS[kind])
            wanted = wanted or chosen
            entry = _entry(
                kind, file, [(name, groups[name]) for name in chosen], share // (len(files) - index)
            )
            size = _size(entry)
            share, left = share - size, left - size
            found.append(entry)
    return found


def _entry(kind: str, file: Path, groups: Sequence[tuple[str, Answers]], most: int) -> dict[str, Any]:
    """One entry with as many prompts as fit, but at least one. Token log-probs are left out if they do not fit."""
    number = int(file.stem.rsplit("-", 1)[1])
    entry: dict[str, Any] = {
        "kind": kind,
        "step": number if kind == "evaluation" else number + 1,
        "prompts": [],
    }
    for name, answers in groups:
        prompt = _prompt(name, answers)
        if _size(prompt) > most:
            for answer in prompt["answers"]:
                answer.pop("tokens", None)
        most -= _size(prompt)
        if most < 0 and entry["prompts"]:
            break
        entry["prompts"].append(prompt)
    return entry


def _prompt(name: str, answers: Answers) -> dict[str, Any]:
    rewards = [row["reward"] for row in answers if row.get("reward") is not None]
    best_first = sorted(answers, key=lambda row: -(row["reward"] if row.get("reward") is not None else -1e9))
    rendered = next((row["rendered_prompt"] for row in answers if row.get("rendered_prompt")), None)
    return {
        "id": name,
        "text": _short(rendered or str(answers[0].get("prompt", ""))),
        "is_rendered": rendered is not None,
        "truth": _short(str(answers[0].get("truth", ""))),
        "reward": round(sum(rewards) / len(rewards), 4) if rewards else None,
        "num_answers": len(answers),
        "answers": [_answer(row) for row in _ends(best_first, _MOST_ANSWERS)],
    }


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "text": _short(str(row.get("response", ""))),
        "reward": row.get("reward"),
        "score": row.get("score"),
        "tokens_n": row.get("num_tokens"),
        "finish": row.get("finish_reason"),
        "logprob": row.get("mean_logprob"),
    }
    if row.get("grader_error"):
        answer["error"] = _short(str(row["grader_error"]))
    if row.get("tokens"):
        answer["tokens"] = [[text, round(float(logprob), 3)] for text, logprob in row["tokens"]]
    return answer


def _chosen(groups: dict[str, Answers], wanted: Sequence[str], most: int) -> list[str]:
    if wanted:
        return [name for name in wanted if name in groups]

    def order(name: str) -> tuple[bool, float]:
        rewards = [row["reward"] for row in groups[name] if row.get("reward") is not None]
        has_tokens = any(row.get("tokens") for row in groups[name])
        return not has_tokens, -(max(rewards) - min(rewards)) if rewards else 0.0

    return sorted(groups, key=order)[:most]


def _groups(file: Path) -> dict[str, Answers]:
    groups: dict[str, Answers] = {}
    for row in _rows(file):
        groups.setdefault(str(row.get("prompt_id", "")), []).append(row)
    return groups


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for line in lines.read(_LARGEST_FILE).splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                return
            if isinstance(row, dict):
                yield row


def _evenly(files: Sequence[Path], most: int) -> list[Path]:
    """The first, the last, and evenly spaced items between them."""
    if len(files) <= most:
        return list(files)
    return [files[round(index * (len(files) - 1) / (most - 1))] for index in range(most)]


def _ends(rows: Answers, most: int) -> Answers:
    return rows if len(rows) <= most else rows[: most - most // 2] + rows[-(most // 2) :]


def _short(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def _size(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False))
