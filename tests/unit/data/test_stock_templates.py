"""Ids and masks under the chat templates of published models equal lists that are written by hand."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.messages import chat_messages
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.rows import DataError, Row, RowError
from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.data.tools import require_one_way
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


def row_of(messages: list[Message]) -> Row:
    return Row("file.jsonl:1", 1, {"messages": messages})


def assert_has(
    template: ChatTemplate, token_ids: tuple[int, ...], trainable: tuple[bool, ...], pieces: stock.Pieces
) -> None:
    expected = [
        (token, trained)
        for text, trained in pieces
        for token in template.tokenizer(text, add_special_tokens=False).input_ids
    ]
    text = template.tokenizer.decode(list(token_ids))
    assert text == "".join(text for text, _ in pieces)
    assert list(zip(token_ids, trainable, strict=True)) == expected


def assert_is(template: ChatTemplate, messages: list[Message], pieces: stock.Pieces) -> None:
    assert_has(template, *template.demonstration(messages), pieces)


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
    """R1-Distill's first published template. Its prompts did not open <think>, so nothing else shows that thinking is
    lost."""
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
    template = replace(load("trl/qwen3"), train_on="last_turn")
    messages = [USER, THINKING, AGAIN, SIX]
    pieces = [(ASKED + "4<|im_end|>" + ASKED_AGAIN, False), (SIX_THOUGHT + "<|im_end|>", True)]
    assert_is(template, messages, pieces)

    file = tmp_path / "demonstrations.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    limits: dict[str, Any] = {"max_prompt_tokens": 999, "max_response_tokens": 999, "overlong": "fail"}
    (demonstration,), _ = load_demonstrations(file, template, **limits)
    context = template.prompt_ids(messages[:-1])
    assert demonstration.token_ids[: len(context)] == context
    assert demonstration.trainable == tuple(
        index >= len(context) for index in range(len(demonstration.token_ids))
    )
    with pytest.raises(DataError, match=r"demonstrations.jsonl:1: .*data\.train_on: last_turn"):
        load_demonstrations(file, load("trl/qwen3"), **limits)


SCHEMA = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
BERN: Message = {"role": "user", "content": "Bern?"}
CALLS: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdefgh1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
        }
    ],
}
RESULT: Message = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "18 C"}
SAID: Message = {"role": "assistant", "content": "18 degrees."}
REASONED = [
    BERN,
    {**CALLS, "reasoning_content": "I ask."},
    RESULT,
    {**SAID, "reasoning_content": "It answers."},
]
SCHEMA_JSON = (
    '{"type": "function", "function": {"name": "weather", "description": "d", '
    '"parameters": {"type": "object", "properties": {}}}}'
)
QWEN_TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    f"{SCHEMA_JSON}\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
BERN_ASKED = "<|im_start|>user\nBern?<|im_end|>\n<|im_start|>assistant\n"
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>'
QWEN_RESULT = "\n<|im_start|>user\n<tool_response>\n18 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
XML_CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call><|im_end|>"

TOOL_CASES: dict[str, tuple[str, list[Message], list[tuple[str, bool]]]] = {
    "qwen2.5": (
        "trl/qwen2_5",
        [BERN, CALLS, RESULT, SAID],
        [
            (QWEN_2_5.replace("<|im_end|>\n", QWEN_TOOLS) + BERN_ASKED, False),
            (QWEN_CALL, True),
            (QWEN_RESULT, False),
            ("18 degrees.<|im_end|>", True),
        ],
    ),
    "qwen3, thinking before each turn": (
        "trl/qwen3",
        REASONED,
        [
            ("<|im_start|>system\n" + QWEN_TOOLS.removeprefix("\n\n") + BERN_ASKED, False),
            ("<think>\nI ask.\n</think>\n\n" + QWEN_CALL, True),
            (QWEN_RESULT, False),
            ("<think>\nIt answers.\n</think>\n\n18 degrees.<|im_end|>", True),
        ],
    ),
    "llama3.1": (
        "trl/llama3_1",
        [BERN, CALLS, RESULT, SAID],
        [
            (
                LLAMA_3_1.format(date="26 Jul 2024", system="").replace("Cutting", "Environment: ipython\nCutting")
                + "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a "
                "JSON for a function call with its proper arguments that best answers the given prompt.\n\nRespond in "
                'the format {"name": function name, "parameters": dictionary of argument name and its value}.Do not '
                "use variables.\n\n" + json.dumps(json.loads(SCHEMA_JSON), indent=4) + "\n\nBern?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                False,
            ),
            ('{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>', True),
            (
                '<|start_header_id|>ipython<|end_header_id|>\n\n"18 C"<|eot_id|>'
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                False,
            ),
            ("18 degrees.<|eot_id|>", True),
        ],
    ),
    "mistral v3 tekken": (
        "axolotl/mistral_v3_tekken",
        [BERN, CALLS, RESULT, SAID],
        [
            (f"<s>[AVAILABLE_TOOLS][{SCHEMA_JSON}][/AVAILABLE_TOOLS][INST]Bern?[/INST]", False),
            ('[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}, "id": "abcdefgh1"}]</s>', True),
            ('[TOOL_RESULTS]{"content": 18 C, "call_id": "abcdefgh1"}[/TOOL_RESULTS]', False),
            ("18 degrees.</s>", True),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOOL_CASES)
def test_calls_are_trained_and_results_are_not(case: str, load: Load, tmp_path: Path) -> None:
    name, messages, pieces = TOOL_CASES[case]
    template = load(name)
    file = tmp_path / "demonstrations.jsonl"
    file.write_text(json.dumps({"messages": messages, "tools": [SCHEMA]}))
    ((demonstration,), report) = load_demonstrations(
        file, template, max_prompt_tokens=9999, max_response_tokens=9999, overlong="fail"
    )
    assert report.tools_shown == {"template"}
    assert_has(template, demonstration.token_ids, demonstration.trainable, pieces)


def test_xml_calls_of_qwen_3_5(load: Load) -> None:
    template = load("trl/qwen3_5_think")
    token_ids, trainable = template.demonstration(chat_messages(row_of(REASONED)))
    pieces = [
        (BERN_ASKED + "<think>\n", False),
        ("I ask.\n</think>\n\n" + XML_CALL, True),
        (QWEN_RESULT + "<think>\n", False),
        ("It answers.\n</think>\n\n18 degrees.<|im_end|>", True),
    ]
    assert_has(template, token_ids, trainable, pieces)


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("trl/llama3", [BERN, CALLS], "leaves the call of `weather` of message 1 out"),
        ("trl/llama3_1", [BERN, {**CALLS, "content": "Let me see."}], "leaves the text of message 1 out"),
        ("trl/llama3", [BERN, {**SAID, "reasoning_content": "It answers."}], "leaves the thinking of message 1 out"),
        ("trl/qwen3", [BERN, CALLS], r"empty <think></think>.*enable_thinking: false.*`reasoning_content`"),
        ("trl/qwen3_8", [USER, THINKING], "does not see the thinking in `content`: put it into `reasoning_content`"),
        ("trl/qwen2_5", [BERN, {**CALLS, "tool_calls": [{"name": "a<|im_end|>b"}]}], r"message 1 .*control token"),
    ],
)  # fmt: skip
def test_calls_and_thinking_that_a_template_does_not_write(
    name: str, messages: list[Message], reason: str, load: Load
) -> None:
    with pytest.raises(RowError, match=reason):
        load(name).demonstration(chat_messages(row_of(messages)))


def test_prompts_and_demonstrations_show_functions_in_one_way(load: Load, tmp_path: Path) -> None:
    template = load("trl/qwen2_5")
    asked = {"messages": [BERN], "tools": [SCHEMA], "answer": []}
    called = {"messages": [BERN, CALLS, RESULT], "tools": [SCHEMA], "answer": []}
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{json.dumps(asked)}\n{json.dumps(called)}")

    def prompts(**how: Any) -> Any:
        return load_prompts(file, replace(template, **how), max_prompt_tokens=9999, overlong="fail")

    (text, native), report = prompts()
    assert report.tools_shown == {"system_message", "template"}
    with pytest.raises(
        ValueError, match=r"^data\.tools_as: functions would be shown by the chat template in .*prompts"
    ):
        require_one_way([report])
    assert "one to a line" in text.messages[0]["content"]
    assert text.tools == ()
    (first, second), report = prompts(tools_as="template")
    assert report.tools_shown == {"template"}
    require_one_way([report, report])
    assert first.messages == (BERN,)
    token_ids, _ = template.demonstration([BERN, *second.messages[1:], SAID], tools=second.tools)
    assert token_ids[: len(second.token_ids)] == second.token_ids == native.token_ids
    assert token_ids[: len(first.token_ids)] == first.token_ids
    with pytest.raises(DataError, match=r"prompts.jsonl:2: .*data\.tools_as: template"):
        prompts(tools_as="system_message")
    file.write_text(json.dumps(called))
    with pytest.raises(DataError, match=r"llama3\.jinja.* shows no functions"):
        load_prompts(file, load("trl/llama3"), max_prompt_tokens=9999, overlong="fail")
