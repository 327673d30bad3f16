"""The log-prob head is right when two ranks share the vocabulary in equal or unequal parts, or when one part is empty.

Both versions are tested: the sweeps in torch, and Triton's kernels in Triton's interpreter.
"""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.losses.logprobs import token_logprobs
from tests.support.head import head_inputs
from tests.support.interpreter import run_with_triton
from tests.support.ranks import run_ranks

TOKENS, HIDDEN, VOCAB, TEMPERATURE = 19, 8, 21, 0.7
SPLITS = {"halves": 10, "padded": 16, "second empty": VOCAB, "first empty": 0, "one row": 1}
"""Rows of the first rank. The second rank holds the rest of the 21. The head never gets rows of padding. In
"one row" the first target is the only row of its shard."""


def factors() -> Tensor:
    return torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads(cases: list[dict[str, Any]], sweep: str) -> list[dict[str, Any]]:
    """Return, for every case: the values, this rank's gradients, and the collectives."""
    sweeps = importlib.import_module(f"megatron_chord.losses.logit_kernels_{sweep}")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    calls: list[torch.Size] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.shape)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    results = []
    for case in cases:
        hidden, weight, targets = head_inputs(TOKENS, HIDDEN, VOCAB, case["dtype"], scale=case["scale"])
        hidden, targets = hidden[: case["tokens"]].requires_grad_(), targets[: case["tokens"]]
        weight, targets = weight[: case["vocab"]], targets.clamp(max=case["vocab"] - 1)
        cut = case["cut"]
        shard = (weight[:cut] if dist.get_rank() == 0 else weight[cut:]).clone().requires_grad_()
        calls.clear()
        logprobs, entropy, rival, _ = token_logprobs(
            hidden,
            shard,
            targets,
            first_row=0 if dist.get_rank() == 0 else cut,
            temperature=TEMPERATURE,
            group=dist.group.WORLD,
            chunk=case["chunk"],
            rival=case["rival"],
            kernels=sweeps,
        )
        forward = list(calls)
        weighting = factors()[:, : case["tokens"]].to(logprobs.dtype)
        (weighting[0] @ logprobs + weighting[1] @ entropy).backward()
        results.append(
            {
                "log-probs": logprobs.detach(),
                "entropy": entropy.detach(),
                "rival": rival,
                "hidden.grad": hidden.grad,
                "weight.grad": shard.grad,
                "forward": forward,
                "backward": calls[len(forward) :],
            }
        )
    dist.all_reduce = all_reduce
    return results


def reference(case: dict[str, Any]) -> dict[str, Tensor]:
    hidden, weight, targets = (
        part.double() for part in head_inputs(TOKENS, HIDDEN, VOCAB, case["dtype"], scale=case["scale"])
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = targets.long()
    full = torch.log_softmax(hidden @ weight.t() / TEMPERATURE, -1)
    logprobs = full.gather(1, targets[:, None])[:, 0]
    entropy = -(full.exp() * full).sum(-1)
    (factors()[0] @ logprobs + factors()[1] @ entropy).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "log-probs": logprobs.detach(),
        "entropy": entropy.detach(),
        "rival": full.detach().scatter(1, targets[:, None], -torch.inf).amax(1),
        "hidden.grad": hidden.grad,
        "weight.grad": weight.grad,
    }


