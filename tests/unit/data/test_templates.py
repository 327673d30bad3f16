"""Prompts, demonstrations and evaluation get the same token ids. Masks are compared with text written by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.rows import DataError, RowError
from megatron_chord.data.templates import ChatTemplate, load_template
from tests.unit.data.conftest import PLAIN

USER = {"role": "user", "content": "what is 2 plus 2?"}
ANSWER = {"role": "assistant", "content": "The answer is 4."}
AGAIN = {"role": "user", "content": "and 3 plus 3?"}
SIX = {"role": "assistant", "content": "6"}


def encoded(template: ChatTemplate, text: str) -> list[int]:
    return template.tokenizer(text, add_special_tokens=False).input_ids


def with_jinja(folder: Path, tmp_path: Path, jinja: str) -> ChatTemplate:
    file = tmp_path / "given.jinja"
    file.write_text(jinja)
    return load_template(folder, chat_template=file)


def trained(template: ChatTemplate, token_ids: tuple[int, ...], trainable: tuple[bool, ...]) -> str:
    kept = [token for token, train in zip(token_ids, trainable, strict=True) if train]
    return template.tokenizer.decode(kept, skip_special_tokens=False)


def test_chatml_ids_and_mask(chatml: ChatTemplate) -> None:
    prompt = encoded(chatml, "<|im_start|>user\nwhat is 2 plus 2?<|im_end|>\n<|im_start|>assistant\n")
    answer = encoded(chatml, "The answer is 4.<|im_end|>")
    assert chatml.prompt_ids([USER]) == tuple(prompt)
    token_ids, trainable = chatml.demonstration([USER, ANSWER])
    assert token_ids == (*prompt, *answer)  # the newline after <|im_end|> is cut off
    assert trainable == (False,) * len(prompt) + (True,) * len(answer)
    assert chatml.stop_token_ids == (2,)
    assert token_ids[-1] == 2


def test_every_assistant_turn_is_trained_and_nothing_between(chatml: ChatTemplate) -> None:
    token_ids, trainable = chatml.demonstration([USER, ANSWER, AGAIN, SIX])
    assert trained(chatml, token_ids, trainable) == "The answer is 4.<|im_end|>6<|im_end|>"
    not_trained = tuple(not train for train in trainable)
    assert trained(chatml, token_ids, not_trained) == (
        "<|im_start|>user\nwhat is 2 plus 2?<|im_end|>\n<|im_start|>assistant\n"
        "\n<|im_start|>user\nand 3 plus 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert token_ids[: len(chatml.prompt_ids([USER, ANSWER, AGAIN]))] == chatml.prompt_ids(
        [USER, ANSWER, AGAIN]
    )


def test_sentencepiece_folder_gives_the_ids_of_sentencepiece(
    plain: ChatTemplate, sentencepiece_folder: Path
) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(sentencepiece_folder / "tokenizer.model"))
    prompt = reference.encode("[user] what is 2 plus 2?\nAnswer:")
    answer = [*reference.encode(" The answer is 4."), reference.eos_id()]
    assert plain.stop_token_ids == (reference.eos_id(),)
    assert plain.prompt_ids([USER]) == tuple(prompt)
    assert plain.demonstration([USER, ANSWER]) == (
        (*prompt, *answer),
        (False,) * len(prompt) + (True,) * len(answer),
    )
    assert plain.decode(answer).strip() == "The answer is 4."
    # Pieces that the model's maker defined ("\n") are text, although Transformers calls them special.
    assert plain.decode([*reference.encode("4\n[6]"), reference.eos_id()]) == "4\n[6]"


def test_user_defined_piece_with_a_role_is_no_text(
    sentencepiece_folder: Path, plain: ChatTemplate, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sentencepiece_folder, folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "chat_template": PLAIN.replace("</s>", "<end>")})
    )
    template = load_template(folder)
    reference = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    (end,) = template.stop_token_ids
    assert reference.id_to_piece(end) == "<end>"
    assert template.decode([*reference.encode("4\n6"), end]) == "4\n6"


@pytest.mark.parametrize("which", ["chatml", "plain"])
@pytest.mark.parametrize(
    "content",
    ["1", " leading", "trailing \n", "\n\n", "1,000 dollars", "\u00fc\u4e2d\U0001f600", "[INST]" * 50],
)
def test_rl_and_sft_see_the_same_prompt(which: str, content: str, request: pytest.FixtureRequest) -> None:
    template: ChatTemplate = request.getfixturevalue(which)
    messages = [{"role": "user", "content": content}]
    prompt = template.prompt_ids(messages)
    token_ids, trainable = template.demonstration([*messages, ANSWER])
    assert token_ids[: len(prompt)] == prompt
    assert not any(trainable[: len(prompt)])
    assert all(trainable[len(prompt) :])


def test_system_prompt_goes_first_unless_the_row_has_its_own(chatml_folder: Path) -> None:
    template = load_template(chatml_folder, system_prompt="Be brief.")
    own = {"role": "system", "content": "Be long."}
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert template.tokenizer.decode(template.prompt_ids([USER])).startswith(start)
    assert template.tokenizer.decode(template.demonstration([USER, ANSWER])[0]).startswith(start)
    assert "brief" not in template.tokenizer.decode(template.prompt_ids([own, USER]))
    conversation = template.conversation([USER])
    assert template.conversation(conversation) == conversation  # a second call adds nothing


def test_decode_leaves_control_tokens_out(chatml: ChatTemplate) -> None:
    assert chatml.decode(encoded(chatml, "It is 4 .<|im_end|>")) == "It is 4 ."
    assert chatml.decode([]) == ""


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_text_of_a_control_token_is_refused(chatml: ChatTemplate, text: str) -> None:
    injected = {"role": "user", "content": f"1{text}\n"}
    with pytest.raises(RowError, match=r"message 0 \(user\) holds .* control token"):
        chatml.prompt_ids([injected])
    with pytest.raises(RowError, match=r"message 1 \(assistant\) holds .* control token"):
        chatml.demonstration([USER, {"role": "assistant", "content": f"4{text}5"}])


def test_template_that_rewrites_earlier_turns(chatml_folder: Path, tmp_path: Path) -> None:
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else '...' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = with_jinja(chatml_folder, tmp_path, forgetful)
    template.demonstration([USER, ANSWER])  # one turn is fine
    with pytest.raises(RowError, match=r"not prefix-stable: with later messages.*data\.chat_template"):
        template.demonstration([USER, ANSWER, AGAIN, SIX])


def test_generation_prompt_that_the_answer_changes(chatml_folder: Path, tmp_path: Path) -> None:
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\nthink: {% endif %}"
    )
    with pytest.raises(RowError, match=r"given\.jinja\) is not prefix-stable: with the answer"):
        with_jinja(chatml_folder, tmp_path, thinking).demonstration([USER, ANSWER])


def test_space_that_the_tokenizer_joins_to_the_answer(sentencepiece_folder: Path, tmp_path: Path) -> None:
    joined = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>"
        "{% else %}[user] {{ m.content }}\nAnswer: {% endif %}{% endfor %}"
    )
    with pytest.raises(RowError, match="not prefix-stable"):
        with_jinja(sentencepiece_folder, tmp_path, joined).demonstration([USER, ANSWER])


def test_turn_without_a_stop_token(chatml_folder: Path, tmp_path: Path) -> None:
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
    template = with_jinja(chatml_folder, tmp_path, endless.replace(": {% endif", ":{% endif"))
    with pytest.raises(RowError, match=r"ends message 1 without a stop token \('<\|im_end\|>'\)"):
        template.demonstration([USER, ANSWER])


def test_turn_that_goes_on_after_its_stop_token(chatml_folder: Path, tmp_path: Path) -> None:
    babbling = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{{ 'Thanks!' if m.role == 'assistant' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RowError, match=r"message 1 continues after its stop token .*'Thanks!"):
        with_jinja(chatml_folder, tmp_path, babbling).demonstration([USER, ANSWER])


def test_template_that_refuses_a_role(chatml_folder: Path, tmp_path: Path) -> None:
    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    template = with_jinja(chatml_folder, tmp_path, strict)
    with pytest.raises(RowError, match=r"given\.jinja\) refuses the conversation: no system role"):
        template.prompt_ids([{"role": "system", "content": "s"}, USER])


def test_the_date_that_a_template_prints_is_fixed(chatml_folder: Path, tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    template = with_jinja(chatml_folder, tmp_path, dated)
    assert template.tokenizer.decode(template.prompt_ids([USER])).startswith("26 Jul 2024")


def test_stop_tokens_of_the_generation_config_count(chatml_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chatml_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load_template(folder).stop_token_ids == (0, 2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert load_template(folder).stop_token_ids == (0, 2)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert load_template(folder).stop_token_ids == (2,)


def test_folders_and_files_that_cannot_be_used(
    tmp_path: Path, sentencepiece_folder: Path, chatml_folder: Path
) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_template(tmp_path / "none")
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_template(tmp_path)
    with pytest.raises(ValueError, match=r"no chat template; give a Jinja file with data\.chat_template"):
        load_template(sentencepiece_folder)
    with pytest.raises(ValueError, match="no such file"):
        load_template(chatml_folder, chat_template=tmp_path / "none.jinja")
    with pytest.raises(ValueError, match="refuses the conversation"):
        with_jinja(chatml_folder, tmp_path, "{% if %}")
    with pytest.raises(ValueError, match="turns a user message into nothing"):
        with_jinja(chatml_folder, tmp_path, "{% for m in messages %}{% endfor %}")


def test_code_of_a_model_folder_is_not_run(chatml_folder: Path, tmp_path: Path) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(chatml_folder, folder)
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    load_template(folder)  # as tokenizer.json says
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_template(folder)
    assert not canary.exists()


VOCAB = 400
"""The number of ids that the model of ``chatml_folder`` has."""


@pytest.fixture
def added(chatml_folder: Path, tmp_path: Path) -> Path:
    """A folder whose tokenizer has one token more than the model: <think> with id 400."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(chatml_folder)
    assert len(tokenizer) == VOCAB
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "added")
    return tmp_path / "added"


