"""The answers of an evaluation on disk: one JSON line for each, appended after grading and found again by a key.

An answer's key is a hash of the policy, the prompt's tokens, the seed and the sampling settings. So an interrupted
evaluation continues where it was, and an answer of another policy or of other settings is never used by mistake.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Self

from megatron_chord.config_suite import BenchmarkConfig
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.table import terms_of
from megatron_chord.rollout.replies import GenerateRequest

SAMPLES = "samples"
_REWARDS = Path(__file__).parents[1] / "rewards"
_LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
"""Libraries with which the package's own rewards read mathematics."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer with its grade: a line of ``samples/BENCHMARK.jsonl``."""

    key: str
    problem: str
    sample: int
    """Number of the answer among those to its problem; the first is 0."""
    response: str
    tokens: int
    finish_reason: str
    score: float | None
    """None if the answer could not be graded."""
    error: str | None
    """Why the answer could not be graded."""
    graded_by: str
    """The value of ``grading_of`` when it was graded."""


def key_of(policy: str, dtype: str, request: GenerateRequest) -> str:
    """The key of the answer to a request. ``policy`` is a digest of the weights, ``dtype`` that of the server."""
    asked = [
        policy,
        dtype,
        list(request.prompt_ids),
        request.seed,
        request.temperature,
        request.top_p,
        request.max_tokens,
        list(request.stop_token_ids),
    ]
    return _hash(asked)


def grading_of(benchmark: BenchmarkConfig) -> str:
    """Hash of how a benchmark's answers are graded: the rewards' settings, and the code that grades.

    That is the user's file with the files of its own folder that it imports, or this package's rewards. Reads the
    files, so call it once for many answers.
    """
    assert benchmark.reward is not None
    parts: list[Any] = []
    for term in terms_of(benchmark.reward).values():
        # The number of answers that are graded at a time does not change a grade.
        settings = {name: str(value) for name, value in asdict(term).items() if name != "workers"}
        if isinstance(term, FunctionReward):
            files, versions = _with_its_imports(term.path), []
        else:
            files = sorted(_REWARDS.rglob("*.py"))
            versions = [f"{library} {version(library)}" for library in _LIBRARIES]
        code = [hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in files]
        parts.append([settings, versions, code])
    return _hash(parts)


def _with_its_imports(path: Path) -> list[Path]:
    """A Python file, and the files in its folder that it imports, directly or through others."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        for name in _imported(file):
            waiting += [path.parent / f"{name}.py", *(path.parent / name).rglob("*.py")]
    return sorted(found)


def _imported(file: Path) -> set[str]:
    """Modules and packages that a file imports, by the first part of their names."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # the grader process reports the error
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {item.name.partition(".")[0] for item in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


class AnswerFile:
    """The answers of one benchmark. A later line with the same key counts. Not for several threads."""

    def __init__(self, path: Path) -> None:
        """Read the existing answers. An incomplete last line, written when the process was killed, is removed."""
        self.by_key: dict[str, Answer] = {}
        self._path = path
        self._file: IO[bytes] | None = None
        if not path.is_file():
            return
        whole = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                answer = Answer(**json.loads(line))
                self.by_key[answer.key] = answer
                whole += len(line)
        if whole < path.stat().st_size:
            os.truncate(path, whole)

    def add(self, answers: Sequence[Answer]) -> None:
        """Append answers. When this returns, the kernel has the data."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        self._file.write(b"".join(json.dumps(asdict(answer)).encode() + b"\n" for answer in answers))
        self._file.flush()
        self.by_key |= {answer.key: answer for answer in answers}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
