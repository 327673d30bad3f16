"""The world of ``examples/evidence``: its questions, its data and the settings of its methods."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config_io import load_config
from tests.support.files import rows_of

WORLD = Path(__file__).resolve().parents[3] / "examples" / "evidence"


@pytest.fixture(scope="module")
def questions() -> Iterator[Any]:
    sys.path.insert(0, str(WORLD))
    try:
        import questions

        yield questions
    finally:
        sys.path.remove(str(WORLD))


def test_questions_and_styles_by_hand(questions: Any) -> None:
    """7+5=12, 2*3=6, 6-8=-2, 8+6=14, each modulo 10."""
    question = questions.Question("7+5*3-8+6=", "4", (2, 6, 8, 4))
    assert questions.direct(question) == "#4"
    assert questions.jumps(question) == ",6,4#4"
    assert questions.steps(question) == "{7+5=2|2*3=6|6-8=8|8+6=4}#4"
    assert questions.steps(question, lambda index: "a" * index) == "{7+5=2|2*3=6a|6-8=8aa|8+6=4aaa}#4"


def test_questions_are_computed_from_the_left_modulo_ten(questions: Any) -> None:
    for seed in range(200):
        question = questions.chain_question(random.Random(seed), 4)
        total = int(question.text[0])
        for index in range(1, 9, 2):
            sign, right = question.text[index], int(question.text[index + 1])
            total += right if sign == "+" else -right if sign == "-" else total * (right - 1)
        assert question.answer == str(total % 10)


def test_the_committed_world_keeps_its_promises() -> None:
    """Prompts, demonstrations and held-out questions are disjoint, and every demonstration ends with its answer."""
    parts = ["problems_train", "problems_heldout", "demonstrations"]
    rows = {name: rows_of(WORLD / f"{name}.jsonl") for name in parts}
    texts = [{row["problem"] for row in rows[name]} for name in parts]
    assert sum(map(len, texts)) == len(set.union(*texts)) == sum(map(len, rows.values()))
    for row in rows["demonstrations"]:
        assert row["solution"].endswith(f"}}#{row['answer']}")
        assert len(row["solution"]) < 63


@pytest.mark.parametrize("path", sorted(WORLD.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_loads_and_differs_from_the_others(path: Path) -> None:
    assert load_config(path).output == Path("runs/evidence") / path.stem
