"""The newest supported Megatron-Core passes part of the other tests, and each version resumes checkpoints of the other.

Its wheel is for Python 3.12. The parts that are used here also run on 3.11, so these tests need no second interpreter.
docs/megatron.md has the result of all distributed tests with this version.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.test_checkpoint import SAVED, assert_same_run, interrupted_and_not, resume
from tests.support import newest
from tests.support.ranks import ROOT, run_ranks
from tests.support.tiny import save_model

SELECTED = (
    "test_split_invariance.py::test_recomputed_activations_give_the_same_step",
    "test_families.py::test_a_step_of_chord_is_the_references[qwen3_tied]",
    "test_families.py::test_a_step_of_chord_is_the_references[qwen3_moe_untied]",
    "test_families.py::test_a_step_of_chord_is_the_references[deepseek_v3_untied]",
    "test_families.py::test_a_step_of_chord_is_the_references[deepseek_v2_untied]",
    "test_checkpoint.py::test_a_step_is_torch_adamw_with_clipping_and_schedule[2]",
    "test_checkpoint.py::test_weight_decay_leaves_norms_and_biases_alone",
    "test_collectives.py::test_an_update_sends_what_the_documentation_says",
    "test_host_waits.py::test_every_layout_waits_for_its_norm_and_its_numbers_alone[tp2_sp]",
)
LAYOUTS: dict[str, dict[str, Any]] = {"pp2": {"pipeline": 2}, "ep2": {"expert": 2}}


def test_a_part_of_the_other_tests_passes_on_it() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb", "short"]
    result = subprocess.run(
        [*command, *(f"tests/distributed/{test}" for test in SELECTED)],
        cwd=ROOT,
        env=os.environ | newest.variables(),
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2000:]
    assert f"{len(SELECTED)} passed" in result.stdout


def version_and(function: Any, *args: Any) -> tuple[str, bytes]:
    """Return the version of Megatron-Core that this rank has imported, and the result of ``function``.

    0.19.2 registers a function of its own for unpickling tensors (safe_globals.py), which the other version lacks. A
    result that ``torch.save`` wrote does not name that function.
    """
    stream = io.BytesIO()
    torch.save(function(*args), stream)
    import megatron.core

    return megatron.core.__version__.partition("+")[0], stream.getvalue()


def loaded(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


@pytest.mark.parametrize("reads", ["newest", "pinned"])
def test_each_version_goes_on_from_a_checkpoint_of_the_other(tmp_path: Path, reads: str) -> None:
    """Experts are split over two stages and over two ranks. Rank 0's parameter groups then differ from the other
    ranks'."""
    model = save_model("qwen3_moe", tmp_path / "model")
    settings = {"newest": newest.variables(), "pinned": {}}
    written = settings["pinned" if reads == "newest" else "newest"]
    with mock.patch.dict(os.environ, written):
        before = run_ranks(version_and, 2, interrupted_and_not, model, LAYOUTS, tmp_path / "saved")
    cases = {
        name: (tmp_path / "saved" / name / f"step-{SAVED:06d}", layout) for name, layout in LAYOUTS.items()
    }
    with mock.patch.dict(os.environ, settings[reads]):
        after = run_ranks(version_and, 2, resume, model, cases)
    for (writer, runs), (reader, resumed) in zip(before, after, strict=True):
        assert (newest.VERSION in (writer, reader), writer == reader) == (True, False)
        for name, (through, _) in loaded(runs).items():
            assert_same_run(loaded(resumed)[name], through, name)
