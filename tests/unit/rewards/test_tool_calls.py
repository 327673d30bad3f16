from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.records import Grade
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward
from megatron_chord.rewards.pool import GraderPool
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.tool_calls import grade, read_truth
from megatron_chord.rewards.tool_replies import MAX_DEPTH, Think
from tests.support.files import data_set, rows_of
from tests.support.grading import grades_of

MAIL = {"name": "mail", "arguments": {"to": "Bob", "lines": 2}}
PAY = {"name": "pay", "arguments": {"sum": 1.5, "gift": True}}
BFCL_FILES = {"irrelevance": 240, "live_simple": 258, "parallel": 200, "simple_python": 400}


def reply(calls: object) -> str:
    return f"<think>hm</think>\n<tool_call>{json.dumps(calls)}</tool_call>"


def score(calls: object, truth: object) -> float:
    return grade(reply(calls), json.dumps(truth))


C = json.dumps(MAIL)
P = json.dumps({"name": "mail", "parameters": MAIL["arguments"]})
T = json.dumps({"name": "mail", "arguments": json.dumps(MAIL["arguments"])})
OPENAI = {"id": "c1", "type": "function", "function": json.loads(T)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Qwen and Hermes
        (f"<tool_call>\n{C}\n</tool_call>", 1.0),
        (f"<tool_call>[{C}]</tool_call>", 1.0),
        (f" so \n<tool_call>\n [{C}] \u00a0</tool_call> done", 1.0),
        (f"<tool_call>{C}", 1.0),  # the server stopped at the end tag
        (f"<tool_call>{T}</tool_call>", 1.0),
        (f"<tool_call>{P}</tool_call>", 1.0),
        (f"<tool_call>[]</tool_call><tool_call>{C}</tool_call>", 1.0),
        (f"<tool_call>{C}</tool_call><tool_call>[]</tool_call>", 1.0),
        (f"<tool_call>{C}</tool_call><tool_call>{C}</tool_call>", 0.0),
        (f'<tool_call>{{"name": "rm", "arguments": {{}}}}</tool_call><tool_call>{C}</tool_call>', 0.0),
        (f"<tool_call>oops</tool_call><tool_call>{C}</tool_call>", 0.0),
        (f"<tool_call>{C}</tool_call><tool_call>[", 0.0),
        (f"<tool_call><tool_call>[{C}]</tool_call>", 0.0),
        (f"<tool_call>[{C}]</tool_call></tool_call>", 1.0),
        (f"<tool_call>```json\n[{C}]\n```</tool_call>", 0.0),
        (f"<tool_call>[{C},]</tool_call>", 0.0),
        (f"<tool_call>[[{C}]]</tool_call>", 0.0),
        (f"<tool_call>[{C}, 5]</tool_call>", 0.0),
        (f"<tool_call>[{C}", 0.0),
        ("<tool_call></tool_call>", 0.0),
        ("<tool_call>null</tool_call>", 0.0),
        ("<tool_call>7</tool_call>", 0.0),
        # Llama 3: JSON
        (C, 1.0),
        (P, 1.0),
        (f"[{P}]", 1.0),
        (f"<|python_tag|>{P}<|eom_id|>", 1.0),
        (f"```json\n{P}\n```", 1.0),
        (f"{P}; {P}", 0.0),
        (f"{P}; oops", 0.0),
        (f"I call {P}", 0.0),
        # Llama 3: Python
        ("[mail(to='Bob', lines=2)]", 1.0),
        ('mail(lines=2, to="Bob")', 1.0),
        ('<|python_start|>[mail(to="Bob", lines=2,),]<|python_end|>', 1.0),
        ("[mail(to='Bob', lines=2), mail(to='Bob', lines=2)]", 0.0),
        ("[mail(to='Bob', lines=1+1)]", 0.0),
        ("[mail('Bob', 2)]", 0.0),
        ("[mail(to='Bob', lines=2, lines=2)]", 0.0),
        ("[mail(to=Bob, lines=2)]", 0.0),
        ("[mail(to='Bob', lines=2)", 0.0),
        ("[mail(to='Bob', lines=2)] is what I call", 0.0),
        # OpenAI
        (json.dumps([OPENAI]), 1.0),
        (json.dumps({"role": "assistant", "content": None, "tool_calls": [OPENAI]}), 1.0),
        (f"<tool_call>{json.dumps(OPENAI)}</tool_call>", 1.0),
        (json.dumps({"tool_calls": [OPENAI, OPENAI]}), 0.0),
        # no call
        ("", 0.0),
        ("I would write to Bob.", 0.0),
        ("mail(to) is the function", 0.0),
    ],
)
def test_forms_of_a_reply(text: str, expected: float) -> None:
    truth = json.dumps([MAIL])
    assert grade(text, truth) == expected
    assert grade(f"<think>a</think>\n{text}", truth, think="required") == expected


