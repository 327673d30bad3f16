"""The README's two commands bring a file from verl's GSM8K script to a training step."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from tests.support.task import make_task, metrics_of, run_cli

ASK = ' Put the answer after "####".'


def write_verl_rows(path: Path) -> Path:
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{i} + {i + 1} =" + ASK}],
            "ability": "math",
            "reward_model": {"ground_truth": str(2 * i + 1), "style": "rule"},
            "extra_info": {
                "answer": f"#### {2 * i + 1}",
                "index": i,
                "question": f"{i} + {i + 1} =",
                "split": "train",
            },
        }
        for i in range(8)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_two_commands_bring_a_verl_file_to_a_training_step(tmp_path: Path) -> None:
    task = make_task(tmp_path, steps=1)
    file = write_verl_rows(tmp_path / "train.parquet")
    both = (f"data.prompts={file}", f"data.demonstrations={file}", "data.max_prompt_tokens=80")

    shown = run_cli("data", str(task), *both)
    assert shown.returncode == 0, shown.stderr
    assert "prompts     " + str(file) + ": 8 of 8 rows; read as verl RL" in shown.stdout
    assert "8 of 8 problems of demonstrations are also in prompts" in shown.stdout
    assert f"0 + 1 ={ASK}[~<|im_end|>\n<|im_start|>assistant\n~]{{+#### 1+}}" in shown.stdout

    trained = run_cli("train", str(task), *both, "data.evaluation=null")
    assert trained.returncode == 0, trained.stderr
    (step,) = metrics_of(tmp_path / "out")
    assert step["step"] == 0
    samples = [json.loads(line) for line in next((tmp_path / "out" / "samples").iterdir()).open()]
    assert len(samples) == 16
    assert {sample["truth"] for sample in samples} <= {str(2 * i + 1) for i in range(8)}
