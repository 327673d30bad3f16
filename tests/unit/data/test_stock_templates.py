"""Ids and masks under the chat templates that models come with, against lists that are written by hand."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.rows import DataError, RowError
from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.records import Message
from tests.support import stock

SYSTEM = {"role": "system", "content": "Think first."}
USER = {"role": "user", "content": "2 + 2?"}
PLAIN = {"role": "assistant", "content": "4"}
THINKING = {"role": "assistant", "content": "<think>\nTwo twos.\n</think>\n\n4"}
AGAIN = {"role": "user", "content": "3 + 3?"}
SIX = {"role": "assistant", "content": "<think>\nTwo threes.\n</think>\n\n6"}
Load = Callable[..., ChatTemplate]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folders = {
        family: stock.save_tokenizer(tmp_path_factory.mktemp(family), family) for family in stock.MARKS
    }

    @functools.cache  # each template has a process of its own
    def loaded(name: str, **arguments: Any) -> ChatTemplate:
        stem = name.partition("/")[2]
        family = next(family for family in stock.MARKS if stem.startswith(family))
        return load_template(folders[family], chat_template=stock.jinja(name), arguments=arguments)

    return loaded


def assert_is(template: ChatTemplate, messages: list[Message], pieces: stock.Pieces, **how: Any) -> None:
    """The demonstration has these pieces, and its trained parts follow prompts that RL would see."""
    expected = [
        (token, trained)
        for text, trained in pieces
        for token in template.tokenizer(text, add_special_tokens=False).input_ids
    ]
    token_ids, trainable = template.demonstration(messages, **how)
    text = template.tokenizer.decode(list(token_ids))
    assert text == "".join(text for text, _ in pieces)
    assert list(zip(token_ids, trainable, strict=True)) == expected


QWEN_2_5 = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
)
ASKED = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
ASKED_AGAIN = "\n<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n"
NOTHING = "<think>\n\n</think>\n\n"
LLAMA_3_1 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {date}\n\n{system}<|eot_id|>"
)
LLAMA_ASKED = (
    "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_ASKED_AGAIN = LLAMA_ASKED.replace("2 + 2", "3 + 3")
THOUGHT = "<think>\nTwo twos.\n</think>\n\n4"
SIX_THOUGHT = "<think>\nTwo threes.\n</think>\n\n6"

CASES: dict[str, tuple[str, Mapping[str, Any], list[Message], list[tuple[str, bool]]]] = {
    "qwen2.5 plain": ("trl/qwen2_5", {}, [USER, PLAIN], [(QWEN_2_5 + ASKED, False), ("4<|im_end|>", True)]),
    "qwen2.5 thinking, two turns, system": (
        "trl/qwen2_5",
        {},
        [SYSTEM, USER, THINKING, AGAIN, SIX],
        [
            ("<|im_start|>system\nThink first.<|im_end|>\n" + ASKED, False),
            (THOUGHT + "<|im_end|>", True),
            (ASKED_AGAIN, False),
            (SIX_THOUGHT + "<|im_end|>", True),
        ],
    ),
    "qwen3 thinking": ("trl/qwen3", {}, [USER, THINKING], [(ASKED, False), (THOUGHT + "<|im_end|>", True)]),
    "qwen3 plain, thinking off": (
        "trl/qwen3",
        {"enable_thinking": False},
        [SYSTEM, USER, PLAIN],
        [
            ("<|im_start|>system\nThink first.<|im_end|>\n" + ASKED + NOTHING, False),
            ("4<|im_end|>", True),
        ],
    ),
    "qwen3 instruct": (
        "trl/qwen3_instruct_2507",
        {},
        [USER, PLAIN, AGAIN, PLAIN],
        [(ASKED, False), ("4<|im_end|>", True), (ASKED_AGAIN, False), ("4<|im_end|>", True)],
    ),
    "qwen3.5 thinking": (
        "trl/qwen3_5_think",
        {},
        [USER, THINKING],
        [(ASKED + "<think>\n", False), ("Two twos.\n</think>\n\n4<|im_end|>", True)],
    ),
    "qwen3.5 plain, thinking off": (
        "trl/qwen3_5_think",
        {"enable_thinking": False},
        [USER, PLAIN],
        [(ASKED + NOTHING, False), ("4<|im_end|>", True)],
    ),
    "qwen3.5 small, thinking on": (
        "trl/qwen3_5_nothink",
        {"enable_thinking": True},
        [USER, THINKING],
        [(ASKED + "<think>\n", False), ("Two twos.\n</think>\n\n4<|im_end|>", True)],
    ),
    "qwen3.5 small, plain": (
        "trl/qwen3_5_nothink",
        {},
        [USER, PLAIN],
        [(ASKED + NOTHING, False), ("4<|im_end|>", True)],
    ),
    "qwen3.6 thinking, earlier turns kept": (
        "trl/qwen3_6",
        {"preserve_thinking": True},
        [USER, THINKING, AGAIN, SIX],
        [
            (ASKED + "<think>\n", False),
            ("Two twos.\n</think>\n\n4<|im_end|>", True),
            (ASKED_AGAIN + "<think>\n", False),
            ("Two threes.\n</think>\n\n6<|im_end|>", True),
        ],
    ),
    "llama3": (
        "trl/llama3",
        {},
        [USER, THINKING, AGAIN, PLAIN],
        [
            ("<|begin_of_text|>" + LLAMA_ASKED, False),
            (THOUGHT + "<|eot_id|>", True),
            (LLAMA_ASKED_AGAIN, False),
            ("4<|eot_id|>", True),
        ],
    ),
    "llama3.1": (
        "trl/llama3_1",
        {},
        [SYSTEM, USER, PLAIN],
        [
            (LLAMA_3_1.format(date="26 Jul 2024", system="Think first.") + LLAMA_ASKED, False),
            ("4<|eot_id|>", True),
        ],
    ),
    "llama3.2, a date of one's own": (
        "trl/llama3_2",
        {"date_string": "1 Jan 2025"},
        [USER, PLAIN, AGAIN, PLAIN],
        [
            (LLAMA_3_1.format(date="1 Jan 2025", system="") + LLAMA_ASKED, False),
            ("4<|eot_id|>", True),
            (LLAMA_ASKED_AGAIN, False),
            ("4<|eot_id|>", True),
        ],
    ),
    "deepseek-r1-distill, a template that keeps thinking": (
        "trl/deepseek_r1_distill_training",
        {},
        [SYSTEM, USER, THINKING],
        [
            ("<｜begin▁of▁sentence｜>Think first.<｜User｜>2 + 2?<｜Assistant｜><think>\n", False),
            ("Two twos.\n</think>\n\n4<｜end▁of▁sentence｜>", True),
        ],
    ),
    "mistral v1": (
        "axolotl/mistral_v1",
        {},
        [SYSTEM, USER, PLAIN, AGAIN, PLAIN],
        [
            ("<s> [INST] Think first.\n\n2 + 2? [/INST]", False),
            (" 4</s>", True),
            (" [INST] 3 + 3? [/INST]", False),
            (" 4</s>", True),
        ],
    ),
    "mistral v3 tekken": (
        "axolotl/mistral_v3_tekken",
        {},
        [USER, THINKING],
        [("<s>[INST]2 + 2?[/INST]", False), (THOUGHT + "</s>", True)],
    ),
    "mistral v7 tekken": (
        "axolotl/mistral_v7_tekken",
        {},
        [SYSTEM, USER, PLAIN],
        [("<s>[SYSTEM_PROMPT]Think first.[/SYSTEM_PROMPT][INST]2 + 2?[/INST]", False), ("4</s>", True)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_masks(case: str, load: Load) -> None:
    name, arguments, messages, pieces = CASES[case]
    assert_is(load(name, **arguments), messages, pieces)


OFF = r"data\.template_arguments: \{enable_thinking: false\}"


@pytest.mark.parametrize(
    ("name", "arguments", "messages", "reason"),
    [
        ("trl/qwen3", {}, [USER, PLAIN], rf"message 1 with an empty <think></think>.*{OFF}.*that think"),
        ("trl/qwen3_5_think", {}, [USER, PLAIN], rf"message 1 with an empty <think></think>.*{OFF}.*that think"),
        ("trl/qwen3_6", {}, [USER, PLAIN], rf"message 1 with an empty <think></think>.*{OFF}.*that think"),
        ("trl/qwen3_8", {}, [USER, PLAIN], rf"message 1 with an empty <think></think>.*{OFF}.*that think"),
        ("trl/qwen3", {"enable_thinking": False}, [USER, THINKING], "closes an empty thinking block, and this answer"),
        ("trl/qwen3", {}, [USER, THINKING, AGAIN, SIX], r"with later messages.*data\.train_on: last_turn"),
        ("trl/deepseek_r1_distill", {}, [USER, PLAIN], r"The prompt opens <think>.*data\.chat_template"),
        ("trl/deepseek_r1_distill", {}, [USER, THINKING], r"The prompt opens <think>.*data\.chat_template"),
        ("axolotl/mistral_v3_tekken", {}, [SYSTEM, USER, PLAIN], "writes the system message into the last user turn"),
        ("axolotl/mistral_v2v3", {}, [SYSTEM, USER, PLAIN], "writes the system message into the last user turn"),
    ],
)  # fmt: skip
def test_what_would_train_something_else_is_refused(
    name: str, arguments: dict[str, Any], messages: list[Message], reason: str, load: Load
) -> None:
    template = load(name, **arguments)
    with pytest.raises(RowError, match=reason):
        template.demonstration(messages)


def test_a_template_that_cuts_thinking_out_of_answers_is_refused(load: Load, tmp_path: Path) -> None:
    """R1-Distill's as it was first published: its prompts did not open <think>, so nothing else shows the loss."""
    jinja = (
        stock.jinja("trl/deepseek_r1_distill")
        .read_text()
        .replace("<｜Assistant｜><think>\\n", "<｜Assistant｜>")
    )
    file = tmp_path / "first.jinja"
    file.write_text(jinja)
    folder = stock.save_tokenizer(tmp_path / "tokenizer", "deepseek")
    template = load_template(folder, chat_template=file)
    assert template.opening == ""
    template.demonstration([USER, PLAIN])
    with pytest.raises(RowError, match=r"leaves the thinking of message 1 out.*data\.chat_template"):
        template.demonstration([USER, THINKING])


def test_the_last_turn_alone_is_trained(load: Load, tmp_path: Path) -> None:
    template = load("trl/qwen3")
    messages = [USER, THINKING, AGAIN, SIX]
    pieces = [(ASKED + "4<|im_end|>" + ASKED_AGAIN, False), (SIX_THOUGHT + "<|im_end|>", True)]
    assert_is(template, messages, pieces, train_on="last_turn")

    file = tmp_path / "demonstrations.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    limits: dict[str, Any] = {"max_prompt_tokens": 999, "max_response_tokens": 999, "overlong": "fail"}
    (demonstration,), _ = load_demonstrations(file, template, train_on="last_turn", **limits)
    context = template.prompt_ids(messages[:-1])
    assert demonstration.token_ids[: len(context)] == context
    assert demonstration.trainable == tuple(
        index >= len(context) for index in range(len(demonstration.token_ids))
    )
    with pytest.raises(DataError, match=r"demonstrations.jsonl:1: .*data\.train_on: last_turn"):
        load_demonstrations(file, template, **limits)
