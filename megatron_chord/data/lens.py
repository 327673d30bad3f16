"""The token lens: the policy's probability of each token of a demonstration, and the token weight that follows from
it.

    p       the policy's probability of the token, at the temperature of the SFT branch
    phi     p (1 - p)
    weight  -dL/d log p of the token's loss L, with the cutoff: the gradient that raises its log-prob
    pull    weight (1 - p), half the sum of |dL/d logit| over the vocabulary
    share   pull / the sum of the pulls of the demonstration's trained tokens

Weights come from the term of the objective that trains the run's demonstrations, so they are the run's. The model is
Transformers', in float32, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_chord.data.inspect import Example
from megatron_chord.data.observed import Observed
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.data.token_texts import rendered_tokens
from megatron_chord.losses.logprobs import HeadOutput, token_logprobs
from megatron_chord.losses.terms import Term, TermTokens, TokenStats

KNOWN, SURPRISING = 0.99, 0.01
"""Outside these two values of p, phi is below 0.01, 1/25 of its maximum: phi nearly removes such tokens."""


@dataclass(frozen=True)
class LensedRow:
    """A demonstration, and arrays over its K trained tokens, [K] float64 each."""

    example: Example
    positions: np.ndarray
    """[K] int64: the indices of the trained tokens."""
    p: np.ndarray
    weight: np.ndarray

    @property
    def phi(self) -> np.ndarray:
        return self.p * (1 - self.p)

    @property
    def pull(self) -> np.ndarray:
        return self.weight * (1 - self.p)

    @property
    def share(self) -> np.ndarray:
        return self.pull / (self.pull.sum() or 1.0)


@dataclass(frozen=True)
class TokenClass:
    """Tokens whose p lies in one range, and their shares of all trained tokens."""

    name: str
    tokens: float
    """Share of the trained tokens."""
    plain: float
    """Share of the pull if each token has weight 1, as in plain SFT."""
    weighted: float
    """Share of the pull with the run's weight."""


@dataclass(frozen=True)
class Lens:
    policy: str
    weighting: str
    """A description of the token weight, for people."""
    rows: tuple[LensedRow, ...]

    def all(self, name: str) -> np.ndarray:
        """``p``, ``phi``, ``weight`` or ``pull`` of the tokens of all rows."""
        return np.concatenate([getattr(row, name) for row in self.rows])

    @property
    def dropped(self) -> float:
        """Share of the tokens that phi nearly removes: those with p above ``KNOWN`` or below ``SURPRISING``."""
        p = self.all("p")
        return float(((p > KNOWN) | (p < SURPRISING)).mean())

    def classes(self) -> list[TokenClass]:
        p, pull = self.all("p"), self.all("pull")
        plain = 1 - p
        known, surprising = p > KNOWN, p < SURPRISING
        parts = {
            f"known already (p > {KNOWN})": known,
            "being learned": ~known & ~surprising,
            f"a surprise (p < {SURPRISING})": surprising,
        }
        return [
            TokenClass(name, float(mask.mean()), _share(plain, mask), _share(pull, mask))
            for name, mask in parts.items()
        ]


def load_policy(folder: Path) -> Any:
    """The causal language model at ``folder``, in float32, for inference.

    Raises:
        ValueError: Transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not folder.is_dir():
        raise ValueError(f"--policy: {folder}: no such folder; it must be a local Hugging Face folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # any exception that a loader raises for the folder's files
        raise ValueError(f"--policy: {folder}: no model can be loaded from it: {error}") from error
    return model.eval()


def compute_lens(
    model: Any, template: ChatTemplate, rows: Iterable[Observed], term: Term, *, policy: str, weighting: str
) -> Lens:
    """Compute the lens of ``rows``, as if these demonstrations were trained together in one update.

    Args:
        term: a term of the objective. Its temperature, its loss and its values over the whole update are used.
        policy: the name of the model, for people.
        weighting: the description of the token weight, as in ``Lens``.

    Raises:
        ValueError: a token is beyond the model's vocabulary.
    """
    examples = [Example("sampled", seen, rendered_tokens(template, seen)) for seen in rows]
    found = [_stats(model, example.seen, term) for example in examples]
    weights = _weights(found, term)
    return Lens(
        policy,
        weighting,
        tuple(
            LensedRow(
                example,
                _positions(example.seen),
                stats.logprobs.double().exp().numpy(),
                weight.double().numpy(),
            )
            for example, stats, weight in zip(examples, found, weights, strict=True)
        ),
    )


def _positions(seen: Observed) -> np.ndarray:
    return np.flatnonzero(seen.trainable)


def _stats(model: Any, seen: Observed, term: Term) -> HeadOutput:
    """Statistics of the trained tokens, computed from the hidden states before them."""
    head = model.get_output_embeddings()
    if max(seen.token_ids) >= len(head.weight):
        raise ValueError(
            f"--policy: {seen.place} has token {max(seen.token_ids)}, the model has {len(head.weight)}"
        )
    if getattr(head, "bias", None) is not None:
        raise ValueError("--policy: the model's head has a bias, which the trainer does not know")
    ids = torch.tensor(seen.token_ids)
    positions = torch.from_numpy(_positions(seen))
    with torch.inference_mode():
        hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return token_logprobs(
        hidden[positions - 1].clone(),
        head.weight.detach(),
        ids[positions],
        temperature=term.temperature or 1.0,
        rival=term.rival,
    )


def _weights(found: Sequence[HeadOutput], term: Term) -> tuple[Tensor, ...]:
    """-dL/d log p of each row's tokens; L is their loss before averaging."""
    counts = [len(stats.logprobs) for stats in found]
    joined = {
        name: torch.cat([getattr(stats, name).detach() for stats in found])
        for name in ("logprobs", "entropy", *(["rival"] if term.rival else []))
    }
    columns: dict[str, Tensor] = {"old_entropy": joined["entropy"], "old_logprob": joined["logprobs"]}
    tokens = _tokens(counts, columns)
    if term.prepare is not None:
        (more,) = term.prepare([tokens], _Alone())
        tokens = _tokens(counts, {**columns, **more})
    logprobs = joined["logprobs"].clone().requires_grad_(True)
    stats = TokenStats(logprobs, joined["entropy"], joined.get("rival"))
    (gradient,) = torch.autograd.grad(term.loss(stats, tokens).loss.sum(), logprobs)
    return (-gradient).split(counts)


def _tokens(counts: Sequence[int], columns: Mapping[str, Tensor]) -> TermTokens:
    held = torch.tensor(counts)
    return TermTokens(
        index=torch.arange(int(held.sum())),
        sequence=torch.repeat_interleave(torch.arange(len(counts)), held),
        lengths=held.float(),
        held=held,
        columns=columns,
    )


class _Alone:
    """Reductions for a single process that has all tokens."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def collect(self, values: Tensor) -> Tensor:
        return values


def _share(values: np.ndarray, mask: np.ndarray) -> float:
    return float(values[mask].sum() / (values.sum() or 1.0))


def words(row: LensedRow) -> Iterator[tuple[str, float, float, float]]:
    """(text, p, weight, share) of the trained tokens."""
    tokens = row.example.rendered.tokens
    for position, p, weight, share in zip(row.positions, row.p, row.weight, row.share, strict=True):
        yield tokens[position].text, float(p), float(weight), float(share)
