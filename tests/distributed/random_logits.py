"""A program of one rank: it compares Megatron-Core's logits of random models with those of Transformers.

python -m tests.distributed.random_logits --first 1000 --count 250    # a table, and exit code 1 for a difference
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chord.config import ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.runtime.parallel import ParallelGroups
from tests.distributed import steps
from tests.support.random_models import POSITIONS, draw_config, save_random_model

TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Outcome:
    seed: int
    family: str
    refused: str | None = None
    """Why this project refuses the model."""
    failed: str | None = None
    """Why Transformers does not take the configuration."""
    difference: float | None = None
    """The largest difference of a logit. It is None where no logits were computed."""
    largest: float | None = None
    """The largest absolute value of Transformers' logits."""


def compare(seeds: Sequence[int], folder: Path) -> list[Outcome]:
    """Return, for each seed, the largest difference of a logit, or the reason why the model is refused."""
    groups = steps.start_groups(ParallelConfig())
    return [_compared(seed, folder / str(seed), groups) for seed in seeds]


def _compared(seed: int, folder: Path, groups: ParallelGroups) -> Outcome:
    family = draw_config(seed)["model_type"]
    try:
        save_random_model(seed, folder)
        expected = _transformers(folder, _tokens(seed))
    except Exception as error:
        return Outcome(seed=seed, family=family, failed=_first_line(error))
    try:
        read_shape(folder)
    except ValueError as error:
        return Outcome(seed=seed, family=family, refused=_first_line(error).rpartition("config.json of ")[2])
    state = steps.build(folder, ParallelConfig(), groups=groups)
    (found,) = steps.logits_of(state, [_tokens(seed)])
    return Outcome(
        seed=seed,
        family=family,
        difference=float((torch.as_tensor(found) - expected).abs().max()),
        largest=float(expected.abs().max()),
    )


def _tokens(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    vocab = draw_config(seed)["vocab_size"]
    return torch.randint(0, vocab, (POSITIONS,), generator=generator).tolist()


@torch.no_grad()
def _transformers(folder: Path, token_ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(torch.tensor([token_ids])).logits[0]


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
