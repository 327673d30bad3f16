"""Graded answers as the rows of a file in ``samples/``, for people and for the HTML report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_chord.data.pieces import pieces
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.records import GradedRollouts

MOST_TOKENS = 4096
"""Maximum number of tokens of a file that are written one by one, with log-probs. Decoding one takes about 10 us."""


def sample_rows(graded: Sequence[GradedRollouts], template: ChatTemplate) -> list[dict[str, Any]]:
    """One row for each answer.

    The first row of a prompt also has ``rendered_prompt``, the text after the chat template. Rows of the first prompts
    have ``tokens``, pairs of text and log-prob, as long as these are ``MOST_TOKENS`` together.
    """
    rows: list[dict[str, Any]] = []
    left = MOST_TOKENS
    for item in graded:
        of_prompt = _rows(item)
        of_prompt[0]["rendered_prompt"] = template.decode_all(item.prompt.token_ids)
        left -= sum(len(rollout.token_ids) for rollout in item.rollouts)
        if left >= 0:
            for row, rollout in zip(of_prompt, item.rollouts, strict=True):
                row["tokens"] = pieces(template, rollout.token_ids, rollout.logprobs)
        rows += of_prompt
    return rows


def _rows(item: GradedRollouts) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": item.prompt.id,
            "prompt": item.prompt.messages[-1]["content"],
            "truth": item.prompt.truth,
            "response": text,
            "score": grade.score,
            "reward": reward,
            **({"reward_terms": dict(grade.parts)} if grade.parts else {}),
            "grader_error": grade.error,
            "num_prefix_tokens": len(item.prefix),
            "num_tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            "weight_version": rollout.weight_version,
            "weight_spans": rollout.all_spans,
            "mean_logprob": math.fsum(rollout.logprobs) / max(len(rollout.logprobs), 1),
        }
        for rollout, text, grade, reward in zip(
            item.rollouts, item.texts, item.grades, item.rewards, strict=True
        )
    ]
