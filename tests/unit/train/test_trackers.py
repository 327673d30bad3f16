"""Trackers receive the right values, and no tracker stops or slows a run.

TensorBoard is real. The other trackers are tested where their packages are installed, without a network.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.train import trackers as module
from megatron_chord.train.metrics import RunLog
from megatron_chord.train.tags import scalars, tag, tagged
from megatron_chord.train.trackers import TrackedRun, Trackers, answer_table, check_installed
from tests.unit.report.runs import rows_of_quickstart

ROWS = [
    {"step": 0, "evaluation": {"accuracy": 0.25, "num_problems": 4}},
    {"step": 0, "reward_mean": 0.5, "mu": 0.1, "seconds": {"total": 2.0}, "not_finite": ["loss"]},
    {"step": 1, "reward_mean": 0.75, "mu": 0.1, "seconds": {"total": 3.0}},
]
SETTINGS = {"optim": {"lr": 1e-6}, "data": {"prompts": [{"path": ["a"], "weight": 1.0}]}}
SAMPLE = {
    "prompt_id": "a",
    "prompt": "What is 3 + 4?",
    "truth": "7",
    "response": "It is 7. | #### 7",
    "score": 1.0,
    "reward": 1.0,
    "num_tokens": 9,
    "finish_reason": "stop",
}
SAMPLES = [SAMPLE, SAMPLE | {"response": "eight", "reward": None, "finish_reason": "length"}]
CELLS = [
    [2, "What is 3 + 4?", "It is 7. | #### 7", "7", 1.0, 9, "stop"],
    [2, "What is 3 + 4?", "eight", "7", None, 9, "length"],
]
COLUMNS = ["step", "prompt", "answer", "truth", "reward", "tokens", "finish"]


def tracked(folder: Path, name: str) -> list[str]:
    """Send ``ROWS`` and a table of ``SAMPLES`` to a tracker. Return what was printed meanwhile."""
    said: list[str] = []
    run = TrackedRun(folder=folder, settings=SETTINGS, first_step=0)
    trackers = Trackers([name], run, said.append)
    for row in ROWS:
        trackers.log(row["step"], tagged(row))
    trackers.log_answers(2, answer_table("evaluation", 2, SAMPLES))
    trackers.close(wait_s=60)
    return said


def test_a_table_has_some_answers_of_some_prompts_and_no_long_text() -> None:
    samples = [
        SAMPLE | {"prompt_id": prompt, "prompt": "p" * 5000, "response": f"{prompt} {number}"}
        for prompt in range(9)
        for number in range(8)
    ]
    table = answer_table("step", 20, samples)
    assert table.columns == tuple(COLUMNS)
    assert [row[2] for row in table.rows] == [
        f"{prompt} {number}" for prompt in range(4) for number in range(4)
    ]
    assert {len(str(row[1])) for row in table.rows} == {2000}


def test_every_evaluation_and_every_tenth_step_has_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[tuple[int, str]] = []

    class Keeps:
        def log(self, step: int, values: Any) -> None: ...

        def log_answers(self, step: int, table: module.AnswerTable) -> None:
            tables.append((step, table.tag))

        def close(self) -> None: ...

    monkeypatch.setitem(module._OPEN, "wandb", lambda run: Keeps())
    with RunLog(tmp_path, steps=30, first_step=0, settings={"tracking": ["wandb"]}) as log:
        log.write_samples(0, SAMPLES)  # it was sampled before the start could no longer be refused
        log.begin()
        for step in range(1, 21):
            log.write_samples(step, SAMPLES)
        log.write_samples(15, SAMPLES, kind="evaluation")
    expected = [(step, "answers/step") for step in (0, 10, 20)]
    assert tables == [*expected, (15, "answers/evaluation")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reward_mean", "reward/mean"),
        ("evaluation/accuracy", "reward/accuracy"),
        ("evaluation/response_length", "reward/evaluation/response_length"),
        ("reward/gsm8k", "reward/by_source/gsm8k"),
        ("accuracy/gsm8k", "reward/accuracy_by_source/gsm8k"),
        ("prompts/gsm8k", "rollout/prompts_by_source/gsm8k"),
        ("reward_terms/math", "reward/terms/math"),
        ("evaluation/reward_terms/math", "reward/evaluation/reward_terms/math"),
        ("seconds/total", "time/total"),
        ("sft_loss", "sft/loss"),
        ("mu", "sft/mu"),
        ("entropy", "update/entropy"),
        ("logprob_gap", "rollout/logprob_gap"),
        ("number_of_tomorrow", "update/number_of_tomorrow"),
    ],
)
def test_numbers_are_grouped(name: str, expected: str) -> None:
    assert tag(name) == expected


def test_reward_and_accuracy_come_first_and_no_two_numbers_share_a_tag() -> None:
    for row in rows_of_quickstart()[:2]:
        tags = tagged(row)
        assert min(tags).startswith("reward/")
        assert "step" not in tags
        count = sum(len(value) if isinstance(value, dict) else 1 for value in row.values()) - 1
        assert len(tags) == count


NAMES_OF_USERS = ["mean", "std", "accuracy", "terms", "by_source", "evaluation", "loss", "math.format"]


def test_the_name_of_a_source_or_term_never_takes_the_tag_of_another_number() -> None:
    evaluation, step = rows_of_quickstart()[:2]
    named = dict.fromkeys(NAMES_OF_USERS, 0.5)
    step |= dict.fromkeys(("prompts", "reward", "accuracy", "reward_terms"), named)
    more = {"accuracy_by_source": named, "reward_terms": named}
    row = step | {"evaluation": evaluation["evaluation"] | more}
    names = [name for name, _ in scalars(row) if name != "step"]
    assert len(names) > 6 * len(NAMES_OF_USERS)
    shared = {name: tag(name) for name in names if [tag(other) for other in names].count(tag(name)) > 1}
    assert shared == {}
    assert tagged(row)["reward/mean"] == step["reward_mean"] != 0.5


def test_tensorboard_has_every_number_and_the_settings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert tracked(tmp_path, "tensorboard") == []
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "reward/accuracy",
        "reward/evaluation/num_problems",
        "reward/mean",
        "sft/mu",
        "time/total",
    ]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(0, 0.5), (1, 0.75)]
    (text,) = events.Tensors("settings/text_summary")
    assert b"| optim.lr | 1e-06 |" in text.tensor_proto.string_val[0]


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Down:
        def log(self, step: int, values: Any) -> None:
            raise ConnectionError("no route\nto the host")

        def close(self) -> None:
            raise AssertionError("never")

    def leaves(run: TrackedRun) -> Any:
        raise SystemExit("not logged in")

    monkeypatch.setitem(module._OPEN, "wandb", lambda run: Down())
    monkeypatch.setitem(module._OPEN, "swanlab", leaves)
    said: list[str] = []
    run = TrackedRun(folder=tmp_path, settings=SETTINGS, first_step=0)
    trackers = Trackers(["wandb", "swanlab", "tensorboard"], run, said.append)
    for row in ROWS:
        trackers.log(row["step"], tagged(row))
    trackers.close()
    assert sorted(said) == [
        "tracking: swanlab is switched off: SystemExit: not logged in",
        "tracking: wandb is switched off: ConnectionError: no route",
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_hangs_does_not_delay_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Hangs:
        def log(self, step: int, values: Any) -> None:
            release.wait()

        def close(self) -> None:
            pass

    monkeypatch.setitem(module._OPEN, "wandb", lambda run: Hangs())
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    said: list[str] = []
    trackers = Trackers(["wandb"], TrackedRun(folder=tmp_path, settings={}, first_step=0), said.append)
    start = time.monotonic()
    for step in range(100):
        trackers.log(step, {})
    trackers.close(wait_s=0.1)
    assert time.monotonic() - start < 5
    release.set()
    assert said == [
        "tracking: wandb is switched off: 3 rows wait for it",
        "tracking: wandb did not finish in 0 s; the run ends without it",
    ]


def test_a_tracker_with_too_many_rows_waiting_writes_them_and_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, done = threading.Event(), list[Any]()

    class Slow:
        def log(self, step: int, values: Any) -> None:
            release.wait()
            done.append(step)

        def close(self) -> None:
            done.append("closed")

    monkeypatch.setitem(module._OPEN, "wandb", lambda run: Slow())
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    said: list[str] = []
    trackers = Trackers(["wandb"], TrackedRun(folder=tmp_path, settings={}, first_step=0), said.append)
    for step in range(100):
        trackers.log(step, {})
    release.set()
    trackers.close(wait_s=10)
    assert said == ["tracking: wandb is switched off: 3 rows wait for it"]
    assert done[-1] == "closed"
    assert done[:-1] == list(range(len(done) - 1))
    assert len(done) - 1 in (3, 4)  # the thread may take one out before the others are put in


def test_a_package_that_is_missing_is_named_before_the_run() -> None:
    check_installed(["tensorboard"])
    with pytest.raises(ValueError, match="no_such_tracker is not installed here; pip install"):
        check_installed(["no_such_tracker"])


def test_mlflow_has_every_number_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    assert tracked(tmp_path / "phi", "mlflow") == []
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(module.PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "phi"
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "1e-06"
    assert run.data.params["data.prompts.0.weight"] == "1.0"
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 0.75)]
    path = "answers/evaluation-000002.json"
    assert mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{path}") == {
        "columns": COLUMNS,
        "data": CELLS,
    }
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": path, "type": "table"}]


def leveldb_records(log: bytes) -> list[bytes]:
    """Read records in LevelDB's log format: blocks of 32 KiB, in which a record's parts have a checksum, a length and a
    kind."""
    found, parts, at = [], b"", 0
    while at + 7 <= len(log):
        left = 32768 - (at + 7) % 32768  # the file's own header is in the first block
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            found.append(parts)
            parts = b""
    return found


def test_wandb_offline_has_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "phi").mkdir()
    assert tracked(tmp_path / "phi", "wandb") == []
    (file,) = (tmp_path / "phi" / "wandb").glob("offline-run-*/*.wandb")
    rewards: list[float] = []
    for content in leveldb_records(file.read_bytes()[7:]):
        record = Record()
        record.ParseFromString(content)
        if record.HasField("run"):
            assert record.run.display_name == "phi"
        for item in record.history.item:
            if item.key == "reward/mean" or list(item.nested_key) == ["reward/mean"]:
                rewards.append(float(item.value_json))
    assert rewards == [0.5, 0.75]
    (table,) = file.parent.rglob("*.table.json")
    assert json.loads(table.read_text()) == {"columns": COLUMNS, "data": CELLS}


def test_swanlab_offline_has_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "phi").mkdir()
    assert tracked(tmp_path / "phi", "swanlab") == []
    (run,) = (tmp_path / "phi" / "swanlab").glob("run-*")
    (record,) = run.glob("*.swanlab")
    assert b"reward/mean" in record.read_bytes()
    assert "lr: 1.0e-06" in (run / "files" / "config.yaml").read_text()
    (table,) = (run / "media" / "echarts").iterdir()
    assert json.loads(table.read_text())["rowData"] == [dict(zip(COLUMNS, row, strict=True)) for row in CELLS]


def test_trackio_has_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    assert tracked(tmp_path / "phi", "trackio") == []
    stored = [path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file()]
    for text in (b"reward/mean", b"It is 7. | #### 7", b"phi", b"optim"):
        assert any(text in content for content in stored), text
