"""mu, the weight of the expert branch, as a plain function of the optimizer step (the first step is 0)."""

from __future__ import annotations

import math

from megatron_chord.config import MuConfig


def warmup_cosine(step: int, *, peak: float, valley: float, warmup_steps: int, decay_steps: int) -> float:
    """Linear from 0 to ``peak`` over the warm-up, a half cosine down to ``valley``, then ``valley``.

    As in Trinity-RFT's and ms-swift's CHORD, with the first step at 0: the first update without warm-up uses
    ``peak`` itself. With no warm-up and no decay it is ``valley`` throughout.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= warmup_steps + decay_steps:
        return valley
    progress = (step - warmup_steps) / decay_steps
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * progress))


def mu_at(step: int, mu: MuConfig) -> float:
    """mu of optimizer step ``step``, in [0, 1]."""
    if mu.schedule == "constant":
        return mu.peak
    assert mu.valley is not None
    return warmup_cosine(
        step,
        peak=mu.peak,
        valley=mu.valley,
        warmup_steps=mu.warmup_steps,
        decay_steps=mu.decay_steps,
    )