def test_tokens_that_the_model_does_not_know_are_refused_in_rows(added: Path, tmp_path: Path) -> None:
    template = load_template(added, vocab_size=VOCAB)
    sizes = "beyond the model's vocabulary: config.json has vocab_size 400, the tokenizer 401 tokens"
    thinking = {"role": "user", "content": "<think>what is 2 plus 2?"}
    with pytest.raises(RowError, match=r"token \d+ is '<think>', id 400, " + sizes):
        template.prompt_ids([thinking])
    with pytest.raises(RowError, match=sizes):
        template.demonstration([USER, {"role": "assistant", "content": "<think>4"}])
    assert max(template.prompt_ids([USER])) < VOCAB
    assert max(load_template(added, vocab_size=VOCAB + 1).prompt_ids([thinking])) == VOCAB

    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"problem": "1 + 1", "answer": 2}\n{"problem": "<think>", "answer": 2}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl:2: token \d+ is '<think>', id 400, " + sizes):
        load_prompts(rows, template, max_prompt_tokens=99, overlong="fail")


def test_tokens_that_the_model_does_not_know_are_refused_in_the_template(added: Path, tmp_path: Path) -> None:
    jinja = tmp_path / "thinks.jinja"
    jinja.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}<think>")
    with pytest.raises(
        ValueError, match=r"thinks.jinja\), tried on one user message: token 2 is '<think>', id 400"
    ):
        load_template(added, chat_template=jinja, vocab_size=VOCAB)


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_roles_of_tokens_that_the_model_does_not_know_are_refused(added: Path, role: str) -> None:
    file = added / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {role: "<think>"}))
    with pytest.raises(ValueError, match=f"the tokenizer's {role} is '<think>', id 400, beyond"):
        load_template(added, vocab_size=VOCAB)


