"""Checks the chat messages of a row: the roles, the function calls and their results.

A message has ``role`` and ``content``. An assistant's message may also have ``reasoning_content`` (its thinking,
separate from the answer) and ``tool_calls``. Messages of the role ``tool`` follow it, one for each call. Only fields
with a value are kept, because some templates check whether a field exists. Messages of the roles ``tool_call`` and
``tool_response`` (ms-swift's; ShareGPT's ``function_call`` and ``observation``) become calls and results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_chord.data.functions import calls_of
from megatron_chord.data.rows import (
    QUESTION_FIELDS,
    Row,
    RowError,
    checked_text,
    kind_name,
    only_one_of,
    strict_json,
    text_field,
)
from megatron_chord.records import Message

_FIELDS = {
    "system": (),
    "user": (),
    "assistant": ("reasoning_content", "tool_calls"),
    "tool": ("name", "tool_call_id"),
}
"""Fields that a message of each role may have in addition to ``role`` and ``content``."""
_NOTHING = (None, "", [])


def question_messages(row: Row) -> tuple[Message, ...]:
    """`messages` unchanged, or the problem's text as one user message."""
    name = only_one_of(row, QUESTION_FIELDS)
    if name == "messages":
        return chat_messages(row)
    return ({"role": "user", "content": text_field(row, name)},)


def chat_messages(row: Row) -> tuple[Message, ...]:
    """Check `messages`: an optional system message first, then user and assistant in turn.

    After an assistant's calls come their results, then the assistant again. The arguments of a call may be an object or
    its JSON text; in the result they are an object, which templates expect.

    Raises:
        RowError: a message is wrong. The error says which, and what is wrong.
    """
    value = row.fields["messages"]
    if not isinstance(value, list) or not value:
        raise RowError(f"`messages` must be a list of messages, got {kind_name(value)}")
    named = [(f"messages[{index}]", item) for index, item in enumerate(value)]
    if _is_empty_system(value[0]):
        named = named[1:]
    named = _with_calls([(name, _object(item, name)) for name, item in named])
    messages = tuple(_message(item, name) for name, item in named)
    if not messages:
        raise RowError("`messages` has only an empty system message")
    has_system = messages[0]["role"] == "system"
    _check_turns(messages[has_system:], [name for name, _ in named][has_system:])
    return messages


def uses_tools(messages: Sequence[Message]) -> bool:
    """True if these messages have function calls in fields of their own, or results of functions."""
    return any("tool_calls" in message or message["role"] == "tool" for message in messages)


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a message or in its parts: values, and names of objects' fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name)
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def _check_turns(messages: Sequence[Message], names: Sequence[str]) -> None:
    expected = ("user",)
    open_calls: list[str] = []
    for message, name in zip(messages, names, strict=True):
        role = message["role"]
        if role not in expected:
            raise RowError(
                f"{name} is from {role}, expected {' or '.join(expected)} (system only first, then user and assistant "
                "in turn)"
            )
        if role == "assistant":
            calls = message.get("tool_calls", ())
            open_calls = [str(call.get("id", "")) for call in calls]
            expected = ("tool",) if calls else ("user", "tool")  # calls may also be text
        elif role == "tool" and open_calls:
            _close_call(message, open_calls, name)
            expected = ("tool",) if open_calls else ("assistant",)
        else:
            expected = ("assistant", "tool") if role == "tool" else ("assistant",)
    if open_calls and messages[-1]["role"] == "tool":
        raise RowError(
            f"{names[-1]} is the last message, but {len(open_calls)} of the last calls have no result, a message of "
            "the role tool"
        )


def _close_call(message: Message, open_calls: list[str], name: str) -> None:
    """Remove the call that ``message`` answers from the list: by its id if both have one, else the first call."""
    wanted = message.get("tool_call_id")
    if wanted is not None and any(open_calls) and wanted not in open_calls:
        raise RowError(f"{name}.tool_call_id is {wanted!r}, open calls are {', '.join(open_calls)}")
    open_calls.remove(wanted if wanted in open_calls else open_calls[0])


