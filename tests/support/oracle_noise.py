"""The three numbers of GAC with Transformers in float64: whole sequences one after the other, with plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_chord.records import TrainSample


def oracle_noise(
    folder: Path, samples: Sequence[TrainSample], *, uses_phi: bool, trim: float
) -> dict[str, float]:
    """The numbers of these samples of CHORD's two terms, at temperature 1."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    advantages, nlls, apart = [], [], []
    for sample in samples:
        (part,) = sample.parts
        ids = torch.from_numpy(np.asarray(sample.token_ids))
        with torch.no_grad():
            probabilities = torch.softmax(model(ids[None]).logits[0], dim=-1)
        chosen = [probabilities[place - 1, ids[place]].item() for place in part.positions.tolist()]
        if not chosen:
            continue
        advantage = 0.0
        if part.term == "policy":
            advantage = float(np.float32(part.constants["advantage"]))
            advantages.append(advantage)
        else:
            nlls.append(-float(np.mean(np.log(chosen))))
        coefficients = [p * (1 - p) if uses_phi else 1.0 for p in chosen]
        apart.append(float(np.mean([(c - advantage) ** 2 for c in coefficients])))
    left_out = int(len(nlls) * trim) if len(nlls) > 3 else 0
    kept = sorted(nlls)[left_out : len(nlls) - left_out]
    return {
        "advantage_variance": float(np.var(advantages)),
        "nll_variance": float(np.var(kept)),
        "disagreement": float(np.mean(apart)),
    }
