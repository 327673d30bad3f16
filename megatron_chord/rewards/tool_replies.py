"""The calls that a reply makes, in the forms that models are trained to write. Nothing of the text is evaluated.

* Qwen and Hermes: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, one block a call; a block may also
  hold a list of calls.
* Llama 3's JSON: the reply is one such object, with ``parameters`` for ``arguments``, or several with ``;`` between.
* Llama 3's pythonic form: the reply is ``[name(argument="value"), ...]`` or a single call.
* OpenAI: the reply is a list of ``{"type": "function", "function": {"name": ..., "arguments": "JSON text"}}``, or a
  message with such ``tool_calls``.

In each form the arguments may be JSON text. A reply that begins like a call but cannot be read makes no valid call.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Think = Literal["optional", "required", "forbidden"]

MAX_DEPTH = 100
"""Largest depth of brackets. Python's parser fails at a greater depth; deeper text is not a call."""

_CALLS_START, _CALLS_END = "<tool_call>", "</tool_call>"
_THINK_START, _THINK_END = "<think>", "</think>"
_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)  # or a whole string
_SPECIAL_TOKENS = re.compile(r"<\|(?:python_tag|python_start|python_end|eom_id|eot_id|im_end|eot)\|>")
_FENCE = re.compile(r"```(?:json|python|tool_code)?[ \t]*\n(.*)\n```", re.DOTALL)
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_LOOKS_LIKE_CALL = re.compile(r'"(?:arguments|parameters|tool_calls)"\s*:|^\s*\[\s*[A-Za-z_][\w.-]*\s*\(')


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


def read_calls(text: str, *, think: Think = "optional") -> list[Call] | None:
    """The calls of a reply, in their order; [] if it makes none; None if a call or the thinking block is malformed.

    Calls inside the thinking block do not count: only the text after ``</think>`` is read.

    Args:
        think: ``required``: one ``</think>`` before the first call, with at most one ``<think>``, which the prompt may
            have opened. ``optional``: every ``<think>`` must have a ``</think>``. ``forbidden``: neither tag.
    """
    reply = _after_thinking(text, think)
    if reply is None:
        return None
    if _CALLS_START in reply:
        found = [_calls_of_json(block) for block in _blocks(reply)]
        return None if None in found else [call for calls in found if calls is not None for call in calls]
    return _calls_of_bare_reply(reply)