PRECISIONS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module", params=["torch", "triton"])
def outcomes(request: pytest.FixtureRequest) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """For each case: the case, the first rank's result and the second rank's. One pair of processes computes all of
    them."""
    dtypes = [dtype for dtype in PRECISIONS if request.param == "torch" or dtype != torch.float64]
    usual = {"cut": 10, "dtype": dtypes[0], "chunk": 7, "tokens": TOKENS, "vocab": VOCAB, "scale": 2.0}
    cases = [
        {**usual, "cut": cut, "dtype": dtype, "chunk": chunk, "rival": rival}
        for cut in SPLITS.values()
        for dtype in dtypes
        for chunk in (1, 7, 100)
        for rival in (False, True)
    ]
    # Logits of a few hundred: the part of the softmax that one rank holds underflows to 0.
    cases += [{**usual, "cut": cut, "scale": 2000.0, "rival": True} for cut in SPLITS.values()]
    cases += [{**usual, "cut": cut, "vocab": 1, "rival": True} for cut in (0, 1)]
    cases += [{**usual, "dtype": torch.float32, "tokens": 0, "rival": True}]
    if request.param == "torch":
        first, second = run_ranks(heads, 2, cases, "torch")
    else:
        first, second = run_with_triton(heads, cases, "triton", ranks=2)
    return list(zip(cases, first, second, strict=True))


def test_shards_together_are_the_whole_head(outcomes: Any) -> None:
    for case, *ranks in outcomes:
        if not case["tokens"] or case["vocab"] == 1:
            continue
        expected = reference(case)
        ours = {
            "log-probs": ranks[0]["log-probs"],
            "entropy": ranks[0]["entropy"],
            "hidden.grad": ranks[0]["hidden.grad"].double() + ranks[1]["hidden.grad"].double(),
            "weight.grad": torch.cat([rank["weight.grad"] for rank in ranks]),
        }
        if case["rival"]:
            ours["rival"] = ranks[0]["rival"]
            assert not ours["rival"].requires_grad
        for name, value in ours.items():
            # Entropy is a difference of numbers as large as the log-probs. Entropy and rivals may be almost 0.
            scale = expected[name].abs().max()
            if name in ("entropy", "rival"):
                scale = max(scale, expected["log-probs"].abs().max())
            error = (value.double() - expected[name]).abs().max()
            assert error <= PRECISIONS[case["dtype"]] * scale, f"{case}: {name}: {error:.1e}"
        for name in ours.keys() - {"hidden.grad", "weight.grad"}:
            assert torch.equal(ranks[0][name], ranks[1][name]), case


def test_rivals_change_nothing_else(outcomes: Any) -> None:
    compared = 0
    for (plain, *plain_ranks), (asked, *asked_ranks) in pairwise(outcomes):
        if asked != {**plain, "rival": True} or plain["rival"]:
            continue
        compared += 1
        for before, after in zip(plain_ranks, asked_ranks, strict=True):
            assert before["rival"] is None
            for name in ("log-probs", "entropy", "hidden.grad", "weight.grad"):
                assert torch.equal(before[name], after[name]), (asked, name)
    dtypes = {case["dtype"] for case, *_ in outcomes}
    assert compared == len(SPLITS) * len(dtypes) * 3


def test_the_only_token_has_no_rival(outcomes: Any) -> None:
    ranks = [rank for case, *ranks in outcomes if case["vocab"] == 1 for rank in ranks]
    assert len(ranks) == 4
    for rank in ranks:
        assert rank["rival"].tolist() == [-torch.inf] * TOKENS
        for name in ("log-probs", "entropy", "hidden.grad", "weight.grad"):
            assert not rank[name].any(), name


def test_without_tokens_no_rank_waits_and_gradients_are_0(outcomes: Any) -> None:
    case, *ranks = outcomes[-1]
    assert case["tokens"] == 0
    for rank in ranks:
        assert rank["log-probs"].shape == rank["entropy"].shape == rank["rival"].shape == (0,)
        assert rank["hidden.grad"].shape == (0, HIDDEN)
        assert not rank["weight.grad"].any()
        assert rank["forward"] == []


def test_two_collectives_forward_and_none_backward(outcomes: Any) -> None:
    for case, *ranks in outcomes[:-1]:
        for rank in ranks:
            maxima = (2, TOKENS) if case["rival"] else (TOKENS,)
            assert rank["forward"] == [maxima, (3, TOKENS)], case
            assert rank["backward"] == [], case
