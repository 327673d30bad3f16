"""A server's wrong answers never become data. A real HTTP server sends each scripted answer."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from megatron_chord.records import Rollout
from megatron_chord.rollout.client import RolloutClient, Stop
from megatron_chord.rollout.replies import GenerateRequest, RolloutError, StaleWeights
from megatron_chord.routes import RouteShape
from tests.rollout.helpers import answers_of

KEY = "the key"
REQUEST = GenerateRequest(
    prompt_ids=(5, 6), num_rollouts=2, seed=3, temperature=1.0, max_tokens=3, stop_token_ids=(2,)
)


def choice(index: int, token_ids: list[int], reason: str) -> dict[str, Any]:
    return {
        "index": index,
        "token_ids": token_ids,
        "finish_reason": reason,
        "stop_reason": None,
        "logprobs": {"content": [{"token_id": token, "logprob": -0.5 * token} for token in token_ids]},
        "weight_versions": [{"version": "7", "start": 0, "end": len(token_ids)}],
    }


GOOD: dict[str, Any] = {
    "prompt_token_ids": [5, 6],
    "choices": [choice(1, [4, 5, 6], "length"), choice(0, [9, 2], "stop")],
}


class Script:
    """Answers in the given order; the last one is repeated. An answer is (status, body), or None to hang up."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any] | None] = []
        self.received: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.delay_s = 0.0

    def next(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        self.received.append(body)
        time.sleep(self.delay_s)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def client(script: Script) -> Iterator[RolloutClient]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            script.paths.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers["Authorization"] != f"Bearer {KEY}":
                answer: tuple[int, Any] | None = (401, {"error": "Unauthorized"})
            else:
                answer = script.next(json.loads(body or b"{}"))
            if answer is None:
                self.connection.close()
                return
            status, content = answer
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # for a test that opens many connections at once; 5 would reset some

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    client = RolloutClient(f"http://127.0.0.1:{server.server_port}", KEY)
    yield client
    client.close()
    server.shutdown()
    server.server_close()


def broken(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    reply = copy.deepcopy(GOOD)
    change(reply)
    return reply


def first(reply: dict[str, Any]) -> dict[str, Any]:
    return reply["choices"][0]


MALFORMED = {
    "no choices": broken(lambda r: r.update(choices=[])),
    "choices missing": broken(lambda r: r.pop("choices")),
    "a sample too few": broken(lambda r: r["choices"].pop()),
    "the same sample twice": broken(lambda r: first(r).update(index=0)),
    "another prompt": broken(lambda r: r.update(prompt_token_ids=[5, 7])),
    "no log-probs": broken(lambda r: first(r).update(logprobs=None)),
    "log-prob content missing": broken(lambda r: first(r)["logprobs"].update(content=None)),
    "a log-prob too few": broken(lambda r: first(r)["logprobs"]["content"].pop()),
    "log-probs of other tokens": broken(lambda r: first(r)["logprobs"]["content"][1].update(token_id=9)),
    "a log-prob that vLLM could not compute": broken(
        lambda r: first(r)["logprobs"]["content"][1].update(logprob=-9999.0)
    ),
    "a log-prob that is not a number": broken(
        lambda r: first(r)["logprobs"]["content"][1].update(logprob=float("nan"))
    ),
    "a positive log-prob": broken(lambda r: first(r)["logprobs"]["content"][1].update(logprob=0.5)),
    "a log-prob that is text": broken(lambda r: first(r)["logprobs"]["content"][1].update(logprob="x")),
    "no tokens": broken(lambda r: r["choices"].__setitem__(0, choice(1, [], "length"))),
    "too many tokens": broken(lambda r: r["choices"].__setitem__(0, choice(1, [4, 4, 4, 4], "length"))),
    "stopped without a stop token": broken(lambda r: first(r).update(finish_reason="stop")),
    "a stop token that did not stop": broken(
        lambda r: r["choices"].__setitem__(0, choice(1, [4, 2], "length"))
    ),
    "an unknown finish reason": broken(lambda r: first(r).update(finish_reason="tool_calls")),
    "no versions": broken(lambda r: first(r).update(weight_versions=None)),
    "versions of too few tokens": broken(lambda r: first(r)["weight_versions"][0].update(end=2)),
    "empty versions": broken(lambda r: first(r).update(weight_versions=[])),
    "a list": [],
    "not JSON": b"<html>",
    "nothing": b"",
}


def test_a_good_reply(client: RolloutClient, script: Script) -> None:
    script.answers = [(200, GOOD)]
    answered: dict[int, tuple[Rollout, ...]] = {}
    replies = client.generate([REQUEST, REQUEST], version=7, deadline_s=10, on_answer=answered.__setitem__)
    assert answered == dict(enumerate(replies))
    assert len(replies) == 2
    stopped, cut = replies[0]
    assert (stopped.token_ids, stopped.finish_reason) == ((9, 2), "stop")
    assert (cut.token_ids, cut.logprobs, cut.weight_version) == ((4, 5, 6), (-2.0, -2.5, -3.0), 7)
    sent = script.received[0]
    assert sent["token_ids"] == [5, 6]
    assert sent["sampling_params"]["n"] == 2
    assert sent["sampling_params"]["stop_token_ids"] == [2]


def test_an_address_with_a_slash_at_its_end(client: RolloutClient, script: Script) -> None:
    script.answers = [(200, GOOD)]
    other = RolloutClient(client.url + "/", KEY)
    assert len(other.generate([REQUEST], version=7, deadline_s=10)[0]) == 2
    assert script.paths == ["/inference/v1/generate"]


SHAPE = RouteShape(layers=3, experts=4, chosen=2, dense_layers=(0,))


def routed(routes: np.ndarray | None, *, token_ids: list[int]) -> dict[str, Any]:
    """A reply with one sample and these routes, as vLLM sends them."""
    one = choice(0, token_ids, "length")
    if routes is not None:
        file = io.BytesIO()
        np.save(file, routes)
        one["routed_experts"] = base64.b64encode(file.getvalue()).decode()
    return {"prompt_token_ids": [5, 6], "choices": [one]}


def routes(*rows: tuple[int, int]) -> np.ndarray:
    """Routes of one token for each row: the experts in both layers that have experts. The dense layer has zeros."""
    sparse = np.array(rows, np.uint8)[:, None].repeat(2, axis=1)
    return np.concatenate([np.zeros_like(sparse[:, :1]), sparse], axis=1)


def test_routes_of_a_reply(client: RolloutClient, script: Script) -> None:
    sent = routes((3, 0), (0, 1), (2, 1), (1, 3))
    script.answers = [(200, routed(sent, token_ids=[4, 5, 6]))]
    asked = replace(REQUEST, num_rollouts=1, routes=SHAPE)
    ((rollout,),) = client.generate([asked], version=7, deadline_s=5)
    np.testing.assert_array_equal(rollout.routes, sent)
    assert isinstance(rollout.routes, np.ndarray)
    assert not rollout.routes.flags.writeable
    script.answers = [(200, routed(sent[1:], token_ids=[4, 5, 6]))]
    ((rollout,),) = client.generate([replace(asked, first_routed=1)], version=7, deadline_s=5)
    np.testing.assert_array_equal(rollout.routes, sent[1:])
    starts = [body["sampling_params"].get("routed_experts_prompt_start") for body in script.received]
    assert starts == [None, 1]
    ((rollout,),) = client.generate([replace(asked, routes=None)], version=7, deadline_s=5)
    assert rollout.routes is None, "routes that nobody asked for"
    script.answers = [(200, routed(None, token_ids=[4, 5, 6]))]
    ((rollout,),) = client.generate([asked], version=7, deadline_s=5)
    assert rollout.routes is None


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (routes((3, 0), (0, 1), (2, 1)), "routes of shape"),
        (routes((3, 0), (0, 1), (2, 1), (2, 1), (0, 1)), "routes of shape"),
        (routes((3, 0), (0, 1), (2, 1), (1, 4)), "expert 4 of 4"),
        (routes((3, 0), (0, 1), (1, 1), (1, 3)), "the same expert twice"),
        (routes((3, 0), (0, 1), (2, 1), (1, 3)).astype(np.int16), "type int16"),
        (routes((3, 0), (0, 1), (2, 1), (1, 3))[:, :2], "routes of shape"),
        (None, "--enable-return-routed-experts"),
    ],
)
def test_wrong_routes_are_an_error(
    client: RolloutClient, script: Script, sent: np.ndarray | None, reason: str
) -> None:
    script.answers = [(200, routed(sent, token_ids=[4, 5, 6]))]
    asked = replace(REQUEST, num_rollouts=1, routes=replace(SHAPE, is_required=True))
    with pytest.raises(RolloutError, match=reason):
        client.generate([asked], version=7, deadline_s=5)