def test_the_setting_says_whether_a_reply_thinks() -> None:
    reply = Response(text=C, truth=json.dumps([MAIL]))
    thinks: tuple[Think, ...] = ("optional", "required", "forbidden")
    assert [ToolCallsReward(think=think).load()(reply) for think in thinks] == [1.0, 0.0, 1.0]


def test_values_of_the_pythonic_form() -> None:
    values = {"a": [1, -2.5, [True, None]], "b": {"c": "it's", "d": {}}, "e": 'x\n"y"', "f": False, "g": 1e3}
    truth = json.dumps([{"name": "a.b_c", "arguments": values}, {"name": "d", "arguments": {}}])
    written = 'a.b_c(a=[1, -2.5, (True, None)], b={\'c\': "it\'s", "d": {}}, e=\'x\\n"y"\', f=false, g=1e3)'
    assert grade(f"[{written}, d()]", truth) == 1.0
    assert grade(f"[{written}, d(x=1)]", truth) == 0.0


def test_llama_writes_several_calls_with_semicolons() -> None:
    calls = [
        {"name": "mail", "parameters": MAIL["arguments"]},
        {"name": "pay", "parameters": PAY["arguments"]},
    ]
    assert grade("; ".join(json.dumps(call) for call in calls), json.dumps([MAIL, PAY])) == 1.0
    assert grade(";".join(json.dumps(call) for call in calls), json.dumps([PAY, MAIL])) == 1.0


@pytest.mark.parametrize(
    ("text", "optional", "required", "forbidden"),
    [
        ("{c}", 1.0, 0.0, 1.0),
        ("<think>a</think>{c}", 1.0, 1.0, 0.0),
        ("a</think>{c}", 1.0, 1.0, 0.0),  # the prompt opened it
        ("<think>a{c}", 0.0, 0.0, 0.0),
        ("<think>a</think><think>b</think>{c}", 1.0, 0.0, 0.0),
        ("<think>a<think>b</think>{c}", 1.0, 0.0, 0.0),
        ("<think>a</think></think>{c}", 1.0, 0.0, 0.0),
        ("{c}<think>a</think>", 0.0, 0.0, 0.0),
        ("<think>I write {c}</think>", 0.0, 0.0, 0.0),
        ("<think>I write {c}</think>{c}", 1.0, 0.0, 0.0),
        ("<think>a</think>{c}<think>", 0.0, 0.0, 0.0),
    ],
)
def test_thinking(text: str, optional: float, required: float, forbidden: float) -> None:
    text = text.replace("{c}", f"<tool_call>{C}</tool_call>")
    expected: dict[Think, float] = {"optional": optional, "required": required, "forbidden": forbidden}
    for think, score in expected.items():
        assert grade(text, json.dumps([MAIL]), think=think) == score, think


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([MAIL, PAY], 1.0),
        ([PAY, MAIL], 1.0),
        (json.dumps([MAIL, PAY]), 1.0),  # a string of JSON
        (json.dumps(json.dumps([MAIL, PAY])), 0.0),
        ([{**MAIL, "id": 1}, PAY], 1.0),
        ([MAIL], 0.0),
        ([MAIL, MAIL], 0.0),
        ([MAIL, PAY, PAY], 0.0),
        ([], 0.0),
        ([{"name": "mail"}, PAY], 0.0),
        ([{"name": "Mail", "arguments": MAIL["arguments"]}, PAY], 0.0),
        ([{"name": ["mail"], "arguments": MAIL["arguments"]}, PAY], 0.0),
        ([{"name": "mail", "arguments": {"lines": 2, "to": "Bob"}}, PAY], 1.0),
        ([{"name": "mail", "arguments": {"lines": 2.0, "to": "Bob"}}, PAY], 0.0),
        ([{"name": "mail", "arguments": {"lines": "2", "to": "Bob"}}, PAY], 0.0),
        ([{"name": "mail", "arguments": {"lines": 2, "to": "bob"}}, PAY], 0.0),
        ([{"name": "mail", "arguments": {"lines": 2, "to": "Bob", "cc": ""}}, PAY], 0.0),
        ([{"name": "mail", "arguments": json.dumps(MAIL["arguments"])}, PAY], 1.0),
        ([{"name": "mail", "arguments": json.dumps(json.dumps(MAIL["arguments"]))}, PAY], 0.0),
        ([{"name": "mail", "arguments": None}, PAY], 0.0),
        ([MAIL, {"name": "pay", "arguments": {"sum": 1.5, "gift": 1}}], 0.0),
    ],
)
def test_calls_are_a_multiset(calls: object, expected: float) -> None:
    assert score(calls, [MAIL, PAY]) == expected