def test_a_stop_token_that_the_model_does_not_know_is_refused(chatml_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chatml_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 407]}))
    with pytest.raises(ValueError, match=r"a stop token .*id 407, beyond the model's vocabulary"):
        load_template(folder, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("generation_config.json", "[1]"),
        ("generation_config.json", '{"eos_token_id": "2"}'),
        ("generation_config.json", '{"eos_token_id": {"a": 2}}'),
        ("generation_config.json", '{"eos_token_id": [2, [3]]}'),
        ("generation_config.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", '{"model": 3}'),
    ],
)
def test_files_of_a_wrong_form_end_in_one_line(
    chatml_folder: Path, tmp_path: Path, file: str, text: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chatml_folder, folder)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=str(folder)) as caught:
        load_template(folder)
    assert "\n" not in str(caught.value)


ASKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}quick: {% endif %}"
    "{% if style %}{{ style.tone }}{{ words[1] }}{% endif %}{% endif %}"
)
CHOSEN: dict[str, Any] = {"enable_thinking": False, "style": {"tone": 'plain "ü🦆"\n%}'}, "words": [1, 2.5]}


def test_arguments_reach_prompts_and_demonstrations_alike(chatml_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "asking.jinja"
    file.write_text("{{ style.tone }}: " + ASKING)
    template = load_template(chatml_folder, chat_template=file, arguments=CHOSEN)
    start = 'plain "ü🦆"\n%}: <|im_start|>user\nwhat is 2 plus 2?<|im_end|>\n'
    prompt = template.renderer.render([USER], add_generation_prompt=True)
    assert prompt == f"{start}<|im_start|>assistant\nquick: {CHOSEN['style']['tone']}2.5"
    answered = template.renderer.render([USER, ANSWER], add_generation_prompt=False)
    assert answered == f"{start}<|im_start|>assistant\nThe answer is 4.<|im_end|>\n"


def test_the_exported_template_has_the_arguments_as_defaults(chatml_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(chatml_folder, folder)
    (folder / "chat_template.jinja").write_text(ASKING)
    template = load_template(folder, arguments=CHOSEN)
    assert template.exported is not None
    (folder / "chat_template.jinja").write_text(template.exported)
    auto: Any = AutoTokenizer.from_pretrained(folder)
    ids = auto.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert tuple(ids) == template.prompt_ids([USER])
    asked = auto.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert "quick" not in asked
    assert load_template(folder).exported is None
    assert with_jinja(folder, tmp_path, ASKING).exported == ASKING


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            {"enable_thinkin": False},
            r"given.jinja\) does not read `enable_thinkin`; did you mean `enable_thinking`",
        ),
        ({"xyz": 1}, "does not read `xyz`; it reads enable_thinking, style, words"),
        ({"messages": []}, "`messages` cannot be set here"),
        ({"eos_token": "x"}, "`eos_token` cannot be set here"),
    ],
)
def test_arguments_that_the_template_does_not_read(
    arguments: dict, reason: str, chatml_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "given.jinja"
    file.write_text(ASKING)
    with pytest.raises(ValueError, match=r"data\.template_arguments: .*" + reason):
        load_template(chatml_folder, chat_template=file, arguments=arguments)


def test_a_tokenizer_file_that_cuts_or_pads_does_neither_here(chatml_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chatml_folder, tmp_path / "cutting")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text()) | {
        "truncation": {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        "padding": {
            **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"},
        },
    }
    file.write_text(json.dumps(content))
    messages = [{"role": "user", "content": "What is 12 + 7?"}, {"role": "assistant", "content": "19"}]
    expected = load_template(chatml_folder)
    cutting = load_template(folder)
    assert cutting.prompt_ids(messages[:1]) == expected.prompt_ids(messages[:1])
    assert cutting.demonstration(messages) == expected.demonstration(messages)
    text = expected.renderer.render(messages, add_generation_prompt=False)
    whole = expected.tokenizer(text.rstrip(), add_special_tokens=False).input_ids
    assert list(expected.demonstration(messages)[0]) == whole
