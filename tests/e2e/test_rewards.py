"""The rewards of examples/rewards train the quick start's task, all of them at once as in several.yaml.

The judge is the quick start's policy behind an OpenAI-compatible server of this file, because the rollout servers have
no tokenizer. The reward model is random and runs behind the example's own server.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from examples.rewards import reward_model_server
from megatron_chord.config_io import load_config
from megatron_chord.rollout.server import RolloutServer
from tests.support.ranks import ROOT, run_ranks
from tests.support.task import metrics_of

EXAMPLES = ROOT / "examples" / "rewards"
POLICY = ROOT / "examples" / "arithmetic" / "policy"
STEPS = 2
TERMS = {"exact", "sums_are_right", "judge", "reward_model"}


class Judge(BaseHTTPRequestHandler):
    """Answers POST chat/completions as OpenAI's API does. A Transformers model answers greedily."""

    key = "judge-key"
    model: Any = Qwen2ForCausalLM.from_pretrained(POLICY).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(POLICY)
    one_at_a_time = threading.Lock()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        if self.headers["Authorization"] != f"Bearer {self.key}":
            self.send_error(401)
            return
        ids = self.tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        torch.set_num_threads(1)
        with self.one_at_a_time, torch.inference_mode():
            out = self.model.generate(ids, max_new_tokens=request["max_tokens"], do_sample=False)
        message = {"role": "assistant", "content": self.tokenizer.decode(out[0, ids.shape[1] :])}
        body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print no line for a request."""


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Yield the server's address while a thread serves it."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def judge() -> Iterator[str]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Judge)) as url:
        yield url


@pytest.fixture
def reward_model(tmp_path: Path) -> Iterator[str]:
    """The address of a server with a random reward model that reads the policy's tokens."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(POLICY, num_labels=1)
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(tmp_path / "rm")
    with serving(reward_model_server.make_server(tmp_path / "rm", port=0)) as url:
        yield url


def train_with(overrides: list[str]) -> None:
    """Train in this process. The caller starts the process."""
    from megatron_chord.train.loop import train

    train(load_config(EXAMPLES / "several.yaml", overrides))


@pytest.mark.usefixtures("server_key")
def test_all_examples_train_together(
    server: RolloutServer, judge: str, reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_URL", f"{judge}/v1")
    monkeypatch.setenv("JUDGE_KEY", Judge.key)
    monkeypatch.setenv("JUDGE_MODEL", "policy")
    monkeypatch.setenv("REWARD_MODEL_URL", reward_model)
    settings = {
        "output": tmp_path / "out",
        "steps": STEPS,
        "rollout.servers": f"[{server.url}]",
        "batch.prompts": 2,
        "batch.rollouts": 2,
        "batch.demonstrations": 4,
        "optim.warmup_steps": 1,
        "evaluation.problems": 2,
    }
    run_ranks(train_with, 1, [f"{name}={value}" for name, value in settings.items()], timeout_s=300)

    rows = metrics_of(tmp_path / "out")
    steps = [row for row in rows if "evaluation" not in row]
    assert [row["step"] for row in steps] == list(range(STEPS))
    for row in steps:
        samples = read(tmp_path / "out" / "samples" / f"step-{row['step']:06d}.jsonl")
        assert [sample["grader_error"] for sample in samples] == [None] * 4
        assert row["grader_errors"] == 0
        for sample in samples:
            terms, excess = sample["reward_terms"], sample["num_tokens"] - 40
            assert terms.keys() == TERMS
            assert sample["score"] == terms["exact"]
            assert 0 < terms["reward_model"] < 1
            expected = terms["exact"] + 0.2 * terms["sums_are_right"] + 0.1 * terms["judge"]
            assert sample["reward"] == pytest.approx(expected - 0.5 * max(0, excess) / 8)
        for name in TERMS:
            mean = statistics.fmean(sample["reward_terms"][name] for sample in samples)
            assert row["reward_terms"][name] == pytest.approx(mean)
        assert row["reward_mean"] == pytest.approx(statistics.fmean(sample["reward"] for sample in samples))
    assert max(row["grad_norm"] for row in steps) > 0
    evaluations = [row["evaluation"] for row in rows if "evaluation" in row]
    assert len(evaluations) == 2
    assert all(found["accuracy"] == found["reward_terms"]["exact"] for found in evaluations)


FAULTY = """
import itertools

calls = itertools.count()

def score(response):
    number = next(calls)
    print("some noise")
    if number in (1, 6) or number >= 8:
        raise KeyError("level")
    return {"right": float(number % 2), "bonus": 0.5}
"""


def train_until_halted(overrides: list[str]) -> tuple[str, int]:
    """Train in this process. Return the message and the exit code with which the run stops itself."""
    from megatron_chord.train.halt import Halted
    from megatron_chord.train.loop import train

    try:
        train(load_config(ROOT / "examples" / "arithmetic" / "chord_phi.yaml", overrides))
    except Halted as halted:
        return str(halted), halted.exit_code
    raise AssertionError("the run did not stop")


@pytest.mark.usefixtures("server_key")
def test_failed_gradings_are_no_data_and_too_many_of_them_stop_the_run(
    server: RolloutServer, tmp_path: Path
) -> None:
    """In the first step 2 of 8 gradings fail, in the second all of them."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    settings = {
        "output": tmp_path / "out",
        "steps": 3,
        "rollout.servers": f"[{server.url}]",
        "batch.prompts": 2,
        "batch.rollouts": 4,
        "batch.demonstrations": 4,
        "optim.warmup_steps": 0,
        "data.evaluation": "null",
        "evaluation": "{every: 0}",
        # The function counts its calls, so no slow machine may make the pool replace the worker.
        "reward": f"{{kind: function, path: {tmp_path / 'faulty.py'}, name: score, workers: 1, timeout_s: 240, "
        "max_error_rate: 0.25}",
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    ((message, code),) = run_ranks(train_until_halted, 1, overrides, timeout_s=300)

    error = "KeyError: 'level' (faulty.py:10)"
    assert code == 69
    assert message.startswith("TooManyGraderErrors: ")
    # How many have failed when the last answers arrive depends on how fast the server is.
    expected = (
        rf"[3-8] of 8 gradings failed \(reward.max_error_rate 0.25\); the first error: {re.escape(error)}"
    )
    assert re.search(expected, message)
    (row,) = metrics_of(tmp_path / "out")
    assert row["grader_errors"] == 2
    # Graded were calls 0, 2, 3 for the prompt whose answers came first and 4, 5, 7 for the other.
    assert row["reward_terms"] == {"right": pytest.approx(3 / 6), "bonus": 0.5}
    assert row["reward_mean"] == pytest.approx(1.0)
    samples = read(tmp_path / "out" / "samples" / "step-000000.jsonl")
    errors = [sample["grader_error"] for sample in samples]
    rewards = [sample["reward"] for sample in samples]
    first = ([None, error, None, None], [0.5, None, 0.5, 1.5])
    other = ([None, None, error, None], [0.5, 1.5, None, 1.5])
    assert [(errors[:4], rewards[:4]), (errors[4:], rewards[4:])] in ([first, other], [other, first])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
