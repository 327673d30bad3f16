"""Which folders can be evaluated, the name of a policy, and how a policy is recognised as the same."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_chord.cli import main
from megatron_chord.config_io import dump_config, load_config
from megatron_chord.config_suite import BenchmarkConfig, SamplingConfig, SuiteConfig
from megatron_chord.convert.directions import to_hf, to_megatron
from megatron_chord.convert.sources import open_source
from megatron_chord.evaluation import policy
from megatron_chord.evaluation.evaluate import load_suite_data
from megatron_chord.evaluation.policy import default_output, label_of, open_policy
from megatron_chord.families.table import read_shape
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward
from megatron_chord.runtime import parallel as runtime
from tests.support.ranks import ROOT

POLICY = ROOT / "examples" / "arithmetic" / "policy"


def test_names() -> None:
    assert label_of(Path("runs/x/checkpoints/step-000100")) == "x-step-000100"
    assert label_of(Path("runs/x/policy")) == "x-policy"
    assert label_of(Path("models/Qwen2.5-7B")) == "Qwen2.5-7B"


def test_results_are_where_the_report_of_the_run_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "x"
    steps = [Path(f"x/checkpoints/step-00010{i}") for i in range(2)]
    for folder in (Path("x/policy"), *steps, Path("models/policy")):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    assert default_output(Path("x/policy"), "paper") == run / "evaluations/paper/x-policy"
    assert default_output(Path("x/checkpoints"), "paper") == run / "evaluations/paper/x-checkpoints"
    assert [default_output(step, "paper") for step in steps] == [
        run / "evaluations/paper/x-step-000100",
        run / "evaluations/paper/x-step-000101",
    ]
    # `models` is not a run.
    assert default_output(Path("models/policy"), "paper") == Path("evaluations/paper/models-policy")
    assert default_output(Path("x"), "paper") == Path("evaluations/paper/x")
    monkeypatch.chdir(run / "policy")
    assert default_output(Path(), "paper") == run / "evaluations/paper/x-policy"


def test_the_digest_is_of_contents(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(POLICY, copy)
    (tmp_path / "out").mkdir()
    first = open_policy(copy, tmp_path / "out", print).digest
    for file in copy.iterdir():
        os.utime(file)
    assert open_policy(copy, tmp_path / "out", print).digest == first
    (copy / "README.md").write_text("not part of the policy")
    assert open_policy(copy, tmp_path / "out", print).digest == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert open_policy(copy, tmp_path / "out", print).digest != first


def test_a_converted_policy_is_of_this_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The output folder may belong to a run. Its own `policy/` is neither evaluated nor deleted."""
    # The real conversion, without the extra process that keeps it off the GPUs.
    request.addfinalizer(runtime.stop)
    monkeypatch.setattr(policy, "_convert", lambda source, target: to_hf(open_source(source), target))
    other = tmp_path / "other"
    shutil.copytree(POLICY, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-4] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    first, second, run = tmp_path / "first", tmp_path / "second", tmp_path / "run"
    to_megatron(open_source(POLICY), first)
    to_megatron(open_source(other), second)
    shutil.copytree(other, run / "policy")

    said: list[str] = []
    found = open_policy(first, run, said.append)
    assert said == [f"converting {first}"]
    assert tensors_of(found.folder) == tensors_of(POLICY)
    assert found.was_converted
    assert found.folder != run / "policy"
    assert open_policy(first, run, said.append).digest == found.digest
    assert len(said) == 1, "the same checkpoint is not converted again"

    changed = open_policy(second, run, said.append)
    assert said[-1] == f"converting {second}"
    assert tensors_of(changed.folder) == tensors_of(other) != tensors_of(POLICY)
    assert changed.digest != found.digest
    # The path is the same but the weights are new, as after a run that started again.
    shutil.rmtree(second)
    first.rename(second)
    assert open_policy(second, run, said.append).digest == found.digest

    (found.folder / "source.json").unlink()
    open_policy(second, run, said.append)
    assert said[-1] == f"converting {second}", "a folder that is not whole is made again"
    assert tensors_of(run / "policy") == tensors_of(other)


def tensors_of(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for file in folder.glob("*.safetensors"):
        found |= {name: value.numpy().tobytes() for name, value in load_file(file).items()}
    return found


def test_functions_are_shown_as_in_the_policys_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(POLICY, run / "policy")
    assert open_policy(run / "policy", tmp_path, print).tools_as == "auto"
    example = load_config(ROOT / "examples" / "arithmetic" / "chord_mu.yaml", ["data.tools_as=template"])
    (run / "config.yaml").write_text(dump_config(example))
    policy = open_policy(run / "policy", tmp_path, print)
    assert policy.tools_as == "template"

    template = tmp_path / "tools.jinja"
    template.write_text("{{ tools }}" + (POLICY / "chat_template.jinja").read_text())
    row = {"problem": "2+3", "answer": [], "tools": [{"name": "add", "description": "a", "parameters": {}}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))

    def first_messages(**settings: Any) -> tuple[Any, Any]:
        suite = SuiteConfig(
            benchmarks=(BenchmarkConfig(name="b", file=str(tmp_path / "rows.jsonl")),),
            chat_template=template,
            reward=ToolCallsReward(),
            max_prompt_tokens=1000,
            sampling=SamplingConfig(max_tokens=8),
            **settings,
        )
        shape = replace(read_shape(POLICY), max_positions=4096)
        (loaded,) = load_suite_data(policy, suite, shape)
        return loaded.prompts[0].messages, loaded.prompts[0].tools

    messages, tools = first_messages()
    assert [message["role"] for message in messages] == ["user"]
    assert tools[0]["function"]["name"] == "add"
    messages, tools = first_messages(tools_as="system_message")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert tools == ()

    said: list[str] = []
    (run / "config.yaml").write_text("of: another version\n")
    assert open_policy(run / "policy", tmp_path, said.append).tools_as == "auto"
    assert "auto is used" in said[0]


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no such folder; POLICY is"):
        open_policy(tmp_path / "none", tmp_path, print)
    with pytest.raises(ValueError, match=r"neither a Hugging Face folder .* nor a checkpoint"):
        open_policy(tmp_path, tmp_path, print)
    (tmp_path / "run" / "policy").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"/run is the folder of a run: give .*/run/policy$"):
        open_policy(tmp_path / "run", tmp_path, print)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert main(["evaluate", str(POLICY), "--suite", "arithmetic", "--server", "http://127.0.0.1:9"]) == 2
    assert "set VLLM_API_KEY" in capsys.readouterr().err
    assert main(["evaluate", str(POLICY), "--suite", "none.yaml"]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err