def as_call(item: Any) -> Call | None:
    """The call in a JSON object; None if the object is not a call."""
    if not isinstance(item, dict):
        return None
    if isinstance(item.get("function"), dict):
        item = item["function"]
    arguments = item.get("arguments", item.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = parsed_json(arguments)
        except ValueError:
            return None
    if not isinstance(item.get("name"), str) or not isinstance(arguments, dict):
        return None
    return Call(item["name"], arguments)


def parsed_json(text: str) -> Any:
    """Parse JSON. Raises ValueError if it is invalid or nested too deeply."""
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return json.loads(text)


def _after_thinking(text: str, think: Think) -> str | None:
    starts, ends = text.count(_THINK_START), text.count(_THINK_END)
    if think == "forbidden":
        return None if starts or ends else text
    if think == "required" and (ends != 1 or starts > 1):
        return None
    before, _, rest = text.rpartition(_THINK_END) if ends else ("", "", text)
    if _THINK_START in rest or (think == "required" and _CALLS_START in before):
        return None
    return rest


def _blocks(text: str) -> Iterator[str]:
    """The text between the tags. The last end tag may be missing, because servers stop at it."""
    position = 0
    while (start := text.find(_CALLS_START, position)) >= 0:
        start += len(_CALLS_START)
        end = text.find(_CALLS_END, start)
        yield text[start:] if end < 0 else text[start:end]
        if end < 0:
            return
        position = end + len(_CALLS_END)


def _calls_of_json(text: str) -> list[Call] | None:
    try:
        made = parsed_json(text.strip())
        if isinstance(made, str):
            made = parsed_json(made)
    except ValueError:
        return None
    if isinstance(made, dict) and isinstance(made.get("tool_calls"), list):
        made = made["tool_calls"]
    items = [made] if isinstance(made, dict) else made
    if not isinstance(items, list):
        return None
    calls = [as_call(item) for item in items]
    return None if None in calls else [call for call in calls if call is not None]


def _calls_of_bare_reply(reply: str) -> list[Call] | None:
    bare = _SPECIAL_TOKENS.sub("", reply).strip()
    if fenced := _FENCE.fullmatch(bare):
        bare = fenced[1].strip()
    if bare == "[]":
        return []
    if bare.startswith(("[", "{")):
        calls = _calls_of_json(bare)
        if calls is None and bare.startswith("{"):
            calls = _calls_of_json("[" + re.sub(r"\}\s*;\s*\{", "}, {", bare) + "]")
        if calls is not None:
            return calls
    calls = _Pythonic(bare).calls()
    if calls is not None:
        return calls
    return None if _LOOKS_LIKE_CALL.search(bare) else []


class _Pythonic:
    """Reads ``[name(argument=value, ...), ...]``, whose values are literals. A method returns or raises ValueError."""

    _NAME = re.compile(r"[A-Za-z_][\w.-]*")
    _STRING = re.compile(r"'(?:[^'\\\n]|\\.)*+'|\"(?:[^\"\\\n]|\\.)*+\"", re.DOTALL)
    _NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
    _BLANKS = re.compile(r"\s*")

    def __init__(self, text: str) -> None:
        self._text, self._position, self._depth = text, 0, 0

    def calls(self) -> list[Call] | None:
        try:
            found = self._sequence("]", self._call) if self._takes("[") else [self._call()]
            self._blank()
        except ValueError:
            return None
        return found if self._position == len(self._text) else None

    def _call(self) -> Call:
        name = self._match(self._NAME)
        self._expect("(")
        pairs = self._sequence(")", self._argument)
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("an argument twice")
        return Call(name, dict(pairs))

    def _argument(self) -> tuple[str, Any]:
        name = self._match(self._NAME)
        self._expect("=")
        return name, self._value()

    def _value(self) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("too deep")
        try:
            for opening, closing in (("[", "]"), ("(", ")")):
                if self._takes(opening):
                    return self._sequence(closing, self._value)
            if self._takes("{"):
                return dict(self._sequence("}", self._pair))
            return self._literal()
        finally:
            self._depth -= 1

    def _pair(self) -> tuple[str, Any]:
        key = self._literal()
        if not isinstance(key, str):
            raise ValueError("a key that is no string")
        self._expect(":")
        return key, self._value()

    def _literal(self) -> Any:
        self._blank()
        if string := self._STRING.match(self._text, self._position):
            self._position = string.end()
            try:
                return ast.literal_eval(string[0])  # one string literal, by its pattern
            except (SyntaxError, ValueError):
                raise ValueError("not a string") from None
        if number := self._NUMBER.match(self._text, self._position):
            self._position = number.end()
            return int(number[0]) if number[0].lstrip("+-").isdigit() else float(number[0])
        word = self._match(self._NAME)
        if word not in _CONSTANTS:
            raise ValueError("a name for a value")
        return _CONSTANTS[word]

    def _sequence(self, closing: str, item: Any) -> list[Any]:
        found: list[Any] = []
        while not self._takes(closing):
            found.append(item())
            if not self._takes(","):
                self._expect(closing)
                break
        return found

    def _blank(self) -> None:
        match = self._BLANKS.match(self._text, self._position)
        self._position = match.end() if match else self._position

    def _takes(self, token: str) -> bool:
        self._blank()
        if not self._text.startswith(token, self._position):
            return False
        self._position += len(token)
        return True

    def _expect(self, token: str) -> None:
        if not self._takes(token):
            raise ValueError(f"no {token}")

    def _match(self, pattern: re.Pattern[str]) -> str:
        self._blank()
        match = pattern.match(self._text, self._position)
        if match is None:
            raise ValueError("unexpected text")
        self._position = match.end()
        return match[0]
