"""Equal sets of tool calls.

This is the reward of CHORD's tool-use experiments (Trinity-RFT, customized_toolcall_workflows.py, after Tool-N1, arXiv
2505.00024). A reply is either right (1) or wrong (0). A true call has one of two forms:

* ``{"name": ..., "arguments": {...}}``: the call itself, also with ``parameters`` for ``arguments``, with the arguments
  as JSON text, or as ``{"type": "function", "function": {...}}``. Arguments are equal when their JSON, keys sorted, is.
* ``{function: {argument: [every accepted value]}}``, of the Berkeley Function-Calling Leaderboard. Values are
  compared as in its checker (ast_checker.py): strings without regard to case, blanks and some punctuation; numbers by
  value, where 5 is accepted for 5.0, but not 5.0 for 5. An accepted ``""`` means that the argument may be left out.
  Nested objects have lists of accepted values, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_chord.rewards.tool_replies import Call, Think, as_call, parsed_json, read_calls

_UNREAD_BY_BFCL = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True)
class TrueCall:
    name: str
    arguments: dict[str, Any]
    has_choices: bool
    """Each argument is a list of accepted values."""

    def accepts(self, call: Call) -> bool:
        if call.name != self.name:
            return False
        if self.has_choices:
            return _fits(call.arguments, self.arguments)
        return _canonical(call.arguments) == _canonical(self.arguments)


def grade(text: str, truth: str, *, marker: str = "", think: Think = "optional") -> float:
    """1.0 if `text` makes exactly the calls of `truth`, in any order; otherwise 0.0.

    `tool_replies.read_calls` says which forms of a call are read, and what `think` requires. If the truth is an empty
    list, every reply without a call is right. `marker` is not used.

    Raises:
        ValueError: the truth cannot be read, so the answer cannot be graded.
    """
    expected = read_truth(truth)
    calls = read_calls(text, think=think)
    return float(calls is not None and _match(expected, calls))


def read_truth(truth: str) -> list[TrueCall]:
    """The calls of a JSON list, or a single call. Raises ValueError with the reason if it is neither."""
    try:
        items = parsed_json(truth)
        if isinstance(items, str):
            items = parsed_json(items)
    except ValueError as error:
        raise ValueError(f"the true calls are not JSON: {error}") from None
    if isinstance(items, dict) and items:
        items = items["tool_calls"] if isinstance(items.get("tool_calls"), list) else [items]
    if not isinstance(items, list):
        raise ValueError("the true calls must be a JSON list, [] for none")
    return [_true_call(item, f"true call {number}") for number, item in enumerate(items, start=1)]


def _true_call(item: Any, name: str) -> TrueCall:
    call = as_call(item)
    if call is not None:
        return TrueCall(call.name, call.arguments, has_choices=False)
    if isinstance(item, dict) and "name" in item and len(item) > 1:
        raise ValueError(f"{name}: `name` must be a string and `arguments` an object or its JSON text")
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
            if _has_choices(inner):
                _require_choices(inner, f"{name}.{argument}")


def _has_choices(item: dict[str, Any]) -> bool:
    """True if a nested object lists accepted values. If it lists none, the object itself is the value."""
    return any(isinstance(accepted, list) for accepted in item.values())


def _objects(values: list[Any]) -> list[dict[str, Any]]:
    """The objects in a list and in its nested lists."""
    found = [value for value in values if isinstance(value, dict)]
    return found + [inner for value in values if isinstance(value, list) for inner in _objects(value)]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _match(expected: Sequence[TrueCall], calls: Sequence[Call]) -> bool:
    """True if calls and true calls have a perfect matching. It is found by augmenting paths."""
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
    """True if `given` is an object with an accepted value for everything that may not be left out."""
    if not isinstance(given, dict) or not given.keys() <= choices.keys():
        return False
    return all(
        _is_accepted(given[argument], accepted) if argument in given else "" in accepted
        for argument, accepted in choices.items()
    )


def _is_accepted(value: Any, accepted: list[Any]) -> bool:
    # The leaderboard writes [] where only the empty list is right.
    values = [option for option in accepted if option != ""] if accepted else [[]]
    if _is_blank(value) and "" in accepted and all(isinstance(option, type(value)) for option in values):
        return True  # as good as left out
    return value != "" and any(_is_same(value, option) for option in values)


def _is_blank(value: Any) -> bool:
    return value == [] or (isinstance(value, str) and not _read_by_bfcl(value))


def _is_same(value: Any, option: Any) -> bool:
    if isinstance(option, dict):
        return (
            _fits(value, option)
            if _has_choices(option) or not option
            else _canonical(value) == _canonical(option)
        )
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
    return value == option and not (isinstance(value, float) and isinstance(option, int))


def _read_by_bfcl(text: str) -> str:
    return _UNREAD_BY_BFCL.sub("", text).lower().replace("'", '"')
