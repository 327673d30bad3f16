"""Names on the hub are found in a cache with huggingface_hub's layout: blobs, refs, and snapshots of links."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_chord import hub
from megatron_chord.cli import main
from megatron_chord.config import SourceConfig
from megatron_chord.config_io import ConfigError, load_config
from megatron_chord.data.rows import KINDS
from megatron_chord.hub import HubName, read_name
from tests.support.files import write_rows
from tests.support.ranks import ROOT

POLICY = ROOT / "examples" / "arithmetic" / "policy"
ROWS = ROOT / "examples" / "arithmetic"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUN = """output: out
steps: 1
model: {path: small/policy, dtype: fp32}
data:
  prompts: hf://datasets/small/sums/main/train-*.jsonl
  demonstrations: {path: hf://datasets/small/sums@v1/demonstrations.jsonl, name: d}
  max_prompt_tokens: 64
  max_response_tokens: 64
batch: {prompts: 2, rollouts: 2, demonstrations: 2}
"""


def put(cache: Path, folder: str, files: dict[str, Path], revision: str = "main") -> Path:
    """Put a repository into the cache. Return its snapshot."""
    repository = cache / folder
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    for name, source in files.items():
        blob = repository / "blobs" / name.replace("/", "-")
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(source.read_bytes())
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "SLURM_JOB_ID", "RANK", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    return folder


def run_file(tmp_path: Path, text: str = RUN) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_a_run_is_read_from_the_cache_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = put(cache, "models--small--policy", {file.name: file for file in POLICY.iterdir()})
    data = put(cache, "datasets--small--sums", {"main/train-0.jsonl": ROWS / "problems_train.jsonl"})
    put(
        cache, "datasets--small--sums", {"demonstrations.jsonl": ROWS / "demonstrations.jsonl"}, revision="v1"
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = load_config(run_file(tmp_path))
    assert run.model.path == model
    assert run.data.prompts[0].path == (data / "main" / "train-*.jsonl",)
    monkeypatch.chdir(tmp_path)
    assert main(["check", "run.yaml"]) == 0
    assert "1000 of 1000 rows" in capsys.readouterr().out


def test_what_is_not_in_the_cache_is_refused_with_the_command(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    run_file(tmp_path)
    assert main(["check", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: run.yaml:3: model.path: small/policy is not a path and is not completely in the Hugging"
    )
    assert "HF_HUB_OFFLINE is set. Download it first: hf download small/policy\n" in error
    put(cache, "models--small--policy", {file.name: file for file in POLICY.iterdir()})
    assert main(["check", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert "hf download small/sums --repo-type dataset --include 'main/train-*.jsonl'\n" in error


@pytest.mark.parametrize(
    ("name", "value"), [("SLURM_JOB_ID", "3"), ("RANK", "0"), ("TRANSFORMERS_OFFLINE", "true")]
)
def test_nothing_is_downloaded_in_a_job_or_offline(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"Download it first: hf download a/b --revision v2$"):
        hub.fetch(HubName("model", "a/b", "v2"), print)


def test_a_download_that_fails_says_so_with_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    said: list[str] = []
    with pytest.raises(
        ValueError, match=r"the download failed: no route to host. Download it first: hf download a/b$"
    ):
        hub.fetch(HubName("model", "a/b"), said.append)
    assert said == [f"downloading a/b into {cache}"]


def test_a_folder_of_the_name_comes_first(cache: Path, tmp_path: Path) -> None:
    put(cache, "models--small--policy", {file.name: file for file in POLICY.iterdir()})
    (tmp_path / "small" / "policy").mkdir(parents=True)
    assert load_config(run_file(tmp_path)).model.path == tmp_path / "small" / "policy"


def test_half_a_model_is_none(cache: Path) -> None:
    put(cache, "models--a--b", {"config.json": POLICY / "config.json"})
    assert hub.cached(HubName("model", "a/b")) is None


def test_a_data_set_of_several_files_needs_a_path(cache: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", {"problem": "?", "answer": "1"})
    put(cache, "datasets--a--b", {"train.jsonl": rows})
    assert (
        hub.cached(HubName("dataset", "a/b"))
        == cache / "datasets--a--b" / "snapshots" / COMMIT / "train.jsonl"
    )
    put(cache, "datasets--a--b", {"test.jsonl": rows})
    text = RUN.replace("hf://datasets/small/sums/main/train-*.jsonl", "hf://datasets/a/b")
    with pytest.raises(
        ConfigError, match=r"run.yaml:5: hf://datasets/a/b has several files; .*: test.jsonl, train.jsonl"
    ):
        load_config(run_file(tmp_path, text))


def test_which_texts_are_names() -> None:
    assert read_name("Qwen/Qwen2.5-7B-Instruct", "model") == HubName("model", "Qwen/Qwen2.5-7B-Instruct")
    assert read_name("a/b@v1", "model") == HubName("model", "a/b", "v1")
    for path in ("policy", "./a/b", "../b", "/a/b", "a/b/c", "~/a"):
        assert read_name(path, "model") is None
    inside = read_name("hf://datasets/openai/gsm8k@abc/main/train-*.parquet", "dataset")
    assert inside == HubName("dataset", "openai/gsm8k", "abc", "main/train-*.parquet")
    assert inside is not None
    for name in (inside, HubName("model", "a/b", "v1"), HubName("dataset", "a/b")):
        assert hub.unresolved_name(name.unresolved) == name
    assert read_name("openai/gsm8k", "dataset") is None


@pytest.mark.parametrize(
    ("inside", "numbers", "is_whole"),
    [
        ("data/train-*.parquet", [0], False),
        ("data/train-*.parquet", [0, 1], False),
        ("data/train-*.parquet", [0, 1, 2], True),
        ("data/train-*.parquet", [1, 2, 3], True),
        ("data/train-*.parquet", [1, 2], False),
        ("data/train-0000[01]-of-00003.parquet", [0, 1], True),
        ("data/train-0000[01]-of-00003.parquet", [0], False),
        ("data/train-00001-of-00003.parquet", [1], True),
        ("data", [0, 2], False),
        ("data", [0, 1, 2], True),
        ("", [0], False),
    ],
)
def test_a_data_set_without_some_of_its_shards_is_not_whole(
    inside: str, numbers: list[int], is_whole: bool, cache: Path
) -> None:
    names = [f"data/train-{number:05}-of-00003.parquet" for number in numbers]
    put(cache, "datasets--o--n", dict.fromkeys(names, ROWS / "problems_train.jsonl"))
    assert (hub.cached(HubName("dataset", "o/n", inside=inside)) is not None) == is_whole


@pytest.mark.parametrize(
    ("inside", "present", "is_whole"),
    [
        ("data/*.jsonl", ["data/a.jsonl"], False),
        ("data/*.jsonl", ["data/a.jsonl", "data/b.jsonl"], True),
        ("data/a*.jsonl", ["data/a.jsonl"], True),
        ("data", ["data/a.jsonl"], False),
        ("data", ["data/a.jsonl", "data/b.jsonl"], True),
        ("*/*.jsonl", ["data/a.jsonl", "data/b.jsonl"], False),
        ("data/a.jsonl", ["data/a.jsonl"], True),
    ],
)
def test_a_data_set_is_whole_as_of_the_list_of_its_repository_s_files(
    inside: str, present: list[str], is_whole: bool, cache: Path
) -> None:
    put(cache, "datasets--o--n", dict.fromkeys(present, ROWS / "problems_train.jsonl"))
    list_files(cache, "datasets--o--n", "data/a.jsonl", "data/b.jsonl", "more/c.jsonl", "data/figure.png")
    assert (hub.cached(HubName("dataset", "o/n", inside=inside)) is not None) == is_whole


def test_a_data_set_of_several_files_of_which_one_is_there_needs_a_path(cache: Path) -> None:
    snapshot = put(cache, "datasets--o--n", {"a.jsonl": ROWS / "problems_train.jsonl"})
    assert hub.cached(HubName("dataset", "o/n")) == snapshot / "a.jsonl"
    list_files(cache, "datasets--o--n", "a.jsonl", "b.jsonl", "README.md")
    with pytest.raises(ValueError, match=r"has several files; .*: a.jsonl, b.jsonl"):
        hub.cached(HubName("dataset", "o/n"))


def list_files(cache: Path, repository: str, *names: str) -> None:
    """Write the list of a repository's files, as huggingface_hub keeps it beside the snapshots."""
    file = cache / repository / "trees" / f"{COMMIT}.json"
    file.parent.mkdir()
    entries = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    file.write_text(json.dumps({"format_version": 1, "files": entries}))


@pytest.mark.parametrize("has_index", [True, False])
def test_a_model_without_some_of_its_weights_is_not_whole(
    has_index: bool, cache: Path, tmp_path: Path
) -> None:
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    files = {"config.json": index, shards[0]: index}
    put(cache, "models--o--n", {**files, "model.safetensors.index.json": index} if has_index else files)
    assert hub.cached(HubName("model", "o/n")) is None
    snapshot = put(cache, "models--o--n", {shards[1]: index})
    assert hub.cached(HubName("model", "o/n")) == snapshot


@pytest.mark.parametrize("ending", [f"{kind}{packed}" for kind in KINDS for packed in ("", ".gz", ".zst")])
def test_the_only_file_of_a_data_set_may_be_of_any_kind_that_is_read(ending: str, cache: Path) -> None:
    snapshot = put(cache, "datasets--o--n", {f"rows{ending}": ROWS / "problems_train.jsonl"})
    assert hub.cached(HubName("dataset", "o/n")) == snapshot / f"rows{ending}"


@pytest.mark.parametrize("inside", ["", "/a.jsonl", "/*.jsonl", "/[ab].jsonl", "/?.jsonl"])
def test_a_source_has_the_same_label_before_and_after_the_download(
    inside: str, cache: Path, tmp_path: Path
) -> None:
    text = f"hf://datasets/small/sums@v1{inside}"
    before = SourceConfig(path=(hub.resolve(text, "dataset", tmp_path),))
    put(cache, "datasets--small--sums", {"a.jsonl": ROWS / "problems_train.jsonl"}, revision="v1")
    after = SourceConfig(path=(hub.resolve(text, "dataset", tmp_path),))
    assert before.path != after.path
    assert before.label == after.label == "sums"
