"""If prompts open <think> themselves, graders and rules of form read the assistant's whole turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.records import Message, Prompt, Rollout, RolloutRequest
from megatron_chord.rewards.graders import Graders
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward
from megatron_chord.sampling.context import reward_of
from megatron_chord.sampling.rounds import Grading
from tests.support import stock

QUESTION: Message = {"role": "user", "content": "What does an open <think> tag do? 2 + 2?"}
CALL = '<tool_call>[{"name": "add", "arguments": {"a": 2}}]</tool_call>'
TRUTH = '[{"name": "add", "arguments": {"a": 2}}]'
# Like R1-Distill's template: its markers are not control tokens, and an answer without one follows a tool's result.
REASONER = (
    "{% for m in messages %}{{ '<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


def made(folder: Path, jinja: str) -> ChatTemplate:
    stock.save_tokenizer(folder, "deepseek")
    (folder / "given.jinja").write_text(jinja)
    return load_template(folder, chat_template=folder / "given.jinja")


def rollout(template: ChatTemplate, text: str) -> Rollout:
    ids = template.tokenizer(f"{text}<｜end▁of▁sentence｜>", add_special_tokens=False).input_ids
    return Rollout(token_ids=tuple(ids), logprobs=(0.0,) * len(ids), finish_reason="stop", weight_version=0)


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return made(tmp_path_factory.mktemp("reasoner"), REASONER)


def test_tool_calls_and_rules_of_form_are_earned(reasoner: ChatTemplate) -> None:
    prompt = Prompt(id="1", messages=(QUESTION,), truth=TRUTH, token_ids=reasoner.prompt_ids([QUESTION]))
    answers = [f"I add.\n</think>\n{CALL}", CALL, f"<think>I add.\n</think>\n{CALL}"]
    rollouts = tuple(rollout(reasoner, text) for text in answers)
    asks = [RolloutRequest(prompt=prompt, seed=0)]
    with Graders(ToolCallsReward(think="required", workers=1, timeout_s=30)) as graders:
        grading = Grading(asks, template=reasoner, graders=graders, max_error_rate=0)
        (graded,) = grading.finish([0], [rollouts])
    assert graded.texts == tuple(f"<think>\n{text}" for text in answers)
    # The second answer never closes its block, and the third opens another.
    assert graded.rewards == (1.0, 0.0, 0.0)

    reward = MathReward(workers=1, timeout_s=30, format="chord")
    with Graders(reward) as graders:
        prompt = Prompt(id="1", messages=(QUESTION,), truth="4", token_ids=prompt.token_ids)
        rollouts = tuple(rollout(reasoner, text) for text in ("Twos.\n</think>\n5", "5"))
        asks = [RolloutRequest(prompt=prompt, seed=0)]
        (graded,) = Grading(asks, template=reasoner, graders=graders, max_error_rate=0).finish(
            [0],
            [rollouts],
            shaping=lambda grade, text, rollout, length: reward_of(
                grade, text, length=length, truncated=False, reward=reward, limit=99
            ),
        )
    assert graded.rewards == (0.0, -0.1)


def test_without_an_open_think_tag_the_turn_is_the_response(reasoner: ChatTemplate, tmp_path: Path) -> None:
    answer = rollout(reasoner, "4").token_ids
    asked = reasoner.tokenizer(QUESTION["content"], add_special_tokens=False).input_ids
    assert reasoner.turn(asked, answer) == "4"
    closed = made(tmp_path, REASONER.replace("<think>\n", "<think>\n\n</think>\n\n"))
    assert closed.turn(closed.prompt_ids([QUESTION]), answer) == "4"
