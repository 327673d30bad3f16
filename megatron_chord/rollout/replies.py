"""Reads vLLM's replies to ``/inference/v1/generate`` and checks them.

A reply is JSON of about 140 bytes a token. msgspec reads only the fields that are needed, straight into typed objects:
`benchmarks/coordinator.py` compares it with Python's own parser.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from megatron_chord.records import Rollout, Span
from megatron_chord.rollout.route_store import REFERENCE
from megatron_chord.routes import KeptRoutes, RemoteRoutes, Routes, RouteShape

NEVER_PUSHED = "default"
"""vLLM's name for the weights that a server was started with."""
_WORST_LOGPROB = -9999.0
"""vLLM sends this value instead of a log-prob that is NaN, minus infinity or missing."""


class RolloutError(RuntimeError):
    """The server could not be reached, refused the request, or sent a reply that is not a valid rollout."""


class StaleWeights(RolloutError):
    """Tokens were sampled by another weight version than the expected one."""


class Transient(RolloutError):
    """A failure after which the request is sent again."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt to sample `num_rollouts` times. A rollout ends only at one of `stop_token_ids` or at `max_tokens`."""

    prompt_ids: tuple[int, ...]
    num_rollouts: int
    seed: int
    temperature: float
    """0 means greedy decoding. Log-probs are then those at temperature 1, and all rollouts are equal."""
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    routes: RouteShape | None = None
    """The shape of the routes to keep; None: routes in the reply are ignored. A server returns routes only if it was
    started with ``ServerSettings.routes``."""
    keep_routes_for: int | None = None
    """The step for which a server that can (``rollout.route_store``) keeps the routes, so that the reply has only a
    reference to them. None: the reply brings the routes."""
    first_routed: int = 0
    """The first token of `prompt_ids` whose route is wanted."""

    @property
    def num_to_sample(self) -> int:
        """The number of rollouts to request. vLLM refuses n > 1 at temperature 0, where all rollouts are equal."""
        return 1 if self.temperature == 0 else self.num_rollouts


class AcceptedVersions(NamedTuple):
    """The accepted weight versions: ``version``, and with ``may_advance`` also later ones.

    ``version`` None accepts the weights that the server was started with, before any push.
    """

    version: int | None
    may_advance: bool = False

    def admits(self, version: str) -> bool:
        if self.version is None:
            return version == NEVER_PUSHED
        if not self.may_advance:
            return version == str(self.version)
        return version.isdecimal() and int(version) >= self.version

    def __str__(self) -> str:
        version = NEVER_PUSHED if self.version is None else self.version
        return f"{version}{' or later' if self.may_advance else ''}"


class VersionSpan(msgspec.Struct, frozen=True):
    """Tokens ``start`` to ``end`` (not included) were sampled by weight version ``version``."""

    version: str
    start: int
    end: int


class _Entry(msgspec.Struct, gc=False):
    token_id: int
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Entry]


class _Choice(msgspec.Struct):
    index: int
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "abort"]
    logprobs: _Logprobs | None = None
    weight_versions: list[VersionSpan] | None = None
    routed_experts: bytes | None = None
    """An .npy file (vllm/utils/serial_utils.py, numpy2base64) or a reference (``rollout.route_store``), in base64."""


class _Reference(msgspec.Struct):
    store: str
    key: str
    shape: tuple[int, int, int]
    dtype: Literal["uint8", "uint16"]
    checksum: int


class _Reply(msgspec.Struct):
    prompt_token_ids: list[int]
    choices: list[_Choice]


_DECODER = msgspec.json.Decoder(_Reply)


