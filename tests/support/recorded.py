"""A server of recorded answers: it speaks HTTP as vLLM does, and sends each answer when a function returns it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

from megatron_chord.rollout.client import RolloutClient

END = 2
"""The stop token."""
VERSION = 7
"""The weight version that sampled every token."""

Recorded = Callable[[int, threading.Event], Sequence[Sequence[int]]]
"""(last token of the prompt, event of the request's abort) -> the token ids of each sample. It may wait. A sample that
does not end with ``END`` was aborted if the event is set, else it reached its limit."""


@contextlib.contextmanager
def recorded_server(answers: Recorded) -> Iterator[RolloutClient]:
    """The client of a server with these answers. Every request is answered by a thread of its own."""
    aborted: dict[str, threading.Event] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/abort_requests"):
                for name in body["request_ids"]:
                    aborted.setdefault(name, threading.Event()).set()
                reply: dict[str, Any] = {}
            else:
                event = aborted.setdefault(f"generate-tokens-{body['request_id']}", threading.Event())
                samples = answers(body["token_ids"][-1], event)
                choices = [_choice(index, ids, event.is_set()) for index, ids in enumerate(samples)]
                reply = {"prompt_token_ids": body["token_ids"], "choices": choices}
            content = json.dumps(reply).encode()
            with contextlib.suppress(ConnectionError):  # a client that has given up
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024
        daemon_threads = True
        block_on_close = False  # an answer may wait for something that a failed test never does

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    client = RolloutClient(f"http://127.0.0.1:{server.server_port}", "the key")
    try:
        yield client
    finally:
        client.close()
        server.shutdown()
        server.server_close()


def numbers_template() -> Any:
    """A chat template whose text of an answer is its token ids, without ``END``."""

    def turn(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in token_ids if token != END)

    return SimpleNamespace(stop_token_ids=(END,), turn=turn)


def _choice(index: int, token_ids: Sequence[int], is_aborted: bool) -> dict[str, Any]:
    unfinished = "abort" if is_aborted else "length"
    return {
        "index": index,
        "token_ids": list(token_ids),
        "finish_reason": "stop" if list(token_ids[-1:]) == [END] else unfinished,
        "stop_reason": None,
        "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in token_ids]},
        "weight_versions": [{"version": str(VERSION), "start": 0, "end": len(token_ids)}],
    }
