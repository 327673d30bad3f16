"""The requests of `generate` and `chat`, without a server. tests/e2e/test_talk.py tests the answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_chord.cli import main
from megatron_chord.evaluation.talk import Overrides, ServedPolicy, open_policy_to_talk, prompts_of
from megatron_chord.evaluation.talk_command import HELP, chat
from tests.support.ranks import ROOT

EXAMPLE = ROOT / "examples" / "arithmetic"
POLICY = EXAMPLE / "policy"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The exported policy in the folder of a run."""
    shutil.copytree(POLICY, tmp_path / "policy")
    text = (EXAMPLE / "chord_phi.yaml").read_text()
    assert "data:\n" in text
    settings = text.replace("data:\n", "data:\n  system_prompt: Be brief.\n").replace(
        "problems_", f"{EXAMPLE}/problems_"
    )
    (tmp_path / "config.yaml").write_text(settings)
    return tmp_path / "policy"


def test_a_run_says_how_its_policy_is_asked(exported: Path) -> None:
    with open_policy_to_talk(exported, Overrides(), say=print) as policy:
        assert policy.template.system_prompt == "Be brief."
        assert (policy.max_tokens, policy.max_prompt_tokens) == (48, 64)
        assert policy.server.dtype == "fp32"
        assert policy.temperature == 1.0


def test_options_override_the_settings_of_the_run(exported: Path) -> None:
    overrides = Overrides(temperature=0.5, max_tokens=8, system_prompt="", seed=3)
    with open_policy_to_talk(exported, overrides, say=print) as policy:
        assert policy.template.system_prompt is None
        assert (policy.max_tokens, policy.max_length, policy.temperature, policy.seed) == (8, 72, 0.5, 3)


def test_a_policy_of_no_run_fits_into_its_positions() -> None:
    positions = json.loads((POLICY / "config.json").read_text())["max_position_embeddings"]
    with open_policy_to_talk(POLICY, Overrides(), say=print) as policy:
        assert policy.max_length <= positions
        assert 0 < policy.max_tokens < policy.max_length
    with pytest.raises(ValueError, match="leaves no token for a prompt"):  # noqa: SIM117
        with open_policy_to_talk(POLICY, Overrides(max_tokens=positions), say=print):
            pass


def test_prompts_of_lines_and_of_rows(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("What is 1 + 1?\n\nWhat is 2 + 2?\n")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"id": "a", "problem": "What is 1 + 1?"}\n')  # without a true answer
    with open_policy_to_talk(POLICY, Overrides(), say=print) as policy:
        first, second = prompts_of(lines, policy)
        assert (first.id, second.id) == ("1", "3")
        (row,) = prompts_of(rows, policy)
        assert row.token_ids == first.token_ids
        lines.write_text("\n")
        with pytest.raises(ValueError, match="there is no prompt in it"):
            prompts_of(lines, policy)
        lines.write_text("good\n" + "long " * policy.max_length + "\n")
        with pytest.raises(ValueError, match=r"prompts.txt:2: \d+ prompt tokens, the limit is"):
            prompts_of(lines, policy)


@pytest.mark.parametrize(
    ("options", "reply"),
    [
        (["--temperature", "0", "--samples", "2"], "would be the same answer 2 times"),
        (["--output", "none/x.jsonl"], "--output: none/x.jsonl cannot be written: none is not a folder"),
        (["--server", "http://127.0.0.1:9"], "set VLLM_API_KEY"),
    ],
)
def test_refused_before_a_server_is_started(
    options: list[str],
    reply: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 1 + 1?\n")
    assert main(["generate", str(POLICY), str(prompts), *options]) == 2
    assert reply in capsys.readouterr().err


def test_chat_says_once_that_it_waits_for_the_first_answer() -> None:
    """Both messages are too long, so that no server is needed."""
    lines = iter(["word " * 2000, "word " * 2000, "/quit"])
    shown: list[str] = []
    notes: list[str] = []
    with open_policy_to_talk(POLICY, Overrides(), say=print) as policy:
        served = ServedPolicy(policy=policy, clients=(), version=None)
        chat(served, lambda: next(lines), shown.append, note=notes.append)
    assert notes == ["waiting for the first answer, which takes longer than later ones"]
    assert shown[0] == HELP
    assert [line.startswith("error: the conversation has ") for line in shown[1:]] == [True, True]
