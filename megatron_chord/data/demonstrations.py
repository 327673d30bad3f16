"""Reads demonstrations: each row gives one Demonstration, in which the answer's tokens are marked as trainable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_chord.data.layouts import Reading, load_rows
from megatron_chord.data.observed import Observe, Observed
from megatron_chord.data.rows import (
    LoadReport,
    Row,
    RowError,
    only_one_of,
    row_id,
    text_field,
)
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.data.tools import conversation
from megatron_chord.records import Compact, Demonstration, Message


def load_demonstrations(  # noqa: PLR0913
    data: Path | Sequence[Path],
    template: ChatTemplate,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    overlong: Literal["fail", "drop"],
    fields: Mapping[str, str] | None = None,
    max_dropped: float = 0.0,
    source: str = "",
    observe: Observe | None = None,
) -> tuple[list[Demonstration], LoadReport]:
    """The demonstrations of a file, of a folder or pattern of files, or of a list of these, in their order.

    A row has `messages` that end with the assistant's, or a `problem` (`question`, `prompt`) and a `solution`
    (`response`) as text. An `id` and `tools` (`functions`) are optional; tools are shown as in a prompt
    (`data.tools`). Rows in the layouts of `data.layouts` are read, too. The report names the layouts and unused
    fields. ``fields`` says where a row has what is read (``data.layouts.Reading.mapping``). ``source`` is the name
    that the demonstrations carry. ``observe`` is called for each row. Trainable tokens count as response, the others
    as prompt. A demonstration is never truncated, because a truncated one would not train how to end an answer.

    Raises:
        DataError: faulty rows, all listed, among them those without a trainable token; over-long rows under
            ``overlong="fail"``; or no row left.
    """
    seen: dict[str, str] = {}
    reading = Reading("demonstrations", fields or {})

    def parse(row: Row) -> tuple[Row, str, tuple[Message, ...], Any]:
        asked = conversation(row, template)
        reading.tools_shown.add(asked.tools_shown)
        messages = _demonstrated_messages(row, asked.messages)
        return row, row_id(row, seen), messages, asked.tools

    def tokenise(parsed: tuple[Row, str, tuple[Message, ...], Any]) -> tuple[Any, ...]:
        row, identity, messages, tools = parsed
        token_ids, trainable = template.demonstration(messages, tools=tools)
        return row, identity, messages, Compact(token_ids, np.int32), Compact(trainable, np.bool_)

    def keep(tokenised: tuple[Any, ...]) -> Demonstration | None:
        row, identity, messages, token_ids, trainable = tokenised
        num_response = trainable.count(True)
        num_prompt = len(token_ids) - num_response
        if num_response == 0:
            raise RowError("no token of the demonstration is trainable")
        is_overlong = num_prompt > max_prompt_tokens or num_response > max_response_tokens
        if observe is not None:
            observe(
                Observed(
                    source=source,
                    file=row.file,
                    number=row.number,
                    messages=messages,
                    token_ids=token_ids,
                    trainable=trainable,
                    is_overlong=is_overlong,
                )
            )
        if is_overlong:
            if overlong == "fail":
                raise RowError(
                    f"{num_prompt} prompt and {num_response} response tokens, max_prompt_tokens is "
                    f"{max_prompt_tokens} and max_response_tokens {max_response_tokens}"
                )
            return None
        return Demonstration(id=identity, token_ids=token_ids, trainable=trainable, source=source)

    return load_rows(
        data,
        reading,
        parse,
        tokenise,
        keep,
        limits=f"{max_prompt_tokens} prompt or {max_response_tokens} response tokens",
        max_dropped=max_dropped,
    )


def _demonstrated_messages(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if "messages" not in row.fields:
        response = text_field(row, only_one_of(row, ("solution", "response")))
        return (*messages, {"role": "assistant", "content": response})
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"messages[{len(row.fields['messages']) - 1}] is the last message of a demonstration, so it must be the "
            f"assistant's, got {messages[-1]['role']}'s"
        )
    return messages
