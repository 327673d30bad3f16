"""Reads prompts: each row with a problem and its ground truth gives one Prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_chord.data.layouts import Reading, load_rows
from megatron_chord.data.observed import Observe, Observed
from megatron_chord.data.rows import (
    LoadReport,
    Row,
    RowError,
    row_id,
)
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.data.tools import conversation, has_truth, true_answer
from megatron_chord.records import Prompt
from megatron_chord.rewards.response import RowNeeds


def load_prompts(  # noqa: PLR0913
    data: Path | Sequence[Path],
    template: ChatTemplate,
    *,
    max_prompt_tokens: int,
    overlong: Literal["fail", "drop"],
    fields: Mapping[str, str] | None = None,
    max_dropped: float = 0.0,
    source: str = "",
    observe: Observe | None = None,
    needs: Callable[[str], RowNeeds] = lambda source: RowNeeds(),
) -> tuple[list[Prompt], LoadReport]:
    """The prompts of a file, of a folder or pattern of files, or of a list of these, in their order.

    A row has `messages` that end with the user's or a tool's, or a `problem`, `question` or `prompt` as text. It has
    `answer` or `truth` as text or number. An `id` is optional. A row with `tools` (or `functions`) is a row for tool
    use, whose answer (also: `ground_truth`) is a list of calls; see `data.tools`. Rows in the layouts of
    `data.layouts` are read, too. The report names the layouts, and the fields that were not used. ``fields`` maps the
    fields that are read to their places in a row (``data.layouts.Reading.mapping``). ``source`` is the name that the
    prompts carry. ``observe`` is called for each row. ``needs`` says what the reward reads of a source's rows. Without
    ``truth`` a row need not have a true answer; it is then "". With ``fields`` a prompt keeps all fields of its row.

    Raises:
        DataError: faulty rows, all listed; over-long rows under ``overlong="fail"``; or no row left.
    """
    needed = needs(source)
    seen: dict[str, str] = {}
    reading = Reading("prompts", fields or {})

    def parse(row: Row) -> tuple[Any, ...]:
        asked = conversation(row, template)
        reading.tools_shown.add(asked.tools_shown)
        last = asked.messages[-1]["role"]
        if last not in ("user", "tool"):
            raise RowError(
                f"messages[{len(row.fields['messages']) - 1}] is the last message of a prompt, so it must be the "
                f"user's or a tool's, got {last}'s"
            )
        truth = true_answer(row) if needed.truth or has_truth(row) else ""
        return row, row_id(row, seen), asked, truth

    def tokenise(parsed: tuple[Any, ...]) -> tuple[Any, ...]:
        asked = parsed[2]
        return *parsed, template.prompt_ids(asked.messages, tools=asked.tools)

    def keep(tokenised: tuple[Any, ...]) -> Prompt | None:
        row, identity, asked, truth, token_ids = tokenised
        is_overlong = len(token_ids) > max_prompt_tokens
        if observe is not None:
            observe(
                Observed(
                    source=source,
                    file=row.file,
                    number=row.number,
                    messages=asked.messages,
                    token_ids=token_ids,
                    truth=truth,
                    is_overlong=is_overlong,
                )
            )
        if is_overlong:
            if overlong == "fail":
                raise RowError(f"{len(token_ids)} prompt tokens, max_prompt_tokens is {max_prompt_tokens}")
            return None
        return Prompt(
            id=identity,
            messages=asked.messages,
            truth=truth,
            token_ids=token_ids,
            tools=asked.tools,
            source=source,
            fields=dict(row.given or row.fields) if needed.fields else {},
        )

    return load_rows(
        data,
        reading,
        parse,
        tokenise,
        keep,
        limits=f"{max_prompt_tokens} tokens",
        max_dropped=max_dropped,
    )
