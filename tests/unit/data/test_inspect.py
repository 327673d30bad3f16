from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.inspect import Inspection, Inspector, Lengths
from megatron_chord.data.observed import Observed
from megatron_chord.data.problems import overlap, problem_of, repeated
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.screen import show
from megatron_chord.data.templates import ChatTemplate
from tests.support.files import write_rows

LONG = "A farmer has seven red hens and nine white hens, sells two of them and buys three more: how many hens now?"


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory, chatml: ChatTemplate) -> Inspection:
    folder = tmp_path_factory.mktemp("data")
    prompts = folder / "prompts"
    prompts.mkdir()
    write_rows(
        prompts / "a.jsonl", {"problem": "1+1?", "answer": "2"}, {"problem": " 1 + 1? ", "answer": "3"}
    )
    write_rows(
        prompts / "b.jsonl", {"problem": "x" * 300, "answer": "1"}, {"problem": LONG, "answer": "C) 17"}
    )
    demonstrations = write_rows(
        folder / "d.jsonl",
        {"problem": "1+1?", "solution": "2"},
        {"problem": "5+5?", "solution": "It is 10."},
        {"problem": "5+5?", "solution": "It is 10."},
        {"problem": "5+5?", "solution": "Ten."},
    )
    evaluation = write_rows(
        folder / "e.jsonl",
        {"problem": "5+5?", "answer": "10"},
        {"problem": f"{LONG} Think step by step.", "answer": "17"},
        {"problem": "7+7?", "answer": "14"},
    )
    inspector = Inspector(150, 150, 2)
    _, first = load_prompts(
        prompts, chatml, max_prompt_tokens=150, overlong="drop", observe=inspector.observe["prompts"]
    )
    _, second = load_demonstrations(
        demonstrations,
        chatml,
        max_prompt_tokens=150,
        max_response_tokens=150,
        overlong="drop",
        observe=inspector.observe["demonstrations"],
    )
    _, third = load_prompts(
        evaluation, chatml, max_prompt_tokens=150, overlong="drop", observe=inspector.observe["evaluation"]
    )
    return inspector.inspection(chatml, map(str, (first, second, third)), lambda source: ("math", "####"))


def test_rows_are_counted_by_file(inspection: Inspection) -> None:
    prompts, demonstrations, evaluation = inspection.sets
    assert prompts.files == (("a.jsonl", 2, 0), ("b.jsonl", 2, 1))
    assert (prompts.num_rows, prompts.num_kept) == (4, 3)
    assert (demonstrations.num_kept, evaluation.num_kept) == (4, 3)


def test_lengths_are_those_of_the_tokens(inspection: Inspection, chatml: ChatTemplate) -> None:
    prompts, demonstrations, _ = inspection.sets
    (of_prompts,) = prompts.lengths
    assert of_prompts.values[0] == len(chatml.prompt_ids([{"role": "user", "content": "1+1?"}]))
    assert of_prompts.num_over == 1
    not_trained, trained = demonstrations.lengths
    ids, mask = chatml.demonstration(
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    )
    assert (
        (not_trained.values[0], trained.values[0]) == (len(ids) - sum(mask), sum(mask)) == (len(ids) - 2, 2)
    )


def test_bins_and_quantiles_by_hand() -> None:
    lengths = Lengths("x", (3, 3, 4, 7, 12), 7, "setting")
    assert lengths.bins(5) == [(3, 4, 3), (5, 6, 0), (7, 8, 1), (9, 10, 0), (11, 12, 1)]
    assert [lengths.quantile(share) for share in (0.2, 0.5, 0.6, 0.8, 0.95, 1.0)] == [3, 4, 4, 7, 12, 12]
    assert lengths.num_over == 1
    assert Lengths("x", (5,), 7, "setting").bins(12) == [(5, 5, 1)]


def test_repeated_and_contradicting_rows_are_found(inspection: Inspection) -> None:
    prompts, demonstrations, evaluation = inspection.sets
    assert prompts.repeated == (("a.jsonl:1", "a.jsonl:2"),)
    assert prompts.contradicting == (("a.jsonl:1", "2", "a.jsonl:2", "3"),)
    assert demonstrations.repeated == (("d.jsonl:2", "d.jsonl:3", "d.jsonl:4"),)
    assert demonstrations.identical == (("d.jsonl:2", "d.jsonl:3"),)
    assert evaluation.repeated == evaluation.contradicting == ()


