"""What can be evaluated, under which name, and how it is told to be the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_chord.cli import main
from megatron_chord.evaluation.policy import label_of, open_policy
from tests.support.ranks import ROOT

POLICY = ROOT / "examples" / "arithmetic" / "policy"


def test_names() -> None:
    assert label_of(Path("runs/x/checkpoints/step-000100")) == "x-step-000100"
    assert label_of(Path("runs/x/policy")) == "x-policy"
    assert label_of(Path("models/Qwen2.5-7B")) == "Qwen2.5-7B"


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


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no such folder; POLICY is"):
        open_policy(tmp_path / "none", tmp_path, print)
    with pytest.raises(ValueError, match=r"neither a Hugging Face folder .* nor a checkpoint"):
        open_policy(tmp_path, tmp_path, print)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert main(["evaluate", str(POLICY), "--suite", "arithmetic", "--server", "http://127.0.0.1:9"]) == 2
    assert "set VLLM_API_KEY" in capsys.readouterr().err
    assert main(["evaluate", str(POLICY), "--suite", "none.yaml"]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
