"""Answers of a policy to a person: the functions behind `megatron-chord generate` and `megatron-chord chat`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_chord.config import RunConfig
from megatron_chord.config_suite import ServerConfig
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.evaluation.policy import hf_folder, run_of
from megatron_chord.evaluation.servers import ListedServers, Servers, own_servers
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.processes import PrivateFolder
from megatron_chord.records import Message, Prompt, Rollout
from megatron_chord.rewards.response import RowNeeds
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.replies import GenerateRequest, RolloutError
from megatron_chord.sampling.rounds import sample_seed
from megatron_chord.weights.folder import check_copies, open_model

PROMPT_TOKENS, RESPONSE_TOKENS = 2048, 1024
"""Default limits for a policy that belongs to no run, in tokens."""
_AT_ONCE_GPU, _AT_ONCE_CPU = 256, 16
"""Number of requests that a server gets at a time."""


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The options of the user. An option that is None has the value of the policy's run, or else a default."""

    temperature: float | None = None
    """Sampling temperature. 0: always the most likely token. The default is 1."""
    max_tokens: int | None = None
    """Longest answer, in tokens."""
    system_prompt: str | None = None
    """System prompt for conversations that have no system message. An empty text: none."""
    tensor: int = 1
    """Number of GPUs of the server that is started."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The policy's answer to a conversation."""

    text: str
    num_tokens: int
    is_cut_off: bool
    """True if the answer reached the limit of tokens."""


@dataclass(frozen=True, kw_only=True)
class TalkPolicy:
    """A policy that is not on a server yet, with its template, sampling settings and limits."""

    folder: Path
    """Hugging Face folder."""
    shape: ModelShape
    template: ChatTemplate
    temperature: float
    max_tokens: int
    max_length: int
    """Largest number of tokens of a prompt and its answer together."""
    server: ServerConfig
    seed: int

    @property
    def max_prompt_tokens(self) -> int:
        return self.max_length - self.max_tokens


@dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """A policy on servers that are ready to answer."""

    policy: TalkPolicy
    clients: Sequence[RolloutClient]
    version: int | None
    """Version of the weights on the servers."""

    def answers(self, prompts: Sequence[Prompt], *, samples: int) -> list[list[Reply]]:
        """``samples`` answers to each prompt. The id of a prompt determines the seed of its answers.

        Raises:
            RolloutError: a server failed.
        """
        requests = [
            self._request(prompt.token_ids, prompt.id, sample)
            for prompt in prompts
            for sample in range(samples)
        ]
        rollouts = self._sampled(requests)
        replies = [self._reply(request, rollout) for request, rollout in zip(requests, rollouts, strict=True)]
        return [replies[first : first + samples] for first in range(0, len(replies), samples)]

    def reply(self, messages: Sequence[Message]) -> Reply:
        """The answer to a conversation, which ends with the user's message.

        Raises:
            ValueError: the conversation is too long, or the template refuses it.
            RolloutError: the server failed.
        """
        prompt = self.policy.template.prompt_ids(messages)
        room = self.policy.max_length - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, and the limit is {self.policy.max_length} with the answer"
            )
        request = self._request(prompt, "chat", len(messages), max_tokens=min(room, self.policy.max_tokens))
        return self._reply(request, self._sampled([request])[0])

    def _request(
        self, prompt: Sequence[int], name: str, sample: int, *, max_tokens: int | None = None
    ) -> GenerateRequest:
        return GenerateRequest(
            prompt_ids=tuple(prompt),
            num_rollouts=1,
            seed=sample_seed(self.policy.seed, name, sample),
            temperature=self.policy.temperature,
            max_tokens=max_tokens or self.policy.max_tokens,
            stop_token_ids=self.policy.template.stop_token_ids,
        )

    def _sampled(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        found: dict[int, Rollout] = {}
        waiting = iter(list(enumerate(requests)))

        def on_answer(number: int, rollouts: tuple[Rollout, ...] | None) -> None:
            if rollouts is None:
                raise RolloutError(f"an answer took longer than {self.policy.server.request_s:.0f} s")
            found[number] = rollouts[0]

        def serve(client: RolloutClient) -> None:
            client.generate_each(
                lambda: next(waiting, None),  # one step of a list's iterator is atomic
                version=self.version,
                at_once=_AT_ONCE_GPU if torch.cuda.is_available() else _AT_ONCE_CPU,
                deadline_s=self.policy.server.request_s,
                on_answer=on_answer,
            )

        with ThreadPoolExecutor(len(self.clients)) as pool:
            list(pool.map(serve, self.clients))
        return [found[number] for number in range(len(requests))]

    def _reply(self, request: GenerateRequest, rollout: Rollout) -> Reply:
        return Reply(
            text=self.policy.template.turn(request.prompt_ids, rollout.token_ids),
            num_tokens=len(rollout.token_ids),
            is_cut_off=rollout.finish_reason == "length",
        )


@contextlib.contextmanager
def open_policy_to_talk(
    source: Path, overrides: Overrides, *, say: Callable[[str], None]
) -> Iterator[TalkPolicy]:
    """Open the policy ``source``: a Hugging Face folder, or checkpoints/step-N of a run.

    A checkpoint is converted to a temporary folder.

    Raises:
        ValueError: ``source`` or an option cannot be used.
    """
    with contextlib.closing(PrivateFolder(Path(tempfile.gettempdir()))) as temporary:
        folder = hf_folder(source, temporary.path / "policy", say)
        shape = read_shape(folder)
        check_copies(open_model(folder, shape.weights), shape.weights)
        run = run_of(source) if folder != source or source.resolve().name == "policy" else None
        template = load_template(
            folder,
            # The template of an exported policy already contains the template and the arguments of its run.
            chat_template=run.data.chat_template if run is not None and folder != source else None,
            arguments=run.data.template_arguments if run is not None and folder != source else None,
            system_prompt=_system_prompt(run, overrides),
            vocab_size=shape.vocab_size,
            tools_as=run.data.tools_as if run is not None else "auto",
        )
        max_tokens, max_length = _limits(run, overrides, shape.max_positions)
        yield TalkPolicy(
            folder=folder,
            shape=shape,
            template=template,
            temperature=_temperature(run, overrides),
            max_tokens=max_tokens,
            max_length=max_length,
            server=ServerConfig(count=1, tensor=overrides.tensor, dtype=_dtype(run)),
            seed=overrides.seed,
        )


@contextlib.contextmanager
def serve_policy(
    policy: TalkPolicy, *, say: Callable[[str], None], servers: Sequence[str] = (), server_key: str = ""
) -> Iterator[ServedPolicy]:
    """Put ``policy`` on a server that is started here, or on running servers. Main thread only.

    Args:
        servers: URLs of running servers, which get the policy's weights.
        server_key: the API key of these servers.

    Raises:
        ServerError: a server is not ready in time, or does not load the weights.
    """
    settings = policy.server
    with contextlib.closing(PrivateFolder(Path(tempfile.gettempdir()))) as logs:
        chosen: Servers
        if servers:
            chosen = ListedServers(
                servers,
                server_key,
                policy.folder,
                policy.shape,
                silence_s=settings.silence_s,
                push_s=settings.start_s,
            )
        else:
            chosen = own_servers(
                policy.folder, settings, max_model_len=policy.max_length, logs=logs.path, say=say
            )
        try:
            yield ServedPolicy(policy=policy, clients=chosen.connect(), version=chosen.version)
        finally:
            chosen.close()


def prompts_of(path: Path, policy: TalkPolicy) -> list[Prompt]:
    """The prompts of a data file (docs/data.md; truths are not needed), or of a text file with one prompt per line.

    Raises:
        ValueError: the file cannot be read, or a prompt is too long or refused by the template.
    """
    if path.suffix != ".txt":
        return load_prompts(
            path,
            policy.template,
            max_prompt_tokens=policy.max_prompt_tokens,
            overlong="fail",
            needs=lambda source: RowNeeds(truth=False),
        )[0]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    numbered = enumerate(lines, start=1)
    found = [_prompt_of_line(path, number, line, policy) for number, line in numbered if line.strip()]
    if not found:
        raise ValueError(f"{path}: there is no prompt in it; expected one prompt per line")
    return found


def _prompt_of_line(path: Path, number: int, line: str, policy: TalkPolicy) -> Prompt:
    messages = policy.template.conversation([{"role": "user", "content": line}])
    try:
        token_ids = policy.template.prompt_ids(messages)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from error
    if len(token_ids) > policy.max_prompt_tokens:
        raise ValueError(
            f"{path}:{number}: {len(token_ids)} prompt tokens, the limit is {policy.max_prompt_tokens}"
        )
    return Prompt(id=str(number), messages=messages, truth="", token_ids=token_ids)


def _system_prompt(run: RunConfig | None, overrides: Overrides) -> str | None:
    if overrides.system_prompt is not None:
        return overrides.system_prompt or None
    return None if run is None else run.data.system_prompt


def _temperature(run: RunConfig | None, overrides: Overrides) -> float:
    if overrides.temperature is not None:
        return overrides.temperature
    return 1.0 if run is None else run.rollout.temperature


def _limits(run: RunConfig | None, overrides: Overrides, max_positions: int) -> tuple[int, int]:
    """The largest number of tokens of an answer, and of a prompt and its answer together.

    Raises ValueError if they leave no token for a prompt.
    """
    prompt = PROMPT_TOKENS if run is None else run.data.max_prompt_tokens
    answer = RESPONSE_TOKENS if run is None else run.data.max_response_tokens
    if run is None and max_positions < prompt + answer:
        prompt, answer = max_positions - max_positions // 3, max_positions // 3
    answer = overrides.max_tokens or answer
    if answer >= max_positions:
        raise ValueError(
            f"--max-tokens {answer} leaves no token for a prompt: the policy has {max_positions} positions"
        )
    return answer, min(max_positions, prompt + answer)


def _dtype(run: RunConfig | None) -> Literal["fp32", "bf16"]:
    return "bf16" if run is None else run.rollout.dtype or run.model.dtype