def test_equal_calls_are_counted() -> None:
    assert score([MAIL, MAIL, PAY], [PAY, MAIL, MAIL]) == 1.0
    assert score([MAIL, PAY, PAY], [PAY, MAIL, MAIL]) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>[]</tool_call>", 1.0),
        ("[]", 1.0),
        ("None of these functions helps.", 1.0),
        ("<think>x</think>None of these functions helps.", 1.0),
        ("mail(to) does not help, and nor does [1].", 1.0),
        ("", 1.0),
        ("<think>x", 0.0),  # cut off
        (C, 0.0),
        ("[mail(to='Bob')]", 0.0),
        ("[mail(to=Bob)]", 0.0),  # the call was attempted and failed
        (f"I call {C}", 0.0),
        (f"<tool_call>{C}</tool_call>", 0.0),
        ("<tool_call>oops", 0.0),
    ],
)
def test_no_call_is_right_where_none_is_asked_for(text: str, expected: float) -> None:
    assert grade(text, "[]") == expected


@pytest.mark.parametrize(
    "truth",
    [
        [MAIL],
        MAIL,
        json.loads(P),
        json.loads(T),
        [OPENAI],
        {"tool_calls": [OPENAI]},
        json.dumps([MAIL]),
        {"mail": {"to": ["Bob", "Bobby"], "lines": [2]}},
    ],
)
def test_forms_of_a_truth(truth: object) -> None:
    assert grade(C, json.dumps(truth)) == 1.0
    assert grade("[mail(to='Ann', lines=2)]", json.dumps(truth)) == 0.0


@pytest.mark.parametrize(
    ("given", "accepted", "expected"),
    [
        ({"a": 1}, {"a": [1, 2]}, True),
        ({"a": 3}, {"a": [1, 2]}, False),
        ({}, {"a": [1]}, False),
        ({}, {"a": [1, ""]}, True),
        ({}, {}, True),
        ({"b": 1}, {"a": [1, ""]}, False),
        (["a"], {"a": [1]}, False),
        ({"a": ""}, {"a": ["x", ""]}, True),
        ({"a": ""}, {"a": [1, ""]}, False),  # a text is not accepted as a number
        ({"a": "-"}, {"a": ["x", ""]}, True),  # the leaderboard does not read a dash
        ({"a": "-"}, {"a": ["x"]}, False),
        ({"a": ""}, {"a": [None, ""]}, False),
        ({"a": ""}, {"a": ["x"]}, False),
        ({"a": 1}, {"a": [1.0]}, True),
        ({"a": 1.0}, {"a": [1]}, False),
        ({"a": []}, {"a": [[1, 2], ""]}, True),
        ({"a": []}, {"a": [[1, 2]]}, False),
        ({"a": []}, {"a": ["x", ""]}, False),
        ({"a": 1}, {"a": [True]}, False),
        ({"a": True}, {"a": [1]}, False),
        ({"a": False}, {"a": [True, False]}, True),
        ({"a": None}, {"a": [None]}, True),
        ({"a": 0}, {"a": [None, False]}, False),
        ({"a": "san francisco,ca"}, {"a": ["San Francisco, CA"]}, True),
        ({"a": "O'Hare"}, {"a": ['O"Hare']}, True),
        ({"a": "San Diego"}, {"a": ["San Francisco"]}, False),
        ({"a": "1"}, {"a": [1]}, False),
        ({"a": [1, 2]}, {"a": [[1, 2], [3]]}, True),
        ({"a": [2, 1]}, {"a": [[1, 2]]}, False),
        ({"a": [1]}, {"a": [[1, 2]]}, False),
        ({"a": [[1, "X"]]}, {"a": [[[1, "x"]]]}, True),
        ({"a": []}, {"a": []}, True),  # only an empty list is accepted
        ({"a": [1]}, {"a": []}, False),
        ({"a": {"b": 1}}, {"a": [{"b": [1, 2], "c": ["", 3]}]}, True),
        ({"a": {"b": 1, "c": 4}}, {"a": [{"b": [1, 2], "c": ["", 3]}]}, False),
        ({"a": {"c": 3}}, {"a": [{"b": [1, 2], "c": ["", 3]}]}, False),
        ({"a": {}}, {"a": ["", {}]}, True),
        (
            {"a": {"b": {"c": 1.5}}},
            {"a": [{"b": [{"c": 1.5}]}]},
            True,
        ),  # an object without choices is the value
        ({"a": {"b": {"c": 2}}}, {"a": [{"b": [{"c": 1.5}]}]}, False),
        ({"a": 5}, {"a": [{"b": [1]}]}, False),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [[{"b": [1]}, {"b": [2]}]]}, True),
        ({"a": [{"b": 2}, {"b": 1}]}, {"a": [[{"b": [1]}, {"b": [2]}]]}, False),
    ],
)
def test_accepted_values(given: object, accepted: object, expected: bool) -> None:
    assert score([{"name": "f", "arguments": given}], [{"f": accepted}]) == expected
    assert score([{"name": "g", "arguments": given}], [{"f": accepted}]) == 0.0


