"""The log-prob head over a vocabulary that two ranks share, in equal parts, unequal ones, or with an empty one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.losses.logprobs import token_logprobs
from tests.support.ranks import run_ranks

TOKENS, HIDDEN, VOCAB, TEMPERATURE = 19, 8, 21, 0.7
SPLITS = {"halves": 10, "padded": 16, "second empty": VOCAB, "first empty": 0, "one row": 1}
"""Rows of the first rank; the second holds the rest of 21. Padding rows never reach the head."""


def make_inputs(dtype: torch.dtype, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    weight = scale * HIDDEN**-0.5 * torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), torch.randint(VOCAB, (TOKENS,))


def factors() -> Tensor:
    return torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Values, this rank's gradients, and the collectives made, of every case."""
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
        hidden, weight, targets = make_inputs(case["dtype"], case["scale"])
        hidden, targets = hidden[: case["tokens"]].requires_grad_(), targets[: case["tokens"]]
        cut = case["cut"]
        shard = (weight[:cut] if dist.get_rank() == 0 else weight[cut:]).clone().requires_grad_()
        calls.clear()
        logprobs, entropy = token_logprobs(
            hidden,
            shard,
            targets,
            first_row=0 if dist.get_rank() == 0 else cut,
            temperature=TEMPERATURE,
            group=dist.group.WORLD,
            chunk=case["chunk"],
        )
        forward = list(calls)
        weighting = factors()[:, : case["tokens"]].to(logprobs.dtype)
        (weighting[0] @ logprobs + weighting[1] @ entropy).backward()
        results.append(
            {
                "log-probs": logprobs.detach(),
                "entropy": entropy.detach(),
                "hidden.grad": hidden.grad,
                "weight.grad": shard.grad,
                "forward": forward,
                "backward": calls[len(forward) :],
            }
        )
    dist.all_reduce = all_reduce
    return results


def reference(case: dict[str, Any]) -> dict[str, Tensor]:
    hidden, weight, targets = (part.double() for part in make_inputs(case["dtype"], case["scale"]))
    hidden = hidden[: case["tokens"]].requires_grad_()
    weight.requires_grad_()
    full = torch.log_softmax(hidden @ weight.t() / TEMPERATURE, -1)
    logprobs = full.gather(1, targets[: case["tokens"], None].long())[:, 0]
    entropy = -(full.exp() * full).sum(-1)
    (factors()[0, : case["tokens"]] @ logprobs + factors()[1, : case["tokens"]] @ entropy).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "log-probs": logprobs.detach(),
        "entropy": entropy.detach(),
        "hidden.grad": hidden.grad,
        "weight.grad": weight.grad,
    }


PRECISIONS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(case, first rank's result, second rank's) of all cases, from one pair of processes."""
    cases = [
        {"cut": cut, "dtype": dtype, "chunk": chunk, "tokens": TOKENS, "scale": 2.0}
        for cut in SPLITS.values()
        for dtype in PRECISIONS
        for chunk in (1, 7, 100)
    ]
    # Logits of a few hundred: one rank's share of the softmax underflows to 0.
    cases += [
        {"cut": cut, "dtype": torch.float64, "chunk": 7, "tokens": TOKENS, "scale": 2000.0}
        for cut in SPLITS.values()
    ]
    cases += [{"cut": 10, "dtype": torch.float32, "chunk": 7, "tokens": 0, "scale": 2.0}]
    first, second = run_ranks(heads, 2, cases)
    return list(zip(cases, first, second, strict=True))


def test_shards_together_are_the_whole_head(outcomes: Any) -> None:
    for case, *ranks in outcomes:
        if not case["tokens"]:
            continue
        expected = reference(case)
        ours = {
            "log-probs": ranks[0]["log-probs"],
            "entropy": ranks[0]["entropy"],
            "hidden.grad": ranks[0]["hidden.grad"].double() + ranks[1]["hidden.grad"].double(),
            "weight.grad": torch.cat([rank["weight.grad"] for rank in ranks]),
        }
        for name, value in expected.items():
            # Entropy is a difference of numbers as large as the log-probs; it may itself be almost 0.
            scale = max(value.abs().max(), expected["log-probs"].abs().max() * (name == "entropy"))
            error = (ours[name].double() - value).abs().max()
            assert error <= PRECISIONS[case["dtype"]] * scale, f"{case}: {name}: {error:.1e}"
        for name in ("log-probs", "entropy"):
            assert torch.equal(ranks[0][name], ranks[1][name]), case


def test_without_tokens_no_rank_waits_and_gradients_are_0(outcomes: Any) -> None:
    case, *ranks = outcomes[-1]
    assert case["tokens"] == 0
    for rank in ranks:
        assert rank["log-probs"].shape == rank["entropy"].shape == (0,)
        assert rank["hidden.grad"].shape == (0, HIDDEN)
        assert not rank["weight.grad"].any()
        assert rank["forward"] == []


def test_two_collectives_forward_and_none_backward(outcomes: Any) -> None:
    for case, *ranks in outcomes[:-1]:
        for rank in ranks:
            assert rank["forward"] == [(TOKENS,), (3, TOKENS)], case
            assert rank["backward"] == [], case
