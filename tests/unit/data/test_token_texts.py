"""The tokens that the template wrote equal lists that are written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.data.observed import Observed
from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.data.token_texts import RenderedTokens, rendered_tokens, token_texts
from megatron_chord.records import Message

USER: Message = {"role": "user", "content": "2+2 in é or 🦆?"}
ANSWER: Message = {"role": "assistant", "content": "The answer is 4."}


def rendered(template: ChatTemplate, *messages: Message) -> RenderedTokens:
    token_ids, trainable = template.demonstration(messages)
    return rendered_tokens(
        template,
        Observed(
            file="f", number=1, messages=messages, token_ids=token_ids, trainable=trainable, is_overlong=False
        ),
    )


def runs(found: RenderedTokens) -> list[tuple[str, str]]:
    """Join neighbouring tokens of the same kind: t is trained, m is a message's text."""
    joined: list[tuple[str, str]] = []
    for token in found.tokens:
        kind = ("t" if token.is_trained else "-") + ("-" if token.is_template else "m")
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + token.text)
        else:
            joined.append((kind, token.text))
    return joined


def test_a_conversation_falls_into_the_template_s_text_and_the_messages(chatml: ChatTemplate) -> None:
    found = rendered(chatml, {"role": "system", "content": "Be short."}, USER, ANSWER)
    assert found.rewritten == ()
    assert runs(found) == [
        ("--", "<|im_start|>system\n"),
        ("-m", "Be short."),
        ("--", "<|im_end|>\n<|im_start|>user\n"),
        ("-m", USER["content"]),
        ("--", "<|im_end|>\n<|im_start|>assistant\n"),
        ("tm", ANSWER["content"]),
        ("t-", "<|im_end|>"),
    ]


def test_text_that_the_template_adds_to_an_answer_is_shown_as_trained(
    chatml_folder: Path, tmp_path: Path
) -> None:
    jinja = tmp_path / "adds.jinja"
    jinja.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}Solution:\n"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = rendered(load_template(chatml_folder, chat_template=jinja), USER, ANSWER)
    assert runs(found)[-3:] == [
        ("t-", "Solution:\n"),
        ("tm", ANSWER["content"]),
        ("t-", "<|im_end|>"),
    ]


def test_a_message_that_the_template_changes_is_named(chatml_folder: Path, tmp_path: Path) -> None:
    jinja = tmp_path / "drops.jinja"
    jinja.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | replace('please ', '') }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = load_template(chatml_folder, chat_template=jinja)
    found = rendered(template, {"role": "user", "content": "please add 2 and 2"}, ANSWER)
    assert found.rewritten == (0,)
    assert runs(found)[0] == ("--", "<|im_start|>user\nadd 2 and 2<|im_end|>\n<|im_start|>assistant\n")
    assert runs(found)[-2:] == [("tm", ANSWER["content"]), ("t-", "<|im_end|>")]


def test_a_prompt_has_no_trained_token(chatml: ChatTemplate) -> None:
    token_ids = chatml.prompt_ids([USER])
    seen = Observed(file="f", number=1, messages=(USER,), token_ids=token_ids, truth="4", is_overlong=False)
    assert runs(rendered_tokens(chatml, seen)) == [
        ("--", "<|im_start|>user\n"),
        ("-m", USER["content"]),
        ("--", "<|im_end|>\n<|im_start|>assistant\n"),
    ]


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_the_texts_of_the_tokens_are_the_text(name: str, request: pytest.FixtureRequest) -> None:
    template: ChatTemplate = request.getfixturevalue(name)
    text = "Question 7: what is 7 plus 21?\nAnswer: 28"
    if name == "chatml":  # tokens are bytes, so every character exists
        text += " é 🦆 漢字, e\u0301 and a broken \ufffd end 🦆"
    ids = template.tokenizer(text, add_special_tokens=False).input_ids
    texts = token_texts(template, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    cut = token_texts(template, ids[:-1])  # in the middle of the last character
    assert len(cut) == len(ids) - 1
    assert cut[:-4] == texts[:-5]


def test_an_answer_of_one_word_is_not_looked_for_in_the_question(chatml: ChatTemplate) -> None:
    found = rendered(chatml, {"role": "user", "content": "4 or 5?"}, replace_content(ANSWER, "4"))
    assert runs(found)[-2:] == [("tm", "4"), ("t-", "<|im_end|>")]
    assert ("-m", "4 or 5?") in runs(found)


def replace_content(message: Message, content: str) -> Message:
    return {**message, "content": content}
