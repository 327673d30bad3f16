"""The Python API of the package: ``from megatron_chord import load_config, train, evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chord.config_io import load_config, load_suite
from megatron_chord.train.from_python import RunFailed, Trained, train

__all__ = ["Evaluated", "RunFailed", "Trained", "evaluate", "load_config", "train"]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    folder: Path
    """Folder with the answers and tables."""
    results: dict[str, Any]
    """The content of results.json."""


def evaluate(
    policy: Path | str,
    suite: Path | str,
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    say: Callable[[str], None] = print,
) -> Evaluated:
    """Let a policy answer a suite of benchmarks, as `megatron-chord evaluate` does. Main thread only.

    Args:
        policy: a Hugging Face folder, or a run's checkpoints/step-N.
        suite: a YAML file, or the name of one in examples/suites, such as ``paper``.
        overrides: settings of the suite to change, such as ``samples=2``.
        output: folder for answers and results; answers in it are kept. Default: evaluations/SUITE/POLICY.

    Raises:
        ValueError: a file is missing, or the policy, the data or the settings cannot be used. Nothing was sampled.
        RolloutError, ServerError: the servers failed too often. The answers so far are kept.
    """
    from megatron_chord.evaluation import evaluate as evaluation
    from megatron_chord.evaluation.command import suite_path
    from megatron_chord.evaluation.policy import label_of

    source, path = Path(policy), suite_path(str(suite))
    folder = output or Path("evaluations") / path.stem / label_of(source)
    results = evaluation.evaluate(
        source, load_suite(path, overrides), suite_name=path.stem, output=folder, say=say
    )
    return Evaluated(folder=folder, results=results)
