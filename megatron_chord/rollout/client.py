"""Client of vLLM's HTTP interface: sends token ids, receives token ids and log-probs, and checks every reply.

A rollout that this module returns has one finite log-prob for each token. It was not aborted, except by the caller's
own ``Stop``. Every token was sampled by the weight version that the caller expects, or by a later one if the caller
allows that. A request contains its seed, so a request that failed can be sent again and returns the same tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import aiohttp
import httpx
import msgspec

from megatron_chord.records import Rollout
from megatron_chord.rollout.http_options import authorization, certificates, http_options
from megatron_chord.rollout.replies import (
    NEVER_PUSHED,
    AcceptedVersions,
    GenerateRequest,
    RolloutError,
    Transient,
    VersionSpan,
    check_logprobs,
    checked_spans,
    rollouts_of,
)
from megatron_chord.rollout.route_store import HEADER, LEFT_OUT, PATH, RELEASE
from megatron_chord.rollout.vllm_plugin import ABANDON

_GENERATE = "/inference/v1/generate"
_ABORT = "/inference/v1/abort_requests"
_ENGINE_ID = "generate-tokens-{}"
"""The id that vLLM's engine gives a request (entrypoints/scale_out/token_in_token_out/serving.py, serve_tokens)."""
_ABORT_AGAIN_S = 0.25
_METRICS = "/metrics"
_TOKENS = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total(?:{[^}]*})? (\S+)", re.MULTILINE)
_LOOK_S = 5.0
"""Seconds between two queries of how many tokens a server has computed."""
_REFUSED = 2
"""Number of refused queries in a row after which a server counts as ended."""
_MODEL = "policy"
_RETRY_PAUSE_S = 0.2
_SEED_STEP = 0x9E3779B97F4A7C15
_SEED_MASK = (1 << 62) - 1


PauseMode = Literal["abort", "wait", "keep"]


class Stop:
    """A one-time stop signal for calls of ``generate``: once called, these return the tokens that they have so far.

    It may be called from any thread and more than once; only the first call has an effect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._listeners: list[Callable[[], None]] = []

    def __call__(self) -> None:
        with self._lock:
            was_set, self._is_set = self._is_set, True
            listeners = [] if was_set else self._listeners
        for listener in listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Register ``listener``, to be called at the stop signal. If the signal was given already, call it now."""
        with self._lock:
            if not self._is_set:
                self._listeners.append(listener)
                return
        listener()