def test_seeds_of_neighbouring_requests_are_far_apart(client: RolloutClient, script: Script) -> None:
    """vLLM samples the j-th of n answers with the seed plus j, so close seeds would share answers."""
    script.answers = [(200, GOOD)]
    client.generate([replace(REQUEST, seed=seed) for seed in range(50)], version=7, deadline_s=10)
    seeds = sorted(body["sampling_params"]["seed"] for body in script.received)
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 1_000_000
    assert seeds[0] >= 0
    assert seeds[-1] < 2**62


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_reply_is_an_error_and_is_not_asked_again(
    client: RolloutClient, script: Script, what: str
) -> None:
    script.answers = [(200, MALFORMED[what])]
    with pytest.raises(RolloutError, match=client.url) as caught:
        client.generate([REQUEST], version=7, deadline_s=10)
    assert not isinstance(caught.value, StaleWeights)
    assert len(script.received) == 1


@pytest.mark.parametrize(
    "spans",
    [
        [{"version": "6", "start": 0, "end": 3}],
        [{"version": "6", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": 3}],
        [{"version": "default", "start": 0, "end": 3}],
    ],
)
def test_stale_weights(client: RolloutClient, script: Script, spans: list[dict[str, Any]]) -> None:
    script.answers = [(200, broken(lambda r: first(r).update(weight_versions=spans)))]
    with pytest.raises(StaleWeights, match="not 7"):
        client.generate([REQUEST], version=7, deadline_s=10)


@pytest.mark.parametrize(
    ("versions", "oldest"), [(["7"], 7), (["7", "8"], 7), (["9"], 9), (["6", "7"], None), (["default"], None)]
)
def test_weights_that_may_advance(
    client: RolloutClient, script: Script, versions: list[str], oldest: int | None
) -> None:
    """The oldest version of a rollout is recorded. No version may be older than the requested one."""
    bounds = [0, *range(1, len(versions)), 3]
    spans = [
        {"version": version, "start": bounds[i], "end": bounds[i + 1]} for i, version in enumerate(versions)
    ]
    script.answers = [(200, broken(lambda r: first(r).update(weight_versions=spans)))]
    if oldest is None:
        with pytest.raises(StaleWeights, match="not 7 or later"):
            client.generate([REQUEST], version=7, deadline_s=10, may_advance=True)
    else:
        ((other, changed),) = client.generate([REQUEST], version=7, deadline_s=10, may_advance=True)
        assert (other.weight_version, changed.weight_version) == (7, oldest)


def test_closing_ends_what_is_being_sampled_in_another_thread(client: RolloutClient, script: Script) -> None:
    script.answers = [(200, GOOD)]
    script.delay_s = 20.0
    threading.Timer(0.3, client.close).start()
    begun = time.monotonic()
    with pytest.raises(RolloutError, match="the client was closed while it sampled"):
        client.generate([REQUEST] * 3, version=7, deadline_s=30)
    assert time.monotonic() - begun < 15
    with pytest.raises(RolloutError, match="the client was closed"):
        client.generate([REQUEST], version=7, deadline_s=30)


def test_a_client_whose_requests_were_cancelled_can_sample_again(
    client: RolloutClient, script: Script
) -> None:
    script.answers = [(200, GOOD)] * 2
    script.delay_s = 20.0

    def cancel_when_it_samples() -> None:
        while not script.received:
            time.sleep(0.01)
        client.cancel()

    threading.Thread(target=cancel_when_it_samples).start()
    with pytest.raises(RolloutError, match="the client was closed while it sampled"):
        client.generate([REQUEST], version=7, deadline_s=30)
    script.delay_s = 0.0
    assert len(client.generate([REQUEST], version=7, deadline_s=30)) == 1


def test_a_stop_aborts_these_requests_and_returns_what_there_is(
    client: RolloutClient, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request is answered and is enough. At the first stop call, the server has not yet heard of the last
    request."""
    stop, aborted = Stop(), threading.Event()
    calls: list[list[str]] = []
    names: list[str] = []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if "request_ids" in body:
            calls.append(body["request_ids"])
            if len(calls) == 3:  # the first two calls came too early
                aborted.set()
            return 200, {}
        if body["sampling_params"]["max_tokens"] == 3:
            return 200, GOOD
        names.append(body["request_id"])
        assert aborted.wait(10)
        return 200, {
            "prompt_token_ids": [5, 6],
            "choices": [choice(0, [9, 2], "stop"), choice(1, [], "abort")],
        }

    monkeypatch.setattr(script, "next", answer)
    done: list[int] = []

    def is_enough(index: int, rollouts: tuple[Rollout, ...]) -> None:
        done.append(index)
        stop()

    long = replace(REQUEST, max_tokens=8)
    first, *rest = client.generate(
        [REQUEST, long, long], version=7, deadline_s=10, on_answer=is_enough, stop=stop
    )
    assert done == [0]
    assert [rollout.finish_reason for rollout in first] == ["stop", "length"]
    for group in rest:
        assert [(rollout.token_ids, rollout.finish_reason) for rollout in group] == [
            ((9, 2), "stop"),
            ((), "abort"),
        ]
    assert len(calls) >= 3
    assert all(set(call) == {f"generate-tokens-{name}" for name in names} for call in calls)


def test_a_stop_before_the_first_request(
    client: RolloutClient, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, aborted = Stop(), threading.Event()
    stop()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if "request_ids" in body:
            aborted.set()
            return 200, {}
        assert aborted.wait(10)
        return 200, broken(lambda reply: first(reply).update(finish_reason="abort"))

    monkeypatch.setattr(script, "next", answer)
    (group,) = client.generate([REQUEST], version=7, deadline_s=10, stop=stop)
    assert [rollout.finish_reason for rollout in group] == ["stop", "abort"]
    assert client.generate([], version=7, deadline_s=10, stop=stop) == []


def test_a_server_that_cannot_abort_says_so(
    client: RolloutClient, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()
    stop()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if "request_ids" in body:
            return 404, {"error": "Not Found"}
        time.sleep(1.0)
        return 200, GOOD

    monkeypatch.setattr(script, "next", answer)
    with pytest.raises(RolloutError, match=r"/inference/v1/abort_requests: HTTP 404.*Not Found"):
        client.generate([REQUEST], version=7, deadline_s=10, stop=stop)


@pytest.mark.parametrize(
    "failure",
    [
        None,
        (500, {"error": "EngineCore encountered an issue"}),
        (503, {"error": "paused"}),
        (200, broken(lambda r: first(r).update(finish_reason="abort"))),
    ],
)
def test_a_transient_failure_is_tried_again_but_not_for_ever(
    client: RolloutClient, script: Script, failure: tuple[int, Any] | None
) -> None:
    script.answers = [failure, failure, (200, GOOD)]
    assert len(client.generate([REQUEST], version=7, deadline_s=10)[0]) == 2
    script.answers = [failure]
    script.received.clear()
    with pytest.raises(RolloutError, match="after 3 attempts"):
        client.generate([REQUEST], version=7, deadline_s=10)
    assert len(script.received) == 3


def test_a_refused_request_says_why_and_is_not_tried_again(client: RolloutClient, script: Script) -> None:
    script.answers = [(400, {"error": {"message": "the prompt is too long"}})]
    with pytest.raises(RolloutError, match=r"HTTP 400.*the prompt is too long"):
        client.generate([REQUEST], version=7, deadline_s=10)
    assert len(script.received) == 1


def test_the_deadline_holds_for_all_requests_together(client: RolloutClient, script: Script) -> None:
    script.answers = [(200, GOOD)]
    script.delay_s = 20.0
    begun = time.monotonic()
    with pytest.raises(RolloutError, match="0 of 3 requests finished within 0 s"):
        client.generate([REQUEST] * 3, version=7, deadline_s=0.2)
    assert time.monotonic() - begun < 15


def test_one_request_after_another(client: RolloutClient, script: Script) -> None:
    script.answers = [(503, {}), (200, GOOD)]
    answers = answers_of(client, [REQUEST, replace(REQUEST, top_p=0.9), REQUEST], version=7)
    assert sorted(answers) == [0, 1, 2]
    assert all(answer is not None and answer[0].token_ids == (9, 2) for answer in answers.values())
    assert len(script.received) == 4, "three requests, one of which was sent again"
    assert {body["sampling_params"]["top_p"] for body in script.received} == {0.9, 1.0}


def test_a_late_request_is_reported_and_the_others_continue(client: RolloutClient, script: Script) -> None:
    script.answers = [(200, GOOD)]
    script.delay_s = 1.0
    assert answers_of(client, [REQUEST] * 3, version=7, deadline_s=0.1) == {0: None, 1: None, 2: None}


def test_a_refused_request_ends_all(client: RolloutClient, script: Script) -> None:
    script.answers = [(400, {"error": {"message": "the prompt is too long"}})]
    with pytest.raises(RolloutError, match=r"HTTP 400.*the prompt is too long"):
        answers_of(client, [REQUEST] * 9, version=7)
    assert len(script.received) <= 2


def test_weights_of_the_servers_start(client: RolloutClient, script: Script) -> None:
    reply = copy.deepcopy(GOOD)
    for sample in reply["choices"]:
        sample["weight_versions"][0]["version"] = "default"
    script.answers = [(200, reply)]
    (answer,) = answers_of(client, [REQUEST], version=None).values()
    assert answer is not None
    assert answer[0].weight_version == 0
    with pytest.raises(StaleWeights, match="sampled by weight version default, not 7"):
        answers_of(client, [REQUEST], version=7)
    script.answers = [(200, GOOD)]
    with pytest.raises(StaleWeights, match="sampled by weight version 7, not default"):
        answers_of(client, [REQUEST], version=None)


def test_no_server_listens() -> None:
    client = RolloutClient("http://127.0.0.1:9", KEY)
    begun = time.monotonic()
    with pytest.raises(RolloutError, match=r"http://127.0.0.1:9/.*ClientConnectorError"):
        client.generate([REQUEST], version=7, deadline_s=30)
    with pytest.raises(RolloutError, match="ConnectError"):
        client.weight_version()
    assert not client.health()
    assert time.monotonic() - begun < 15


def test_a_server_that_closes_its_port_is_given_up() -> None:
    """A vLLM that shuts down takes no new connections, but can keep open ones for ever. This one never answers."""
    open_requests = list[socket.socket]()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while not open_requests:
                connection, _ = listener.accept()
                if connection.recv(4096).startswith(b"POST"):
                    open_requests.append(connection)
                else:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    connection.close()
            listener.close()

        server = threading.Thread(target=serve)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # Queries go out every 5 s: two refused ones come long before the silence.
        with (
            contextlib.closing(RolloutClient(url, KEY, silence_s=120.0)) as client,
            pytest.raises(RolloutError, match="the server shuts down: it refuses connections"),
        ):
            client.generate([REQUEST], version=7, deadline_s=240)
        server.join()
    for connection in open_requests:
        connection.close()


def test_a_wrong_key_is_an_error(client: RolloutClient, script: Script) -> None:
    with pytest.raises(RolloutError, match="HTTP 401"):
        RolloutClient(client.url, "another key").generate([REQUEST], version=7, deadline_s=5)
    assert script.received == []


def test_control_requests_are_sent_once(client: RolloutClient, script: Script) -> None:
    script.answers = [(500, {"error": "no"})]
    with pytest.raises(RolloutError, match=r"POST .*/pause: HTTP 500"):
        client.pause()
    assert len(script.received) == 1
    script.answers = [(200, {"weight_version": "default"}), (200, {"weight_version": "12"}), (200, {})]
    assert client.weight_version() is None
    assert client.weight_version() == 12
    with pytest.raises(RolloutError, match="malformed"):
        client.weight_version()


def test_all_requests_that_end_an_open_update_share_one_deadline() -> None:
    """A frozen server takes requests, but answers none of the three. The ranks that wait for rank 0 would give up."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        client, begun = RolloutClient(f"http://127.0.0.1:{frozen.getsockname()[1]}", KEY), time.monotonic()
        with pytest.raises(RolloutError, match="ReadTimeout"):
            client.end_open_update(timeout_s=1.0)
        assert time.monotonic() - begun < 2.0
        client.close()


def test_greedy_samples_are_asked_for_once(client: RolloutClient, script: Script) -> None:
    """vLLM refuses n > 1 at temperature 0."""
    script.answers = [(200, broken(lambda r: r["choices"].pop(0)))]
    (rollouts,) = client.generate([replace(REQUEST, temperature=0.0)], version=7, deadline_s=5)
    assert script.received[0]["sampling_params"]["n"] == 1
    assert [rollout.token_ids for rollout in rollouts] == [(9, 2), (9, 2)]
