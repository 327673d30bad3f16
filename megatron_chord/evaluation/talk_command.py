"""The commands `generate` and `chat`: their input, output and exit codes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_chord.evaluation.talk import (
    Overrides,
    Reply,
    ServedPolicy,
    TalkPolicy,
    open_policy_to_talk,
    prompts_of,
    serve_policy,
)
from megatron_chord.records import Message, Prompt
from megatron_chord.rollout.auth import KEY_VARIABLE
from megatron_chord.rollout.replies import RolloutError
from megatron_chord.rollout.server import ServerError

HELP = "/new starts a new conversation, /quit or Ctrl-D ends the program"


def talk_command(args: argparse.Namespace) -> int:
    """Run `generate` or `chat`. Returns 0, 1 if a server failed, or 2 if refused before a server was started."""
    # Leave through the finally blocks, which stop the server.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    key = os.environ.get(KEY_VARIABLE, "")
    if args.server and not key:
        return _refuse(f"--server: set {KEY_VARIABLE} to the key that the server asks for")
    overrides = Overrides(
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        system_prompt=args.system,
        tensor=args.tensor,
        seed=args.seed,
    )
    try:
        with open_policy_to_talk(args.policy, overrides, say=_note) as policy:
            asks = args.command == "generate"
            prompts = prompts_of(args.prompts, policy) if asks else []
            if asks:
                _check_request(args, policy)
            with serve_policy(policy, say=_note, servers=args.server, server_key=key) as served:
                if asks:
                    _write_answers(prompts, served.answers(prompts, samples=args.samples), args.output)
                else:
                    chat(served, _read_line, print, note=_note)
    except ValueError as error:
        return _refuse(str(error))
    except (RolloutError, ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def chat(
    served: ServedPolicy,
    read: Callable[[], str | None],
    say: Callable[[str], None],
    *,
    note: Callable[[str], None],
) -> None:
    """Answer messages until ``read`` returns None. If a message cannot be answered, say why and drop it.

    ``note`` gets one message, before the first answer: a server that has just started needs longer for it.
    """
    say(HELP)
    is_first = True
    messages: list[Message] = []
    while (line := read()) is not None:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/new":
            messages = []
            say("a new conversation")
            continue
        if not text:
            continue
        asked = [*messages, {"role": "user", "content": text}]
        if is_first:
            note("waiting for the first answer, which takes longer than later ones")
            is_first = False
        try:
            reply = served.reply(asked)
        except ValueError as error:
            say(f"error: {error}. {HELP}")
            continue
        say(_shown(reply))
        messages = [*asked, {"role": "assistant", "content": reply.text}]


def _check_request(args: argparse.Namespace, policy: TalkPolicy) -> None:
    """Raises ValueError if all answers to a prompt would be equal, or if they could not be written."""
    if policy.temperature == 0 and args.samples > 1:
        raise ValueError(
            f"--samples {args.samples} at temperature 0 would be the same answer {args.samples} times: set "
            "--temperature"
        )
    output = args.output
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        reason = "is a folder" if output.is_dir() else f"cannot be written: {output.parent} is not a folder"
        raise ValueError(f"--output: {output} {reason}")


def _write_answers(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[Reply]], output: Path | None
) -> None:
    if output is None:
        for prompt, group in zip(prompts, answers, strict=True):
            print(f"--- {prompt.id}: {prompt.messages[-1]['content']}")
            print("\n---\n".join(map(_shown, group)), end="\n\n")
        return
    rows = [
        {
            "id": prompt.id,
            "sample": sample,
            "messages": list(prompt.messages),
            "response": reply.text,
            "response_tokens": reply.num_tokens,
            "truncated": reply.is_cut_off,
        }
        for prompt, group in zip(prompts, answers, strict=True)
        for sample, reply in enumerate(group)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    output.write_text(text, encoding="utf-8")
    print(f"{len(rows)} answers in {output}")


def _shown(reply: Reply) -> str:
    return f"{reply.text}\n[cut off after {reply.num_tokens} tokens]" if reply.is_cut_off else reply.text


def _read_line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
