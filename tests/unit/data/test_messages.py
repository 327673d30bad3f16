"""Messages with function calls, their results, and thinking that is separate from the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_chord.data.messages import chat_messages, texts_of, uses_tools
from megatron_chord.data.rows import Row, RowError

ASKED = {"role": "user", "content": "Bern?"}
CALL = {"name": "weather", "arguments": {"city": "Bern", "unit": None}}
FULL = {"id": "c1", "type": "function", "function": CALL}
CALLS = {"role": "assistant", "content": "", "tool_calls": [FULL]}
RESULT = {"role": "tool", "content": "18 C", "tool_call_id": "c1"}
SAID = {"role": "assistant", "content": "18 degrees."}


def read(*messages: Any) -> tuple[dict[str, Any], ...]:
    return chat_messages(Row("file.jsonl:1", 1, {"messages": list(messages)}))


def test_calls_and_results_are_kept() -> None:
    assert read(ASKED, CALLS, RESULT, SAID) == (ASKED, CALLS, RESULT, SAID)
    thinking = {**CALLS, "reasoning_content": "I ask."}
    assert read(ASKED, thinking) == (ASKED, thinking)
    assert uses_tools((ASKED, CALLS))
    assert uses_tools((RESULT,))
    assert not uses_tools((ASKED, SAID))


ARGUMENTS = '{"city": "Bern", "unit": null}'
BARE = f'{{"id": "c1", "name": "weather", "arguments": {ARGUMENTS}}}'


@pytest.mark.parametrize(
    "message",
    [
        {**CALLS, "content": None},
        {"role": "assistant", "tool_calls": [FULL], "refusal": None, "reasoning_content": ""},
        {**CALLS, "tool_calls": [{**FULL, "function": {**CALL, "arguments": ARGUMENTS}}]},
        {**CALLS, "tool_calls": f"[{BARE}]"},
        f'{{"role": "assistant", "content": "", "tool_calls": [{BARE}]}}',
    ],
)
def test_forms_of_a_call_are_one(message: Any) -> None:
    assert read(ASKED, message) == (ASKED, CALLS)


def test_calls_without_arguments_and_results_without_text() -> None:
    call = {"function": {"name": "now", "arguments": ""}}
    _, called, result, _ = read(
        ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": ""}, SAID
    )
    assert called["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]
    assert result == {"role": "tool", "content": ""}


TIME = {"name": "time", "arguments": {}}


@pytest.mark.parametrize(
    ("messages", "content", "calls"),
    [
        ([{"role": "tool_call", "content": json.dumps(CALL)}], "", [CALL]),
        ([{"role": "tool_call", "content": json.dumps([CALL, TIME])}], "", [CALL, TIME]),
        ([{"role": "tool_call", "content": json.dumps(one)} for one in (CALL, TIME)], "", [CALL, TIME]),
        ([SAID, {"role": "tool_call", "content": json.dumps(FULL)}], SAID["content"], [CALL]),
        ([json.dumps({"role": "tool_call", "content": json.dumps(CALL)})], "", [CALL]),
    ],
)
def test_a_role_of_its_own_for_calls_and_results(messages: list[Any], content: str, calls: list[Any]) -> None:
    results = [{"role": "tool_response", "content": str(number)} for number in range(len(calls))]
    called, *answered, said = read(ASKED, *messages, *results, SAID)[1:]
    functions = [{"type": "function", "function": call} for call in calls]
    assert called == {"role": "assistant", "content": content, "tool_calls": functions}
    assert answered == [{"role": "tool", "content": str(number)} for number in range(len(calls))]
    assert said == SAID


@pytest.mark.parametrize("content", ["weather(Bern)", '{"city": "Bern"}', "", None, 7])
def test_a_role_of_its_own_for_calls_holds_calls(content: Any) -> None:
    with pytest.raises(RowError, match=r"messages\[1\]\.(tool_calls|content)"):
        read(ASKED, {"role": "tool_call", "content": content})


def test_calls_may_be_text() -> None:
    called = {"role": "assistant", "content": "<tool_call>...</tool_call>"}
    result = {"role": "tool", "content": "18 C"}
    assert read(ASKED, called, result, result, SAID) == (ASKED, called, result, result, SAID)


def test_several_calls_have_several_results() -> None:
    two = {**CALLS, "tool_calls": [FULL, {**FULL, "id": "c2"}]}
    second = {**RESULT, "tool_call_id": "c2"}
    assert read(ASKED, two, second, RESULT, SAID, ASKED)[2:4] == (second, RESULT)
    with pytest.raises(RowError, match=r"^messages\[3\] is from assistant, expected tool"):
        read(ASKED, two, RESULT, SAID)
    with pytest.raises(
        RowError, match=r"^messages\[2\] is the last message, but 1 of the last calls have no"
    ):
        read(ASKED, two, RESULT)
    with pytest.raises(RowError, match=r"^messages\[3\].tool_call_id is 'c1', open calls are c2"):
        read(ASKED, two, RESULT, RESULT)


TOOL_CALL = {"role": "tool_call", "content": '{"name": "weather", "arguments": {}}'}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([ASKED, RESULT],
         "messages[1] is from tool, expected assistant (system only first, then user and assistant in turn)"),
        ([ASKED, SAID, SAID],
         "messages[2] is from assistant, expected user or tool (system only first, then user and assistant in turn)"),
        ([ASKED, {**CALLS, "tool_calls": {}}], "messages[1].tool_calls must be a list of calls, got an object"),
        ([ASKED, {**CALLS, "tool_calls": [{}]}],
         "messages[1].tool_calls[0] must be a call, an object with a function's `name` and `arguments`"),
        ([ASKED, {**CALLS, "tool_calls": [{"name": "f", "arguments": [1]}]}],
         "messages[1].tool_calls[0].arguments must be an object or its JSON text, got a list"),
        ([ASKED, {**CALLS, "tool_calls": [{"name": "f", "arguments": "f()"}]}],
         "messages[1].tool_calls[0].arguments: broken JSON: Expecting value at column 1"),
        ([ASKED, {**CALLS, "tool_calls": [{**FULL, "id": 3}]}],
         "messages[1].tool_calls[0].id must be a string, got int"),
        ([ASKED, {**SAID, "reasoning_content": ["x"]}], "messages[1].reasoning_content must be a string, got a list"),
        ([ASKED, {**SAID, "tool_call_id": "c1"}],
         "messages[1] has fields that a message of role assistant cannot have: tool_call_id"),
        ([ASKED, CALLS, {"role": "tool", "content": {"t": 18}}], "messages[2].content must be a string, got an object"),
        ([ASKED, CALLS, {"role": "tool"}], "messages[2].content must be a string, got null"),
        ([ASKED, {"role": ["user"], "content": "x"}],
         "messages[1].role must be system, user, assistant or tool, got ['user']"),
        ([ASKED, '{"role": '], "messages[1]: broken JSON: Expecting value at column 10"),
        # The places are those in the row, also where messages are left out or joined.
        ([{"role": "system", "content": ""}, ASKED, {**SAID, "content": 3}],
         "messages[2].content must be a string, got int"),
        ([ASKED, TOOL_CALL, TOOL_CALL, {"role": "tool_response", "content": 1}],
         "messages[3].content must be a string, got int"),
        ([ASKED, SAID, TOOL_CALL, ASKED],
         "messages[3] is from user, expected tool (system only first, then user and assistant in turn)"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_used(messages: list[Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read(*messages)
    assert str(caught.value) == reason


def test_every_text_of_a_call_is_checked() -> None:
    assert set(texts_of(CALLS)) == {
        *("role", "assistant", "content", "", "tool_calls", "id", "c1", "type", "function"),
        *("name", "weather", "arguments", "city", "Bern", "unit"),
    }