def test_calls_are_given_to_true_calls_so_that_all_fit() -> None:
    truth = [{"f": {"a": [1, 2]}}, {"f": {"a": [1, 3]}}, {"f": {"a": [1]}}]
    for values, expected in [
        ((1, 2, 3), 1.0),
        ((3, 1, 2), 1.0),
        ((2, 3, 1), 1.0),
        ((1, 1, 2), 1.0),
        ((2, 2, 1), 0.0),
    ]:
        assert score([{"name": "f", "arguments": {"a": value}} for value in values], truth) == expected


def test_both_forms_in_one_truth() -> None:
    assert score([{"name": "f", "arguments": {"a": 2}}, MAIL], [MAIL, {"f": {"a": [1, 2]}}]) == 1.0


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        ("", "are not JSON"),
        ("mail(to='Bob')", "are not JSON"),
        ("[" * 5000 + "]" * 5000, "are not JSON: nested more than"),
        ("{}", "must be a JSON list"),
        ("5", "must be a JSON list"),
        ("[5]", "true call 1 is neither"),
        (json.dumps([MAIL, {}]), "true call 2 is neither"),
        (json.dumps([{"f": {}, "g": {}}]), "true call 1 is neither"),
        (json.dumps([{"f": [1]}]), "true call 1 is neither"),
        (json.dumps([{"type": "function", "function": 5}]), "true call 1 is neither"),
        (json.dumps([{"name": "f", "arguments": "{"}]), "`arguments` an object"),
        (json.dumps([{"name": 5, "arguments": {}}]), "`name` must be a string"),
        (json.dumps([{"f": {"a": 1}}]), "true call 1: f.a must be a list of accepted values"),
        (
            json.dumps([{"f": {"a": [[{"b": 1, "c": [2]}]]}}]),
            "true call 1: f.a.b must be a list of accepted values",
        ),
    ],
)
def test_truth_that_cannot_be_read_is_no_zero(truth: str, reason: str) -> None:
    for text in ("", reply([MAIL])):
        with pytest.raises(ValueError, match=reason):
            grade(text, truth)