class RolloutClient:
    """Client of one server, usable from several threads. Its methods raise RolloutError. Times are in seconds."""

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        retries: int = 2,
        connect_timeout_s: float = 10.0,
        silence_s: float | None = None,
    ) -> None:
        """
        Args:
            silence_s: if a server has requests of ``generate`` but neither finishes one nor computes a token for this
                time, it counts as frozen, and ``generate`` raises RolloutError. It must be longer than any pause for a
                push of weights.
        """
        self.url = url.rstrip("/")
        self.api_key = api_key
        self._silence_s = silence_s
        self._retries = retries
        self._connect_timeout_s = connect_timeout_s
        # No keep-alive: the server closes idle connections, and a request that is sent at that moment would fail.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(**http_options(url, api_key), limits=limits)
        self._closed = False
        self._sampling: set[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = set()
        """Event loop and task of each running call of ``generate``."""

    def close(self) -> None:
        """Close the client, after ``cancel``."""
        self._closed = True
        self.cancel()
        self._http.close()

    def cancel(self) -> None:
        """End the calls of ``generate`` in other threads. They raise at once, and the server drops their requests."""
        for loop, task in list(self._sampling):
            _call_in(loop, task.cancel)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        version: int,
        deadline_s: float,
        may_advance: bool = False,
        on_answer: Callable[[int, tuple[Rollout, ...]], None] | None = None,
        stop: Stop | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """Sample all requests concurrently. The result has the order of `requests`.

        Args:
            version: the weight version that must have sampled every token.
            may_advance: true if weights may be pushed during the call (``pause(mode="keep")``). Later versions are
                then accepted, too.
            deadline_s: time limit for all requests together. The server aborts requests that are unfinished then.
            on_answer: called in this thread with the index of each request that is finished, and its rollouts; not for
                requests that were stopped. ``generate`` raises its exception.
            stop: when called, the server aborts these requests and no others. They return the tokens sampled so far,
                possibly none, with the finish reason `abort`.

        Raises:
            StaleWeights: another version sampled a token.
            RolloutError: a request failed after all retries, the time limit passed, or the client was closed.
        """
        accepted = AcceptedVersions(version, may_advance)
        try:
            return asyncio.run(self._generate(requests, accepted, deadline_s, on_answer, stop))
        except asyncio.CancelledError:
            raise RolloutError(f"{self.url}: the client was closed while it sampled") from None

    def generate_each(
        self,
        take: Callable[[], tuple[int, GenerateRequest] | None],
        *,
        version: int | None,
        at_once: int,
        deadline_s: float,
        on_answer: Callable[[int, tuple[Rollout, ...] | None], None],
    ) -> None:
        """Sample requests until there are no more, ``at_once`` of them at a time.

        Args:
            take: returns the next request with its number, or None if there is none. Called in this thread.
            version: the weight version that must have sampled every token; None: the weights of the server's start.
            deadline_s: time limit of one request. The server aborts a request that is unfinished then.
            on_answer: called in this thread with the number of each request and its rollouts, or None after the time
                limit.

        Raises:
            StaleWeights: another version sampled a token.
            RolloutError: a request failed for good, or the client was closed.
        """
        try:
            asyncio.run(self._generate_each(take, AcceptedVersions(version), at_once, deadline_s, on_answer))
        except asyncio.CancelledError:
            raise RolloutError(f"{self.url}: the client was closed while it sampled") from None

    def score(self, token_ids: Sequence[int], *, version: int, timeout_s: float = 60.0) -> list[float]:
        """The log-probs at temperature 1 of ``token_ids[1:]``, each conditioned on the tokens before it."""
        body = {
            "model": _MODEL,
            "token_ids": list(token_ids),
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "logprobs": 0},
        }
        reply = self._json(self._request("POST", _GENERATE, json=body, timeout_s=timeout_s))
        with _malformed_as_rollout_error(f"{self.url}{_GENERATE}"):
            spans = msgspec.convert(reply["choices"][0]["weight_versions"], list[VersionSpan])
            checked_spans(spans, 1, AcceptedVersions(version))
            entries = reply["prompt_logprobs"][1:]
            scores = [
                float(entry[str(token)]["logprob"])
                for token, entry in zip(token_ids[1:], entries, strict=True)
            ]
            check_logprobs(scores)
            return scores

    def health(self, *, timeout_s: float = 5.0) -> bool:
        """True if the server answers and reports that its engine is healthy."""
        try:
            return self._http.get("/health", timeout=timeout_s).status_code == 200
        except httpx.TransportError:
            return False

    def weight_version(self, *, timeout_s: float = 30.0) -> int | None:
        """Version of the last finished push; None if nothing was pushed since the server started."""
        reply = self._json(self._request("GET", "/weight_info", timeout_s=timeout_s))
        with _malformed_as_rollout_error(f"{self.url}/weight_info"):
            version = reply["weight_version"]
            return None if version == NEVER_PUSHED else int(version)

    def num_workers(self, *, timeout_s: float = 30.0) -> int:
        """Number of worker processes of the server: tensor-parallel size times data-parallel size."""
        reply = self._json(self._request("GET", "/get_world_size", timeout_s=timeout_s))
        with _malformed_as_rollout_error(f"{self.url}/get_world_size"):
            return int(reply["world_size"])

    def route_store(self, *, timeout_s: float = 30.0) -> str | None:
        """Name of the memory in which the server keeps routes (``rollout.route_store``); None if it keeps none."""
        try:
            reply = self._json(self._request("GET", PATH, timeout_s=timeout_s))
        except RolloutError:
            return None
        with _malformed_as_rollout_error(f"{self.url}{PATH}"):
            return str(reply["store"])

    def release_routes(self, *, through: int | None, timeout_s: float = 30.0) -> None:
        """Free the routes that the server keeps for steps up to ``through``; None: for all steps."""
        self._request("POST", RELEASE, json={"through": through}, timeout_s=timeout_s)

    def pause(self, *, mode: PauseMode = "wait", timeout_s: float = 600.0) -> None:
        """Pause sampling and drop all caches.

        Running requests are aborted ("abort"), finished first ("wait"), or continued after ``resume`` with the weights
        of that time ("keep"). New requests are queued.
        """
        self._request("POST", "/pause", params={"mode": mode, "clear_cache": "true"}, timeout_s=timeout_s)

    def resume(self, *, timeout_s: float = 30.0) -> None:
        """End a pause."""
        self._request("POST", "/resume", timeout_s=timeout_s)

    def sleep(self, *, level: Literal[1, 2] = 1, timeout_s: float = 300.0) -> None:
        """Free the server's GPU memory. Level 1 keeps the weights in main memory. Level 2 drops them, so that they must
        be pushed again."""
        self._request("POST", "/sleep", params={"level": str(level), "mode": "wait"}, timeout_s=timeout_s)

    def wake_up(self, *, tags: Sequence[Literal["weights", "kv_cache"]], timeout_s: float = 300.0) -> None:
        """Allocate the GPU memory again. Weights are pushed after waking "weights" and before waking "kv_cache"."""
        self._request("POST", "/wake_up", params={"tags": list(tags)}, timeout_s=timeout_s)

    def end_open_update(self, *, timeout_s: float) -> None:
        """End the weight update that a killed trainer has left open, if there is one.

        vLLM 0.32 refuses a new update while one is open. The server's weights may then be a mixture of old and new
        ones, so a whole update must follow.

        Args:
            timeout_s: for all requests together.
        Raises:
            RolloutError: the server does not respond, or the update is still open.
        """
        end = time.monotonic() + timeout_s

        def left() -> float:
            return max(end - time.monotonic(), 0.001)

        def release() -> None:
            # vLLM answers this with an error while an update is open. Otherwise it releases the earlier trainer.
            self._request("POST", "/shutdown_weight_transfer_engine", timeout_s=left())

        try:
            release()
        except RolloutError:
            with contextlib.suppress(RolloutError):
                self.update_weights(ABANDON, timeout_s=left())
            release()

    def init_weight_transfer(self, init_info: Mapping[str, Any], *, timeout_s: float) -> None:
        self._request(
            "POST", "/init_weight_transfer_engine", json={"init_info": init_info}, timeout_s=timeout_s
        )

    def start_weight_update(self, *, timeout_s: float) -> None:
        self._request("POST", "/start_weight_update", timeout_s=timeout_s)

    def update_weights(self, update_info: Mapping[str, Any], *, timeout_s: float) -> None:
        self._request("POST", "/update_weights", json={"update_info": update_info}, timeout_s=timeout_s)

    def finish_weight_update(self, version: int, *, timeout_s: float) -> None:
        self._request(
            "POST", "/finish_weight_update", json={"weight_version": str(version)}, timeout_s=timeout_s
        )

    def _request(self, method: str, path: str, *, timeout_s: float, **content: Any) -> httpx.Response:
        """Send a request once, without retries, because most of these requests change the server's state."""
        timeout = httpx.Timeout(timeout_s, connect=self._connect_timeout_s)
        try:
            response = self._http.request(method, path, timeout=timeout, **content)
        except httpx.TransportError as error:
            raise RolloutError(f"{method} {self.url}{path}: {type(error).__name__} {error}") from error
        if response.status_code != 200:
            raise RolloutError(
                f"{method} {self.url}{path}: {_refusal(response.status_code, response.content)}"
            )
        return response

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise RolloutError(f"{response.url}: the reply is not JSON: {response.text[:200]!r}") from error

    async def _generate(
        self,
        requests: Sequence[GenerateRequest],
        version: AcceptedVersions,
        deadline_s: float,
        on_answer: Callable[[int, tuple[Rollout, ...]], None] | None,
        stop: Stop | None,
    ) -> list[tuple[Rollout, ...]]:
        num_done = 0
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        stopped = asyncio.Event()
        running: set[str] = set()

        async def sample(http: aiohttp.ClientSession, index: int) -> tuple[Rollout, ...]:
            nonlocal num_done
            rollouts = await self._sample(http, requests[index], version, running, stopped)
            num_done += 1
            if on_answer is not None and all(rollout.finish_reason != "abort" for rollout in rollouts):
                on_answer(index, rollouts)
            return rollouts

        self._sampling.add((loop, task))
        if stop is not None:
            stop.listen(lambda: _call_in(loop, stopped.set))
        try:
            if self._closed:
                raise asyncio.CancelledError
            async with (
                asyncio.timeout(deadline_s),
                self._async_http() as http,
                asyncio.TaskGroup() as group,
            ):
                tasks = [group.create_task(sample(http, index)) for index in range(len(requests))]
                beside: list[asyncio.Task[None]] = []
                if stop is not None:
                    beside.append(group.create_task(self._abort(http, running, stopped)))
                if self._silence_s is not None:
                    beside.append(group.create_task(self._watch(http, self._silence_s, lambda: num_done)))
                if tasks:
                    await asyncio.wait(tasks)
                for task in beside:
                    task.cancel()
        except TimeoutError as error:
            raise RolloutError(
                f"{self.url}: {num_done} of {len(requests)} requests finished within {deadline_s:.0f} s"
            ) from error
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__
        finally:
            self._sampling.discard((loop, task))
        return [task.result() for task in tasks]

    async def _generate_each(
        self,
        take: Callable[[], tuple[int, GenerateRequest] | None],
        version: AcceptedVersions,
        at_once: int,
        deadline_s: float,
        on_answer: Callable[[int, tuple[Rollout, ...] | None], None],
    ) -> None:
        num_done = 0
        stopped = asyncio.Event()
        running: set[str] = set()

        async def serve(http: aiohttp.ClientSession) -> None:
            nonlocal num_done
            while (taken := take()) is not None:
                number, request = taken
                try:
                    async with asyncio.timeout(deadline_s):
                        rollouts = await self._sample(http, request, version, running, stopped)
                except TimeoutError:
                    rollouts = None
                num_done += 1
                on_answer(number, rollouts)

        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._sampling.add((loop, task))
        try:
            if self._closed:
                raise asyncio.CancelledError
            async with self._async_http() as http, asyncio.TaskGroup() as group:
                tasks = [group.create_task(serve(http)) for _ in range(at_once)]
                watch = None
                if self._silence_s is not None:
                    watch = group.create_task(self._watch(http, self._silence_s, lambda: num_done))
                await asyncio.wait(tasks)
                if watch is not None:
                    watch.cancel()
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__
        finally:
            self._sampling.discard((loop, task))

    def _async_http(self) -> aiohttp.ClientSession:
        """An HTTP session without a limit on connections and without a proxy; only connecting has a time limit.

        It is not httpx's client, because that one looks at all its connections whenever a request begins or ends: with
        512 requests at a time it takes about 15 times as much CPU time (``benchmarks/http_clients.py``).
        """
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=certificates()),
            headers=authorization(self.api_key),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
        )

    async def _post(
        self, http: aiohttp.ClientSession, path: str, body: Any, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send ``body`` as JSON; (status, content). Raises aiohttp.ClientError."""
        async with http.post(
            self.url + path,
            data=msgspec.json.encode(body),
            headers={"Content-Type": "application/json", **(headers or {})},
            allow_redirects=False,
        ) as response:
            return response.status, await response.read()

    async def _watch(
        self, http: aiohttp.ClientSession, silence_s: float, num_done: Callable[[], int]
    ) -> None:
        """Watch the server's progress until cancelled.

        Raises RolloutError if there was none for ``silence_s``, or if the server refuses connections twice in a row: a
        vLLM that shuts down closes its port, and can wait without end for requests that its engine no longer answers.
        """
        loop = asyncio.get_running_loop()
        pause_s = min(_LOOK_S, silence_s / 4)
        last, moved = (num_done(), None), loop.time()
        num_refused = 0
        while True:
            try:
                num_tokens = await self._num_tokens(http, pause_s)
                num_refused = 0
            except _Refused as error:
                num_tokens = None
                num_refused += 1
                if num_refused == _REFUSED:
                    raise RolloutError(
                        f"{self.url}: the server shuts down: it refuses connections"
                    ) from error
            now = (num_done(), last[1] if num_tokens is None else num_tokens)
            if now != last:
                last, moved = now, loop.time()
            elif loop.time() - moved > silence_s:
                raise RolloutError(
                    f"{self.url}: frozen: it has requests, but has finished none and computed no token for "
                    f"{loop.time() - moved:.0f} s (watchdog.server_s)"
                )
            await asyncio.sleep(pause_s)

    async def _num_tokens(self, http: aiohttp.ClientSession, timeout_s: float) -> float | None:
        """Number of tokens that the server has read and sampled since its start; None if it does not answer in time.

        Raises:
            _Refused: nothing listens on the server's port.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with http.get(self.url + _METRICS, timeout=timeout, allow_redirects=False) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            if _is_refusal(error):
                raise _Refused from error
            return None
        return sum(map(float, _TOKENS.findall(content))) if response.status == 200 else None

    async def _abort(self, http: aiohttp.ClientSession, running: set[str], stopped: asyncio.Event) -> None:
        """Wait for the stop signal ``stopped``, then abort all running requests repeatedly, until cancelled.

        One abort is not enough, because the engine may not have received a request yet.
        """
        await stopped.wait()
        while True:
            try:
                status, content = await self._post(
                    http, _ABORT, {"request_ids": [_ENGINE_ID.format(name) for name in running]}
                )
            except aiohttp.ClientError:
                pass  # if the server is gone, the requests themselves fail
            else:
                if status != 200:
                    raise RolloutError(f"POST {self.url}{_ABORT}: {_refusal(status, content)}")
            await asyncio.sleep(_ABORT_AGAIN_S)

    async def _sample(
        self,
        http: aiohttp.ClientSession,
        request: GenerateRequest,
        version: AcceptedVersions,
        running: set[str],
        stopped: asyncio.Event,
    ) -> tuple[Rollout, ...]:
        for attempt in range(self._retries + 1):
            name = uuid.uuid4().hex
            running.add(name)
            try:
                return await self._sample_once(http, request, version, name, stopped)
            except Transient as error:
                if attempt == self._retries:
                    raise RolloutError(f"{error} (after {attempt + 1} attempts)") from error
                await asyncio.sleep(_RETRY_PAUSE_S * 2**attempt)
            finally:
                running.discard(name)
        raise AssertionError("unreachable")

    async def _sample_once(
        self,
        http: aiohttp.ClientSession,
        request: GenerateRequest,
        version: AcceptedVersions,
        name: str,
        stopped: asyncio.Event,
    ) -> tuple[Rollout, ...]:
        where = f"{self.url}{_GENERATE}"
        try:
            status, content = await self._post(
                http,
                _GENERATE,
                {"request_id": name, **_body(request)},
                headers={HEADER: _routes_header(request)},
            )
        except aiohttp.ClientError as error:
            raise Transient(f"{where}: {type(error).__name__} {error}") from error
        if status != 200:
            kind = Transient if status >= 500 else RolloutError
            raise kind(f"{where}: {_refusal(status, content)}")
        with _malformed_as_rollout_error(where):
            return rollouts_of(content, request, version, may_be_aborted=stopped.is_set(), url=self.url)


class _Refused(Exception):
    """The server's machine refused a connection."""


def _is_refusal(error: Exception) -> bool:
    """True if a refused connection caused ``error``, and not, for example, a network that is down."""
    return isinstance(error, aiohttp.ClientConnectorError) and isinstance(
        error.os_error, ConnectionRefusedError
    )


def _call_in(loop: asyncio.AbstractEventLoop, action: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended already
        loop.call_soon_threadsafe(action)


def _routes_header(request: GenerateRequest) -> str:
    """The value of the header that says what a server with a route store does with the request's routes. Other servers
    ignore it."""
    if request.routes is None:
        return LEFT_OUT
    return "" if request.keep_routes_for is None else str(request.keep_routes_for)


def _body(request: GenerateRequest) -> dict[str, Any]:
    return {
        "model": _MODEL,
        "token_ids": list(request.prompt_ids),
        "return_token_ids": True,
        "sampling_params": {
            "n": request.num_to_sample,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_tokens": request.max_tokens,
            # vLLM uses seed + j for the j-th of n samples. Seeds are spread, so that requests do not share them.
            "seed": request.seed * _SEED_STEP & _SEED_MASK,
            "stop_token_ids": list(request.stop_token_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
            **({"routed_experts_prompt_start": request.first_routed} if request.first_routed else {}),
        },
    }


@contextlib.contextmanager
def _malformed_as_rollout_error(where: str) -> Iterator[None]:
    """Turn the exceptions that a malformed reply causes into a RolloutError that names its URL."""
    try:
        yield
    except RolloutError as error:
        raise type(error)(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise RolloutError(f"{where}: malformed reply: {type(error).__name__} {error}") from error


def _refusal(status: int, content: bytes) -> str:
    return f"HTTP {status}: {content.decode(errors='replace')[:2000]}"
