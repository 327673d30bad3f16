"""A row of samples/ has the prompt as the model saw it, and the log-probs of a limited number of single tokens."""

from __future__ import annotations

import json

import pytest

from megatron_chord.data.templates import load_template
from megatron_chord.records import Grade, GradedRollouts, Prompt, Rollout
from megatron_chord.train import sample_rows as module
from tests.support.ranks import ROOT

TEMPLATE = load_template(ROOT / "examples" / "arithmetic" / "policy")


def graded(name: str, answers: list[str]) -> GradedRollouts:
    messages = ({"role": "user", "content": f"What is {len(name)}?"},)
    ids = [tuple(TEMPLATE.tokenizer(text, add_special_tokens=False).input_ids) for text in answers]
    return GradedRollouts(
        prompt=Prompt(id=name, messages=messages, truth="1", token_ids=TEMPLATE.prompt_ids(messages)),
        rollouts=tuple(
            Rollout(token_ids=one, logprobs=(-0.5,) * len(one), finish_reason="stop", weight_version=3)
            for one in ids
        ),
        texts=tuple(answers),
        grades=tuple(Grade(1.0, None) for _ in answers),
        rewards=tuple(1.0 for _ in answers),
    )


def test_the_first_row_of_a_prompt_has_the_prompt_as_rendered() -> None:
    item = graded("a", ["#### 1", "#### 2"])
    first, second = module.sample_rows([item], TEMPLATE)
    assert first["rendered_prompt"] == TEMPLATE.decode_all(item.prompt.token_ids)
    assert first["rendered_prompt"].count(first["prompt"]) == 1
    assert first["rendered_prompt"] != first["prompt"]
    assert "rendered_prompt" not in second
    for row, text in ((first, "#### 1"), (second, "#### 2")):
        assert "".join(piece for piece, _ in row["tokens"]) == text == row["response"]
        assert {logprob for _, logprob in row["tokens"]} == {-0.5}
        assert row["mean_logprob"] == -0.5
    json.dumps([first, second])


def test_tokens_are_written_for_the_first_prompts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [graded(name, ["#### 1", "#### 2"]) for name in ("a", "b", "c")]
    each = sum(len(rollout.token_ids) for rollout in items[0].rollouts)
    monkeypatch.setattr(module, "MOST_TOKENS", 2 * each)
    rows = module.sample_rows(items, TEMPLATE)
    assert [row["prompt_id"] for row in rows if "tokens" in row] == ["a", "a", "b", "b"]
    assert [row["prompt_id"] for row in rows if "rendered_prompt" in row] == ["a", "b", "c"]