BOMBS = {
    "lists": "[" * 1_000_000,
    "closed lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"name":' * 200_000,
    "just too deep": "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "string of lists": json.dumps("[" * 100_000),
    "quotes": '"\\"' * 300_000,
    "backslashes": '"' + "\\" * 1_000_001,
    "digits": f'[{{"name": "mail", "arguments": {"9" * 100_000}}}]',
    "calls": json.dumps([MAIL] * 20_000),
    "not a number": '[{"name": "mail", "arguments": NaN}]',
    "infinity": '[{"name": "mail", "arguments": 1e999}]',
    "pythonic lists": "[f(a=" + "[" * 1_000_000,
    "pythonic strings": "[f(a='" + "\\\\" * 500_000,
    "pythonic digits": f"[f(a={'9' * 100_000})]",
    "pythonic calls": "[" + "f(a=1)," * 20_000 + "]",
    "objects with semicolons": '{"name": 1};' * 50_000,
    "half a character": '[{"name": "mail", "arguments": {"to": "\\ud800"}}]',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_wrong_answers(bomb: str) -> None:
    start = time.monotonic()
    assert grade(f"<think></think><tool_call>{BOMBS[bomb]}</tool_call>", json.dumps([MAIL])) == 0.0
    assert grade(BOMBS[bomb], json.dumps([MAIL])) == 0.0
    assert time.monotonic() - start < 10


def test_many_tags_take_linear_time() -> None:
    start = time.monotonic()
    assert grade("<think></think>" + "<tool_call>" * 300_000, "[]") == 0.0
    assert grade("<think></think>" + "<tool_call>[]</tool_call>" * 100_000, "[]") == 1.0
    assert time.monotonic() - start < 10


def test_brackets_in_strings_are_not_depth() -> None:
    call = {"name": "run", "arguments": {"code": '"' + "[{" * 500 + "\\"}}
    assert score([call], [call]) == 1.0


def test_in_the_pool_bombs_are_zeros_and_bad_truths_errors() -> None:
    with GraderPool(ToolCallsReward(workers=2, timeout_s=30, memory_mb=400)) as pool:
        items = [
            (f"<think></think><tool_call>{bomb}</tool_call>", json.dumps([MAIL])) for bomb in BOMBS.values()
        ]
        assert grades_of(pool, items) == [Grade(0.0)] * len(BOMBS)
        good, bad = grades_of(pool, [(reply([MAIL]), json.dumps([MAIL])), (reply([MAIL]), "mail")])
    assert good == Grade(1.0)
    assert bad.score is None
    assert bad.error is not None
    assert bad.error.startswith("ValueError: the true calls are not JSON")


@pytest.fixture(scope="module")
def bfcl() -> Path:
    return data_set("tool_calling")


def chosen(accepted: list[Any], *, last: bool) -> Any:
    """Take the first or the last accepted value, also in nested choices."""
    value = ([option for option in accepted if option != ""] or accepted or [[]])[-1 if last else 0]
    return taken(value, last=last)


def taken(value: Any, *, last: bool) -> Any:
    if isinstance(value, dict):
        return {key: chosen(accepted, last=last) for key, accepted in value.items()}
    return [taken(item, last=last) for item in value] if isinstance(value, list) else value


def made_calls(truth: list[dict[str, dict[str, list[Any]]]], *, last: bool = False) -> list[dict[str, Any]]:
    return [
        {"name": name, "arguments": {key: chosen(accepted, last=last) for key, accepted in arguments.items()}}
        for call in truth
        for name, arguments in call.items()
    ]


@pytest.mark.parametrize("name", BFCL_FILES)
def test_bfcl_truth_is_right_and_what_differs_is_wrong(bfcl: Path, name: str) -> None:
    rows = rows_of(bfcl / f"bfcl_{name}.jsonl")
    assert len(rows) == BFCL_FILES[name]
    for row in rows:
        truth = row["ground_truth"]
        assert len(read_truth(json.dumps(truth))) == len(truth)
        calls = made_calls(truth)
        assert score(calls, truth) == score(made_calls(truth, last=True)[::-1], truth) == 1.0, row["id"]
        assert score([*calls, MAIL], truth) == 0.0
        if calls:
            assert score(calls[:-1], truth) == score([], truth) == 0.0
        for number, call in enumerate(calls):
            for wrong in perturbed(call, next(iter(truth[number].values()))):
                changed = [*calls[:number], wrong, *calls[number + 1 :]]
                assert score(changed, truth) == 0.0, (row["id"], wrong)


def perturbed(call: dict[str, Any], accepted: dict[str, list[Any]]) -> list[dict[str, Any]]:
    wrong: list[dict[str, Any]] = [
        {"name": call["name"] + "_", "arguments": call["arguments"]},
        {"name": call["name"], "arguments": {**call["arguments"], "no such argument": 1}},
    ]
    for argument in call["arguments"]:
        changed = copy.deepcopy(call)
        changed["arguments"][argument] = "quite another value"
        wrong.append(changed)
        if "" not in accepted[argument]:
            left_out = copy.deepcopy(call)
            del left_out["arguments"][argument]
            wrong.append(left_out)
    return wrong
