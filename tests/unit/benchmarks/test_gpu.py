"""``python -m benchmarks.gpu`` works on a CPU with real parts in tiny shapes, also when a part fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import parts as table_of_parts
from benchmarks.gpu.driver import WHOLE, run_parts
from benchmarks.gpu.kernels import grouped
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.rows import Rows, ceilings, completed, read_rows

ROOT = Path(__file__).resolve().parents[3]
NO_GPU = Machine(
    gpu="none",
    has_cuda=False,
    capability=(),
    cuda="",
    has_transformer_engine=False,
    versions={"torch": "1"},
    commit="abc",
)


def driver(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.slow
def test_a_rehearsal_from_end_to_end(tmp_path: Path) -> None:
    done = driver("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    by_case = {(row["part"], row["case"]): row for row in rows}
    for row in rows:
        assert row["status"] != "failed", row
        assert {"date", "gpu", "versions", "commit", "command"} <= row.keys()
        assert row["gpu"].startswith("CPU")
        if "ceiling" in row and row["ceiling"] in ("products", "copies"):
            bound = next(r for r in rows if r["part"] == "ceilings" and r.get("ceiling") == row["ceiling"])
            expected = (row["amount"] / row["seconds"]) / (bound["amount"] / bound["seconds"])
            assert row["share"] == pytest.approx(expected)
    for part in ("memory", "te-update", "fp8-blocks"):
        assert by_case[part, WHOLE]["status"] == "not run"
        assert "needs" in by_case[part, WHOLE]["reason"]
    assert by_case["ceilings", "FP8 products of 256"]["status"] == "not run"
    assert "CUDA" in by_case["parity", "tests/gpu/test_head.py"]["reason"]
    for shape in ("7b", "70b"):
        update = by_case[f"update-{shape}", "update"]
        assert update["amount"] == pytest.approx(
            update["details"]["tflops_per_gpu"] * 1e12 * update["seconds"]
        )
        assert update["details"]["tokens"] > 0
        assert by_case[f"update-{shape}", "kernels: products"]["seconds"] > 0
        assert by_case["head", f"{shape}: naive"]["details"]["mean_logprob"] == pytest.approx(
            by_case["head", f"{shape}: ours, 256 MiB"]["details"]["mean_logprob"], abs=0.02
        )
        assert (tmp_path / f"update-{shape}-profile.txt").stat().st_size > 1000
    table = (tmp_path / "table.txt").read_text()
    assert "of products" in table
    assert "needs a CUDA device" in table
    again = driver("--table", str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert again.stdout.split() == table.split()


def part(name: str, code: str, limit: int = 60) -> Part:
    return Part(name=name, what=name, limit=limit, command=("-c", code))


def is_running(pid: int) -> bool:
    """Return whether the process runs. A zombie does not run."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state in "ZX":
            return False
        time.sleep(0.05)
    return True


def test_a_part_that_fails_or_hangs_does_not_stop_the_rest(tmp_path: Path) -> None:
    """A failed part keeps its rows but no process. A part that exceeds the budget is left out, and a shorter part still
    runs."""
    rows = Path(tmp_path / "hangs.jsonl")
    hangs = (
        f"import pathlib, subprocess, time; from benchmarks.gpu.rows import Rows;"
        f" Rows(pathlib.Path({str(rows)!r}), 'hangs').found('half', done=1);"
        f" child = subprocess.Popen(['sleep', '300']);"
        f" pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); time.sleep(300)"
    )
    said: list[str] = []
    found = run_parts(
        [
            part("fails", "print('working'); raise ValueError('no such shape')"),
            part("hangs", hangs, limit=5),
            part("long", "pass", limit=5000),
            part("last", "print('here')"),
        ],
        NO_GPU,
        folder=tmp_path,
        budget=1000,
        say=said.append,
    )
    whole = {row["part"]: row for row in found if row["case"] == WHOLE}
    assert whole["fails"]["status"] == "failed"
    assert whole["fails"]["reason"] == "exit 1: ValueError: no such shape"
    assert whole["hangs"]["status"] == "failed"
    assert "its limit of 5 s" in whole["hangs"]["reason"]
    assert [row["details"] for row in found if row["case"] == "half"] == [{"done": 1}]
    assert not is_running(int((tmp_path / "pid").read_text()))
    assert whole["long"]["status"] == "not run"
    assert "5000 s" in whole["long"]["reason"]
    assert whole["last"]["status"] == "ok"
    assert read_rows(tmp_path / "rows.jsonl") == found
    assert any("no such shape" in line for line in said)


def test_what_cannot_be_is_said_before_anything_starts(tmp_path: Path) -> None:
    unknown = driver("--parts", "head,heads")
    assert unknown.returncode == 2
    assert "no part heads" in unknown.stderr
    (tmp_path / "rows.jsonl").write_text("{}\n")
    taken = driver("--tiny", "--out", str(tmp_path))
    assert taken.returncode == 2
    assert "holds the rows of another run" in taken.stderr
    nothing = driver("--table", str(tmp_path / "none"))
    assert nothing.returncode == 2
    assert "is not the folder of a run" in nothing.stderr


def test_shares_are_of_the_ceiling_that_bounds_a_time(tmp_path: Path) -> None:
    """300 FLOPs in 2 s, where 600 per second are possible, are a quarter. Without a ceiling there is no share."""
    ceiling, own = Rows(tmp_path / "rows", "ceilings"), Rows(tmp_path / "rows", "head")
    ceiling.measured("products", 0.5, amount=300, ceiling="products")
    own.measured("ours", 2.0, amount=300, ceiling="products")
    own.measured("moved", 2.0, amount=300, ceiling="copies")
    rows = read_rows(tmp_path / "rows")
    bounds = ceilings(rows)
    assert bounds == {"products": 600.0}
    found = [completed(row, bounds, {"gpu": "x"}) for row in rows]
    assert [row.get("share") for row in found] == [1.0, 0.25, None]
    assert found[2]["rate"] == 150.0
    with (tmp_path / "rows").open("a") as file:
        file.write('{"part": "cut sh')
    assert len(read_rows(tmp_path / "rows")) == 3, "a part that was stopped may leave half a line"


def test_kernels_are_grouped_by_their_names() -> None:
    names = {
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT": "products",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": "products",
        "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7": "attention",
        "_differentiate": "head's sweeps",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": "communication",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "Memcpy DtoH (Device -> Pinned)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>": "elementwise",
        "something_new": "other",
    }
    found = grouped((name, 1.0) for name in names)
    expected: dict[str, float] = {}
    for group in names.values():
        expected[group] = expected.get(group, 0.0) + 1.0
    assert found == expected


def test_every_part_can_be_started() -> None:
    """The module and the test files of each part exist, and no two parts share a name."""
    for one in PARTS:
        assert one.command[0] == "-m" or (ROOT / one.command[0]).is_file()
        for word in one.command:
            if word.startswith("benchmarks.gpu"):
                assert (ROOT / (word.replace(".", "/") + ".py")).is_file()
            if word.startswith("tests/"):
                assert (ROOT / word).is_file()
    assert len(table_of_parts.BY_NAME) == len(PARTS)
    assert PARTS[0].name == "ceilings"
