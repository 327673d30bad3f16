"""`megatron-chord evaluate` on a real server: it resumes after a kill, counts late requests as missing, compares
policies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_chord.config_io import load_suite
from megatron_chord.evaluation.evaluate import evaluate
from megatron_chord.rollout.server import RolloutServer
from tests.support.ranks import ROOT
from tests.support.task import cli_environment

EXAMPLE = ROOT / "examples" / "arithmetic"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite like the paper's: sampled sets, a greedy one, categories and a mean. It sends one request at a time."""
    rows = [json.loads(line) for line in (EXAMPLE / "problems_heldout.jsonl").read_text().splitlines()[:12]]
    lines = [row | {"kind": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(rows)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    settings = {
        "data": ".",
        "max_prompt_tokens": 64,
        "reward": {"kind": "exact", "workers": 1},
        "sampling": {"samples": 3, "temperature": 1.0, "top_p": 0.95, "max_tokens": 48},
        "benchmarks": [
            {
                "name": "sampled",
                "file": "problems.jsonl",
                "category": "kind",
                "metrics": ["avg@3", "pass@2", "maj@3"],
            },
            {"name": "greedy", "file": "problems.jsonl", "sampling": {"max_tokens": 48}},
        ],
        "means": [{"name": "all", "of": ["greedy"]}],
        # With one request at a time, an answer does not depend on other requests.
        "server": {"dtype": "fp32", "requests": 1},
        "resamples": 100,
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(suite: Path, output: Path, server: RolloutServer, *overrides: str) -> dict[str, Any]:
    return evaluate(
        EXAMPLE / "policy",
        load_suite(suite, overrides),
        suite_name="suite",
        output=output,
        servers=[server.url],
        server_key=server.api_key,
        say=print,
    )


def test_killed_and_resumed_gives_the_numbers_of_an_uninterrupted_one(
    suite: Path, tmp_path: Path, server: RolloutServer, server_key: None
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-m", "megatron_chord.cli", "evaluate", str(EXAMPLE / "policy")]
    command += ["--suite", str(suite), "--output", str(killed), "--server", server.url]
    process = subprocess.Popen(command, env=cli_environment(), stdout=subprocess.DEVNULL)
    samples = killed / "samples" / "sampled.jsonl"
    while process.poll() is None and not (samples.is_file() and samples.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(240) == -signal.SIGKILL, "it ended before it could be killed"
    kept = samples.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert kept.count(b"\n") >= 3
    assert not (killed / "results.json").exists()

    resumed = run(suite, killed, server)
    whole = run(suite, straight, server)
    assert resumed == whole
    for name in ("results.json", "problems.jsonl", "results.md", "row.md"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    assert samples.read_bytes().startswith(kept)
    assert samples.read_bytes().count(b"\n") == 36, "what was kept is not asked again"

    # The numbers agree with the answers on disk.
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    found = whole["benchmarks"]["sampled"]
    assert 0 < found["metrics"]["avg@3"]["value"] < 1, "grades that are all equal would prove little"
    assert found["metrics"]["avg@3"]["value"] == pytest.approx(sum(a["score"] for a in answers) / 36)
    assert found["response_tokens"]["mean"] == pytest.approx(sum(a["tokens"] for a in answers) / 36)
    assert {name: item["problems"] for name, item in found["categories"]["avg@3"].items()} == {
        "even": 6,
        "odd": 6,
    }

    # The same command again samples nothing.
    assert run(suite, killed, server) == whole
    assert samples.read_bytes().count(b"\n") == 36


def test_late_requests_are_missing_answers_and_no_wrong_ones(
    suite: Path, tmp_path: Path, server: RolloutServer
) -> None:
    late = run(suite, tmp_path / "late", server, "problems=2", "server.request_s=1e-4")
    assert late["benchmarks"]["sampled"]["missing"] == 6
    assert late["benchmarks"]["sampled"]["metrics"]["avg@3"]["value"] is None
    again = run(suite, tmp_path / "late", server, "problems=2")
    assert again["benchmarks"]["sampled"]["missing"] == 0
    assert again["benchmarks"]["sampled"]["metrics"]["avg@3"]["value"] is not None