def test_problems_of_evaluation_are_found_in_the_training_sets(inspection: Inspection) -> None:
    found = {(one.one, one.other): one for one in inspection.overlaps}
    assert [pair.other for pair in found["prompts", "demonstrations"].pairs] == ["d.jsonl:1"]
    (near,) = found["prompts", "evaluation"].pairs
    assert (near.place, near.other) == ("b.jsonl:2", "e.jsonl:2")
    assert near.shared == 1.0  # the shorter text is a part of the other
    (equal,) = found["demonstrations", "evaluation"].pairs
    assert (equal.place, equal.other, equal.shared) == ("d.jsonl:2", "e.jsonl:1", 1.0)
    assert found["prompts", "evaluation"].is_contamination


def test_truths_are_shown_as_the_grader_reads_them(inspection: Inspection) -> None:
    number, option = inspection.sets[0].truths
    assert (number.kind, number.count) == ("number", 2)
    assert (option.kind, option.count) == ("option", 1)
    assert option.examples == (("b.jsonl:2", "C) 17", "C 17"),)


def test_examples_are_the_first_and_the_longest(inspection: Inspection) -> None:
    chosen = [(example.title, example.seen.place) for example in inspection.sets[1].examples]
    assert chosen == [("first", "d.jsonl:1"), ("longest", "d.jsonl:2")]


def test_without_colours_the_screen_marks_with_brackets(inspection: Inspection) -> None:
    screen = io.StringIO()
    show(inspection, Console(file=screen, soft_wrap=True, width=100))
    text = screen.getvalue()
    assert "\x1b" not in text
    assert "[~<|im_start|>user\n~]1+1?[~<|im_end|>\n<|im_start|>assistant\n~]{+2+}{~<|im_end|>~}" in text
    assert "1 of 3 problems of evaluation are also in demonstrations" in text
    assert "a.jsonl:1 says '2', a.jsonl:2 says '3'" in text


def test_with_colours_trained_text_has_its_own(
    inspection: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = io.StringIO()
    show(inspection, Console(file=screen, force_terminal=True, color_system="standard", width=100))
    assert "\x1b[30;42m2\x1b[0m\x1b[30;43m<|im_end|>" in screen.getvalue()
    assert "{+" not in screen.getvalue()


def test_control_characters_of_the_data_do_not_reach_the_terminal(
    chatml: ChatTemplate, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "p.jsonl", {"problem": "a \x1b[2J b", "answer": "\x1b[31m"})
    inspector = Inspector(100, 100, 1)
    load_prompts(path, chatml, max_prompt_tokens=100, overlong="drop", observe=inspector.observe["prompts"])
    screen = io.StringIO()
    show(inspector.inspection(chatml, [], lambda source: ("exact", "####")), Console(file=screen, width=100))
    assert "\x1b" not in screen.getvalue()
    assert "a \\x1b[2J b" in screen.getvalue()


def asked(text: str, place: int) -> Observed:
    message = {"role": "user", "content": text}
    return Observed(file="f", number=place, messages=(message,), token_ids=(1,), is_overlong=False)


def test_signs_are_part_of_a_problem() -> None:
    problems = [problem_of(asked(text, i)) for i, text in enumerate(["2+3?", "2-3?", "２ + 3？", "2+3?"])]
    assert repeated(problems) == [["f:0", "f:2", "f:3"]]
    assert overlap(problems[:1], problems[1:2]) == []


def test_an_instruction_that_all_rows_have_makes_no_two_problems_the_same() -> None:
    instruction = (
        "Let us think about it step by step and then write the final answer behind four hashes at the end."
    )
    problems = [problem_of(asked(f"What is {i} plus {2 * i}? {instruction}", i)) for i in range(40)]
    assert overlap(problems[:20], problems[20:]) == []


def test_a_changed_word_leaves_a_problem_nearly_the_same() -> None:
    one, other = (problem_of(asked(text, i)) for i, text in enumerate([LONG, LONG.replace("now", "then")]))
    (pair,) = overlap([one], [other])
    assert pair.shared == (len(one.ngrams) - 2) / len(
        one.ngrams
    )  # the last word but one is in the last two n-grams
