"""Serves a reward model of Transformers on loopback: {"texts": [...]} -> {"scores": [...]}, each in (0, 1).

python examples/rewards/reward_model_server.py FOLDER [--port 8001]
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server for the model with one output in `folder`; port 0: any free port."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            inputs = tokenizer(request["texts"], padding=True, return_tensors="pt")
            with one_at_a_time, torch.inference_mode():
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            body = json.dumps({"scores": logits[:, 0].sigmoid().tolist()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print no line for a request."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8001)
    options = parser.parse_args()
    with make_server(options.folder, options.port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
