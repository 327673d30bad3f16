"""Equal sets of tool calls.

The reward of CHORD's tool-use experiments (Trinity-RFT, customized_toolcall_workflows.py, after Tool-N1, arXiv
2505.00024): right or wrong, nothing in between. A true call has one of two forms:

* ``{"name": ..., "arguments": {...}}``: the call itself. Arguments are equal when their JSON, keys sorted, is.
* ``{function: {argument: [every accepted value]}}``, of the Berkeley Function-Calling Leaderboard, whose values are
  compared as its checker does (ast_checker.py): strings but for case, blanks and some punctuation, numbers by value.
  An accepted ``""`` means that the argument may be left out. Objects within hold lists of accepted values again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 100
"""Of brackets in JSON. Python's parser gives up somewhere beyond; what is nested as deeply is no call."""

_CALLS_START, _CALLS_END = "<tool_call>", "</tool_call>"
_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)  # or a whole string
_UNREAD_BY_BFCL = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True)
class TrueCall:
    name: str
    arguments: dict[str, Any]
    has_choices: bool
    """Each argument is a list of accepted values."""

    def accepts(self, call: dict[str, Any]) -> bool:
        if call["name"] != self.name:
            return False
        if self.has_choices:
            return _fits(call["arguments"], self.arguments)
        return _canonical(call["arguments"]) == _canonical(self.arguments)


def grade(text: str, truth: str, *, marker: str = "") -> float:
    """1.0 when `text` thinks once and then makes exactly the calls of `truth`, in any order; else 0.0.

    One ``<think>`` and one ``</think>`` that is not after the first ``<tool_call>``; the last complete
    ``<tool_call>...</tool_call>`` holds a JSON list of calls, or one call, or either as a JSON string. No call is an
    empty list. `marker` is not used.

    Raises:
        ValueError: the truth cannot be read, which is no fault of the answer.
    """
    expected = read_truth(truth)
    if not _thinks_first(text):
        return 0.0
    calls = _made_calls(text)
    return float(calls is not None and _match(expected, calls))


def read_truth(truth: str) -> list[TrueCall]:
    """The calls of a JSON list; ValueError says what is wrong with it."""
    try:
        items = _parsed(truth)
    except ValueError as error:
        raise ValueError(f"the true calls are not JSON: {error}") from None
    if not isinstance(items, list):
        raise ValueError("the true calls must be a JSON list, [] for none")
    return [_true_call(item, f"true call {number}") for number, item in enumerate(items, start=1)]


def _true_call(item: Any, name: str) -> TrueCall:
    if isinstance(item, dict) and item.keys() == {"name", "arguments"}:
        if not isinstance(item["name"], str) or not isinstance(item["arguments"], dict):
            raise ValueError(f"{name}: `name` must be a string and `arguments` an object")
        return TrueCall(item["name"], item["arguments"], has_choices=False)
    if isinstance(item, dict) and len(item) == 1:
        ((function, arguments),) = item.items()
        if isinstance(arguments, dict):
            _require_choices(arguments, f"{name}: {function}")
            return TrueCall(function, arguments, has_choices=True)
    raise ValueError(
        f'{name} is neither {{"name": ..., "arguments": {{...}}}} nor {{function: {{argument: [accepted values]}}}}'
    )


def _require_choices(arguments: dict[str, Any], name: str) -> None:
    for argument, accepted in arguments.items():
        if not isinstance(accepted, list):
            raise ValueError(f"{name}.{argument} must be a list of accepted values")
        for inner in _objects(accepted):
            _require_choices(inner, f"{name}.{argument}")


def _objects(values: list[Any]) -> list[dict[str, Any]]:
    """Objects in a list and in the lists within."""
    found = [value for value in values if isinstance(value, dict)]
    return found + [inner for value in values if isinstance(value, list) for inner in _objects(value)]


def _thinks_first(text: str) -> bool:
    if not text.count("<think>") == text.count("</think>") == 1:
        return False
    calls = text.find(_CALLS_START)
    return calls == -1 or text.index("</think>") < calls


def _made_calls(text: str) -> list[dict[str, Any]] | None:
    block = _last_block(text)
    if block is None:
        return None
    try:
        made = _parsed(block.strip())
        if isinstance(made, str):
            made = _parsed(made)
    except ValueError:
        return None
    made = [made] if isinstance(made, dict) else made
    if not isinstance(made, list):
        return None
    are_calls = all(isinstance(call, dict) and call.keys() >= {"name", "arguments"} for call in made)
    return made if are_calls else None


def _last_block(text: str) -> str | None:
    """What a non-greedy regular expression would match last, in linear time."""
    block, position = None, 0
    while (start := text.find(_CALLS_START, position)) >= 0:
        start += len(_CALLS_START)
        end = text.find(_CALLS_END, start)
        if end < 0:
            break
        block, position = text[start:end], end + len(_CALLS_END)
    return block


def _parsed(text: str) -> Any:
    """JSON that is not nested too deeply; ValueError otherwise."""
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return json.loads(text)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _match(expected: Sequence[TrueCall], calls: Sequence[dict[str, Any]]) -> bool:
    """Whether each call can be given a true call of its own: a perfect matching, grown by augmenting paths."""
    if len(expected) != len(calls):
        return False
    accepted = [[i for i, call in enumerate(calls) if true_call.accepts(call)] for true_call in expected]
    owner: dict[int, int] = {}

    def place(true_call: int, tried: set[int]) -> bool:
        for call in accepted[true_call]:
            if call not in tried:
                tried.add(call)
                if call not in owner or place(owner[call], tried):
                    owner[call] = true_call
                    return True
        return False

    return all(place(true_call, set()) for true_call in range(len(expected)))


def _fits(given: Any, choices: dict[str, Any]) -> bool:
    """Whether `given` is an object with an accepted value for everything that may not be left out."""
    if not isinstance(given, dict) or not given.keys() <= choices.keys():
        return False
    return all(
        _is_accepted(given[argument], accepted) if argument in given else "" in accepted
        for argument, accepted in choices.items()
    )


def _is_accepted(value: Any, accepted: list[Any]) -> bool:
    # The leaderboard writes [] where only the empty list is right.
    values = [option for option in accepted if option != ""] if accepted else [[]]
    if value == "":  # as good as left out, for a string
        return "" in accepted and all(isinstance(option, str) for option in values)
    return any(_is_same(value, option) for option in values)


def _is_same(value: Any, option: Any) -> bool:
    if isinstance(option, dict):
        return _fits(value, option)
    if isinstance(option, list):
        return (
            isinstance(value, list)
            and len(value) == len(option)
            and all(_is_same(*pair) for pair in zip(value, option, strict=True))
        )
    if isinstance(option, str):
        return isinstance(value, str) and _read_by_bfcl(value) == _read_by_bfcl(option)
    if isinstance(option, bool) or option is None or isinstance(value, bool):
        return value is option
    return value == option


def _read_by_bfcl(text: str) -> str:
    return _UNREAD_BY_BFCL.sub("", text).lower().replace("'", '"')
