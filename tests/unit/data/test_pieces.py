from __future__ import annotations

import pytest

from megatron_chord.data.pieces import pieces
from megatron_chord.data.templates import ChatTemplate

TEXTS = ["The answer is 12.\nAnswer: 12", "π ≈ 3, 答案 🙂 done", "", "  two  spaces"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["chatml", "plain"])
def test_pieces_join_to_the_text_and_their_logprobs_to_the_sum(
    text: str, kind: str, request: pytest.FixtureRequest
) -> None:
    template: ChatTemplate = request.getfixturevalue(kind)
    ids = template.tokenizer(text, add_special_tokens=False).input_ids
    logprobs = [-0.25 * (index + 1) for index in range(len(ids))]
    found = pieces(template, ids, logprobs)
    assert "".join(piece for piece, _ in found) == template.decode_all(ids)
    assert sum(logprob for _, logprob in found) == pytest.approx(sum(logprobs))


def test_a_character_of_several_tokens_is_one_piece(chatml: ChatTemplate) -> None:
    ids = chatml.tokenizer("a🙂b", add_special_tokens=False).input_ids
    found = pieces(chatml, ids, [-1.0] * len(ids))
    assert [text for text, _ in found] == ["a", "🙂", "b"]
    assert [logprob for _, logprob in found] == [-1.0, -4.0, -1.0]


def test_bytes_that_are_no_character_end_a_piece(chatml: ChatTemplate) -> None:
    ids = chatml.tokenizer("🙂", add_special_tokens=False).input_ids[:2]
    (piece,) = pieces(chatml, ids, [-1.0, -2.0])
    assert piece[1] == -3.0


def test_control_tokens_are_shown(chatml: ChatTemplate) -> None:
    ids = chatml.prompt_ids([{"role": "user", "content": "hi"}])
    text = "".join(piece for piece, _ in pieces(chatml, ids, [0.0] * len(ids)))
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_control_token_after_half_a_character_is_a_piece_of_its_own(chatml: ChatTemplate) -> None:
    half = chatml.tokenizer("🙂", add_special_tokens=False).input_ids[:2]
    end = chatml.tokenizer("<|im_end|>", add_special_tokens=False).input_ids
    assert pieces(chatml, [*half, *end], [-1.0, -2.0, -4.0]) == [("\ufffd", -3.0), ("<|im_end|>", -4.0)]
