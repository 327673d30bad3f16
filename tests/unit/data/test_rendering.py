"""Chat templates give what Transformers gives. Templates that would take too much time or memory are refused."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_chord.data.rendering import Renderer
from megatron_chord.data.rows import DataError, FatalRowError, RowError, parse_rows
from megatron_chord.data.templates import load_template
from megatron_chord.records import Message

CHAT: list[Message] = [
    {"role": "user", "content": 'Is "a" < b & \u2028 true?'},
    {"role": "assistant", "content": "Yes."},
]
HONEST = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}{%- if loop.index > 9 %}{% break %}{% endif %}\n"
    "[{{ m['role'] | upper }}] {{ m.content | trim | tojson }}{{ eos_token }}\n{% endfor %}\n"
    "{% generation %}{{ strftime_now('%Y-%m-%d') }}{% endgeneration %}{% if add_generation_prompt %}>{% endif %}"
)


def render(template: str, chat: list[Message] = CHAT, *, cpu_s: float = 10) -> str:
    renderer = Renderer(template, {"bos_token": "<s>", "eos_token": "</s>"}, "FILE", cpu_s=cpu_s)
    try:
        return renderer.render(chat, add_generation_prompt=True)
    finally:
        renderer.stop_processes()


def test_it_renders_as_transformers_does(chatml_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatml_folder)
    renderer = Renderer(HONEST, {**tokenizer.special_tokens_map, "bos_token": "<s>"}, "FILE")
    for chat in (CHAT[:1], CHAT, CHAT * 6):
        for flag in (True, False):
            expected = tokenizer.apply_chat_template(
                chat,
                chat_template=HONEST,
                tokenize=False,
                add_generation_prompt=flag,
                bos_token="<s>",
                strftime_now=lambda pattern: "2024-07-26",
            )
            assert renderer.render(chat, add_generation_prompt=flag) == expected
    renderer.stop_processes()


FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (FOREVER, "takes longer than 1 s"),
        ("{{ 10 ** (10 ** 10) }}", "takes longer than 1 s"),
        ("{{ 'a' * 9999999999 }}", "needs more memory than 2 GiB"),
        ("{% set n = namespace(x='aaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "memory"),
    ],
)  # fmt: skip
def test_what_would_take_all_time_or_memory_ends_in_one_line(template: str, reason: str) -> None:
    with pytest.raises(
        FatalRowError, match=rf"^the chat template \(FILE\) .*{reason}.* on this conversation$"
    ):
        render(template, cpu_s=1 if "1 s" in reason else 10)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
        ("{{ raise_exception('no system message') }}", "refuses the conversation: no system message"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(99) %}{{ 'a' * 99999 }}{% endfor %}", "it has 9899901 characters"),
    ],
)
def test_what_a_template_raises_is_about_its_conversation(template: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason) as caught:
        render(template)
    assert not isinstance(caught.value, FatalRowError)
    assert "\n" not in str(caught.value)


def test_reading_ends_at_the_row_whose_template_does_not_return(chatml_folder: Path, tmp_path: Path) -> None:
    trap = "{% if 'trap' in messages[0].content %}" + FOREVER + "{% endif %}{{ messages[0].content }}"
    template = replace(load_template(chatml_folder), renderer=Renderer(trap, {}, "FILE", cpu_s=1))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "a"}\n{"q": "trap"}\n{"q": "trap"}\n')
    begin = time.process_time()
    with pytest.raises(
        DataError, match=r"1 row cannot be used\n\S+rows\.jsonl:2: the chat template"
    ) as caught:
        parse_rows(rows, lambda row: template.prompt_ids([{"role": "user", "content": row.fields["q"]}]))
    assert len(str(caught.value).splitlines()) == 2
    assert time.process_time() - begin < 5, "the process that renders is another one"


IMPORTS = """
import importlib.abc, sys
from megatron_chord.data.jinja_worker import load_renderer

class RefusesOnce(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.utils.import_utils":
            sys.meta_path.remove(self)
            raise ImportError(name)

if sys.argv[1] == "refused":
    sys.meta_path.insert(0, RefusesOnce())
conversation = [{"role": "user", "content": "two"}]
texts, _ = load_renderer()([conversation], chat_template="{{ messages[0].content }}{{ messages | tojson }}")
print(texts[0], "transformers.utils.hub" in sys.modules)
"""


@pytest.mark.parametrize(("how", "imports_all"), [("alone", "False"), ("refused", "True")])
def test_a_worker_imports_all_of_transformers_only_if_it_must(how: str, imports_all: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, how], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == f'two[{{"role": "user", "content": "two"}}] {imports_all}\n', done.stderr