def rollouts_of(
    content: bytes,
    request: GenerateRequest,
    accepted: AcceptedVersions,
    *,
    may_be_aborted: bool,
    url: str = "",
) -> tuple[Rollout, ...]:
    """Parse and check the reply to `request`, which is JSON. It came from the server at `url`.

    Raises:
        ValueError: it is not a valid reply to `request`.
        StaleWeights: another weight version sampled a token.
        Transient: a rollout was aborted.
    """
    reply = _DECODER.decode(content)
    if reply.prompt_token_ids != list(request.prompt_ids):
        raise ValueError("the reply is to another prompt")
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    num_expected = request.num_to_sample
    if [choice.index for choice in choices] != list(range(num_expected)):
        raise ValueError(f"{len(choices)} rollouts instead of {num_expected}")
    rollouts = tuple(_rollout_of(choice, request, accepted, url) for choice in choices)
    if not may_be_aborted and any(rollout.finish_reason == "abort" for rollout in rollouts):
        raise Transient("a rollout was aborted")
    return rollouts * (request.num_rollouts // num_expected)


def _rollout_of(choice: _Choice, request: GenerateRequest, accepted: AcceptedVersions, url: str) -> Rollout:
    token_ids, reason = choice.token_ids, choice.finish_reason
    least = 0 if reason == "abort" else 1
    if not least <= len(token_ids) <= request.max_tokens:
        raise ValueError(f"a rollout of {len(token_ids)} tokens")
    if not token_ids:
        return Rollout(token_ids=(), logprobs=(), finish_reason=reason, weight_version=accepted.version or 0)
    if (reason == "stop") != (token_ids[-1] in request.stop_token_ids):
        raise ValueError(f"a rollout with finish_reason {reason!r} ends in token {token_ids[-1]}")
    content = choice.logprobs.content if choice.logprobs is not None else []
    if [entry.token_id for entry in content] != token_ids:
        raise ValueError(f"log-probs of {len(content)} other tokens than the {len(token_ids)} sampled")
    logprobs = tuple([entry.logprob for entry in content])
    check_logprobs(logprobs)
    spans = checked_spans(choice.weight_versions or [], len(token_ids), accepted)
    return Rollout(
        token_ids=tuple(token_ids),
        logprobs=logprobs,
        finish_reason=reason,
        weight_version=min(version for version, _ in spans),
        spans=spans if len(spans) > 1 else (),
        routes=_routes_of(choice, request, url),
    )


def _routes_of(choice: _Choice, request: GenerateRequest, url: str) -> Routes | None:
    """The routes of the tokens from ``first_routed`` to the last but one."""
    if request.routes is None:
        return None
    if choice.routed_experts is None:
        if request.routes.is_required:
            raise RolloutError(
                "the reply has no routes (rollout.router_replay: true): start the server with "
                "--enable-return-routed-experts"
            )
        return None
    num_tokens = len(request.prompt_ids) + len(choice.token_ids) - 1 - request.first_routed
    if choice.routed_experts.startswith(REFERENCE):
        return _kept_routes(choice.routed_experts, request.routes, num_tokens, url)
    routes = _array_of(choice.routed_experts)
    request.routes.check(routes, num_tokens)
    return routes


def _kept_routes(reference: bytes, shape: RouteShape, num_tokens: int, url: str) -> RemoteRoutes:
    """The routes to which the server refers. Whoever reads them checks them."""
    found = msgspec.json.decode(reference.removeprefix(REFERENCE), type=_Reference)
    wanted = (num_tokens, shape.layers, shape.chosen)
    if found.shape != wanted:
        raise ValueError(f"routes of shape {found.shape} and type {found.dtype} instead of {wanted}")
    return RemoteRoutes.of(
        KeptRoutes(
            url=url,
            store=found.store,
            key=found.key,
            num_tokens=num_tokens,
            dtype=found.dtype,
            checksum=found.checksum,
            shape=shape,
        )
    )


def _array_of(npy: bytes) -> np.ndarray:
    """The array of an .npy file, which cannot be written to. NumPy's own reading copies it in small pieces.

    Raises:
        ValueError: it is no such file, or its array is not plain numbers in C order.
    """
    file = io.BytesIO(npy)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array in another version of .npy than 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran:
        raise ValueError("an array in Fortran order")
    return np.frombuffer(npy, dtype, offset=file.tell()).reshape(shape)


def check_logprobs(logprobs: Sequence[float]) -> None:
    """Raise ValueError if a log-prob is not finite, is above 0, or is vLLM's value for a missing one."""
    for logprob in logprobs:
        if not _WORST_LOGPROB < logprob <= 1e-3 or not math.isfinite(logprob):
            raise ValueError(f"a log-prob of {logprob}")


def checked_spans(
    spans: Sequence[VersionSpan], num_tokens: int, accepted: AcceptedVersions
) -> tuple[Span, ...]:
    """Return the weight version and the number of tokens of each span.

    Raises:
        StaleWeights: a version is not accepted.
        ValueError: the spans do not cover the tokens without gaps and overlaps.
    """
    wrong = {span.version for span in spans if not accepted.admits(span.version)}
    if wrong:
        raise StaleWeights(f"tokens sampled by weight version {', '.join(sorted(wrong))}, not {accepted}")
    bounds = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != bounds[:-1] or bounds[-1] != num_tokens:
        raise ValueError(f"weight versions {list(spans)} do not cover {num_tokens} tokens")
    return tuple((_number(span.version), span.end - span.start) for span in spans)


def _number(version: str) -> int:
    """Return the weight version as a number. It is 0 before any push."""
    return 0 if version == NEVER_PUSHED else int(version)
