"""Tool use as data: writes the functions of a row into its system message, and its true calls as JSON text.

RL prompts, demonstrations and evaluation get their messages here, so all three see the same tools. The system message
asks for replies in the form that `rewards.tool_calls` reads, with a list of tools and two tags, as Tool-N1 does (arXiv
2505.00024). If the messages of a row have calls and results in fields of their own, the chat template writes them, and
also gets the tools.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_chord.data.functions import calls_of
from megatron_chord.data.messages import question_messages, uses_tools
from megatron_chord.data.rows import (
    TOOL_FIELDS,
    TRUTH_FIELDS,
    LoadReport,
    Row,
    RowError,
    json_field,
    only_one_of,
    strict_json,
    truth_field,
)
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.records import Message, Tool
from megatron_chord.rewards.tool_calls import read_truth

_INSTRUCTION = """\
# Tools

These are the functions that you can call, one to a line:
<tools>
{tools}
</tools>

Every reply of yours has two parts, in this order:
1. <think> and </think>, once each, and between them your reasoning: which functions the request needs, and what \
their arguments are.
2. <tool_call> and </tool_call>, and between them all calls as one JSON list, each call an object with the \
function's name and its arguments: <tool_call>[{{"name": "...", "arguments": {{"...": ...}}}}, ...]</tool_call>. \
Give each argument the type that its function asks for. If no function helps, the list is empty: \
<tool_call>[]</tool_call>"""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    """Functions for the chat template to show."""
    tools_shown: Literal["", "system_message", "template"] = ""
    """Where functions and calls are written (chat template or system message); empty if there are none."""


def conversation(row: Row, template: ChatTemplate) -> Conversation:
    """The row's question with the system prompt and with its tools, if it has any.

    Tools are shown at the end of the system message, or by the chat template if the messages have calls and results of
    their own. ``template.tools_as`` may choose one way for all rows.

    Raises:
        RowError: the template shows no functions; or only it could write the row's calls, but must not be used.
    """
    messages = template.conversation(question_messages(row))
    has_calls, has_tools = uses_tools(messages), _has_tools(row)
    if has_calls and template.tools_as == "system_message":
        raise RowError(
            "its messages hold calls of functions or their results, which only the chat template can write: set "
            "data.tools_as: template"
        )
    if has_calls or (has_tools and template.tools_as == "template"):
        tools = tuple({"type": "function", "function": tool} for tool in _tools(row)) if has_tools else ()
        if tools and "tools" not in template.renderer.variables():
            raise RowError(
                f"the chat template ({template.source}) shows no functions; it does not read `tools`"
            )
        return Conversation(messages=messages, tools=tools, tools_shown="template")
    if not has_tools:
        return Conversation(messages=messages)
    return Conversation(messages=_with_tools(messages, row), tools_shown="system_message")


def _with_tools(messages: tuple[Message, ...], row: Row) -> tuple[Message, ...]:
    text = _INSTRUCTION.format(tools="\n".join(_tool_lines(row)))
    if messages[0]["role"] != "system":
        return ({"role": "system", "content": text}, *messages)
    system = messages[0]["content"].rstrip()
    return ({"role": "system", "content": f"{system}\n\n{text}"}, *messages[1:])


def require_one_way(reports: Iterable[LoadReport]) -> None:
    """Raise ValueError if the chat template shows the functions of some rows, and the system message those of
    others."""
    by_way = {way: report.data for report in reports for way in report.tools_shown}
    if len(by_way) > 1:
        raise ValueError(
            f"data.tools_as: functions would be shown by the chat template in {by_way['template']} and by the system "
            f"message in {by_way['system_message']}, so the policy would see two forms of calls. Choose `template`; or "
            "`system_message`, and demonstrations whose calls are text"
        )


def true_answer(row: Row) -> str:
    """`answer` or `truth` as text. For a row with tools it is one line of JSON (and may be called `ground_truth`).

    The calls are a list, or its JSON text; see `rewards.tool_calls` for their two forms.
    """
    if not _has_tools(row):
        return truth_field(row)
    name = only_one_of(row, TRUTH_FIELDS)
    text = _json_text(calls_of(json_field(row, name)), f"`{name}`", sort_keys=True)
    try:
        calls = read_truth(text)
    except ValueError as error:
        raise RowError(f"`{name}`: {error}") from None
    unknown = sorted({call.name for call in calls} - {tool["name"] for tool in _tools(row)})
    if unknown:
        raise RowError(f"`{name}` calls what is not among the tools: {', '.join(unknown)}")
    return text


def has_truth(row: Row) -> bool:
    """True if the row has a field that ``true_answer`` reads."""
    return any(name in row.fields for name in TRUTH_FIELDS)


def _has_tools(row: Row) -> bool:
    return any(name in row.fields for name in TOOL_FIELDS)


def _tool_lines(row: Row) -> list[str]:
    return [
        _json_text({"type": "function", "function": tool}, f"tool {tool['name']}") for tool in _tools(row)
    ]


def _tools(row: Row) -> list[dict[str, Any]]:
    """The function schemas of `tools` or `functions`, each as it is or as {"type": "function", "function": ...}."""
    field = only_one_of(row, TOOL_FIELDS)
    items = json_field(row, field)
    if not isinstance(items, list) or not items:
        raise RowError(f"`{field}` must be a list of functions; leave the field out where there are none")
    tools = [_tool(item, f"{field}[{index}]") for index, item in enumerate(items)]
    names = [tool["name"] for tool in tools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RowError(f"`{field}` has several functions named {', '.join(twice)}")
    return tools


def _tool(item: Any, name: str) -> dict[str, Any]:
    if isinstance(item, str) and item.lstrip().startswith("{"):  # a list of JSON texts in Parquet
        item = strict_json(item)
    if isinstance(item, dict) and item.keys() == {"type", "function"}:
        item = item["function"]
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"].strip():
        raise RowError(f"{name} must be a function schema, an object with a `name`")
    if not isinstance(item.get("parameters", {}), dict):
        raise RowError(f"{name}.parameters must be an object")
    return item


def _json_text(value: Any, name: str, *, sort_keys: bool = False) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"{name} has an unpaired surrogate") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name} cannot be written as JSON: {error}") from None
    return text
