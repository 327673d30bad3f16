from __future__ import annotations

import json
from pathlib import Path

from megatron_chord.report.samples import samples
from tests.unit.report.runs import answer, make_run


def test_answers_come_by_reward_and_the_prompt_as_rendered(tmp_path: Path) -> None:
    tokens = [["wr", -0.25], ["ong", -1.5]]
    rows = [
        answer("a", "wrong", 0.0, tokens=tokens, rendered_prompt="<|user|>question a"),
        answer("a", "not graded", None),
        answer("a", "right", 1.0),
    ]
    (entry,) = samples(make_run(tmp_path / "run", [], {"step-000004": rows}), most_characters=10_000)
    assert (entry["kind"], entry["step"]) == ("step", 5)
    (prompt,) = entry["prompts"]
    assert (prompt["text"], prompt["is_rendered"], prompt["reward"]) == ("<|user|>question a", True, 0.5)
    assert [one["text"] for one in prompt["answers"]] == ["right", "wrong", "not graded"]
    assert prompt["answers"][1]["tokens"] == tokens
    assert prompt["answers"][2]["error"] == "timed out"


def test_every_evaluation_shows_the_same_prompts(tmp_path: Path) -> None:
    files = {
        f"evaluation-{step:06d}": [
            answer(f"p{index}", f"after {step}", float(index < step)) for index in range(30)
        ]
        for step in (0, 10, 20)
    }
    entries = samples(make_run(tmp_path / "run", [], files), most_characters=100_000)
    assert [(entry["kind"], entry["step"]) for entry in entries] == [
        ("evaluation", 0),
        ("evaluation", 10),
        ("evaluation", 20),
    ]
    names = [[prompt["id"] for prompt in entry["prompts"]] for entry in entries]
    assert names[0] == names[1] == names[2] == [f"p{index}" for index in range(12)]


def test_of_many_steps_the_first_the_last_and_some_between(tmp_path: Path) -> None:
    files = {f"step-{step:06d}": [answer("a", "x", 1.0)] for step in range(100)}
    steps = [
        entry["step"] for entry in samples(make_run(tmp_path / "run", [], files), most_characters=100_000)
    ]
    assert len(steps) == 12
    assert (steps[0], steps[-1]) == (1, 100)


def test_prompts_whose_rewards_differ_come_before_others(tmp_path: Path) -> None:
    rows = [answer(f"p{index}", "x", float(index == 7 and copy)) for index in range(9) for copy in range(2)]
    (entry,) = samples(make_run(tmp_path / "run", [], {"step-000000": rows}), most_characters=10_000)
    assert entry["prompts"][0]["id"] == "p7"
    assert len(entry["prompts"]) == 4


def test_long_answers_stay_within_the_budget(tmp_path: Path) -> None:
    text = "word " * 1500
    tokens = [["word ", -0.1]] * 1500
    files = {
        f"{kind}-{step:06d}": [
            answer(f"p{index}", text, 1.0, tokens=tokens) for index in range(6) for _ in range(8)
        ]
        for kind in ("evaluation", "step")
        for step in range(3)
    }
    entries = samples(make_run(tmp_path / "run", [], files), most_characters=500_000)
    assert len(entries) == 6
    assert all(entry["prompts"] for entry in entries)
    assert len(json.dumps(entries)) < 700_000
    assert "characters left out" in entries[0]["prompts"][0]["answers"][0]["text"]


def test_a_file_that_is_being_written_is_read_so_far(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], {"step-000000": [answer("a", "x", 1.0)]})
    with (run / "samples" / "step-000000.jsonl").open("a") as file:
        file.write('{"prompt_id": "b", "resp')
    (entry,) = samples(run, most_characters=10_000)
    assert [prompt["id"] for prompt in entry["prompts"]] == ["a"]
    assert samples(make_run(tmp_path / "empty", []), most_characters=10_000) == []