def _is_empty_system(message: Any) -> bool:
    """Treat a system message without text as absent."""
    return (
        isinstance(message, dict) and message.get("role") == "system" and message.get("content") in ("", None)
    )


def _object(item: Any, name: str) -> Any:
    """Return ``item``, or its parsed value if it is JSON text, because Parquet files may have lists of JSON texts."""
    return _json(item, name) if isinstance(item, str) and item.lstrip().startswith("{") else item


def _with_calls(named: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The items, with the calls of ``tool_call`` messages in the assistant's turn that they belong to.

    A ``tool_call`` holds the JSON of one call or of a list. Those that follow each other, or a text of the assistant,
    are one turn. It has the name of the first of them. Other content is not changed here; the check of the turn's
    calls refuses it.
    """
    messages: list[tuple[str, Any]] = []
    for name, item in named:
        role = item.get("role") if isinstance(item, dict) else None
        if role == "tool_call":
            calls = calls_of(item.get("content"))
            turn = {"role": "assistant", "content": ""}
            last = messages[-1][1] if messages else None
            if isinstance(last, dict) and last.get("role") == "assistant":
                name, turn = messages.pop()
            before = turn.get("tool_calls")
            both = [*before, *calls] if isinstance(before, list) and isinstance(calls, list) else calls
            messages.append((name, {**turn, "tool_calls": both}))
        elif role == "tool_response":
            messages.append((name, {**item, "role": "tool"}))
        else:
            messages.append((name, item))
    return messages


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"{name} must be an object with `role` and `content`, got {kind_name(value)}")
    role = value.get("role")
    if not isinstance(role, str) or role not in _FIELDS:
        raise RowError(f"{name}.role must be system, user, assistant or tool, got {role!r}")
    known = _FIELDS[role]
    filled = {
        field: item
        for field, item in value.items()
        if field not in ("role", "content") and item not in _NOTHING
    }
    extra = sorted(filled.keys() - set(known))
    if extra:
        raise RowError(f"{name} has fields that a message of role {role} cannot have: {', '.join(extra)}")
    message: Message = {"role": role, "content": _content(value, name, has_calls="tool_calls" in filled)}
    for field, item in filled.items():
        if field == "tool_calls":
            message[field] = _tool_calls(item, f"{name}.tool_calls")
        elif isinstance(item, str):
            message[field] = checked_text(item, f"{name}.{field}")
        else:
            raise RowError(f"{name}.{field} must be a string, got {kind_name(item)}")
    return message


def _content(value: Mapping[str, Any], name: str, *, has_calls: bool) -> str:
    """The text. It may be empty if there are calls, or in the result of a tool."""
    content = value.get("content")
    if content in ("", None) and (has_calls or (value["role"] == "tool" and content == "")):
        return ""
    if not isinstance(content, str):
        raise RowError(f"{name}.content must be a string, got {kind_name(content)}")
    return checked_text(content, f"{name}.content")


def _tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = _json(value, name)
    if not isinstance(value, list):
        raise RowError(f"{name} must be a list of calls, got {kind_name(value)}")
    return [_tool_call(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _tool_call(value: Any, name: str) -> dict[str, Any]:
    """The call as ``{"id", "type": "function", "function": {"name", "arguments"}}``; without ``id`` if it has none."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{name} must be a call, an object with a function's `name` and `arguments`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{name}.arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowError(f"{name}.arguments must be an object or its JSON text, got {kind_name(arguments)}")
    identity = value.get("id")
    if identity not in (None, "") and not isinstance(identity, str):
        raise RowError(f"{name}.id must be a string, got {kind_name(identity)}")
    known = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": identity, **known} if identity else known


def _json(text: str, name: str) -> Any:
    try:
        return strict_json(text)
    except RowError as error:
        raise RowError(f"{name}: {error}") from None
