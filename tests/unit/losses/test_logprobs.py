"""The chunked head computes log_softmax, its entropy and both gradients, and never makes the whole logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_chord.losses.logprobs import CHUNK_BYTES, chunk_tokens, token_logprobs

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
TOKENS, HIDDEN, VOCAB = 23, 12, 37


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    full = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    return full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)


def make_inputs(
    dtype: torch.dtype = torch.float64, tokens: int = TOKENS, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets; logits of a standard deviation of about 2."""
    torch.manual_seed(tokens + vocab)
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.float64)
    weight = 2 * HIDDEN**-0.5 * torch.randn(vocab, HIDDEN, dtype=torch.float64)
    targets = torch.randint(vocab, (tokens,))
    targets[: min(2, tokens)] = torch.tensor([0, vocab - 1])[:tokens]
    return hidden.to(dtype), weight.to(dtype), targets


def run(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, part: str) -> dict[str, Tensor]:
    """Values, and gradients of a random weighting of the log-probs, of the entropies, or of both."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = head(hidden, weight, targets)
    generator = torch.Generator().manual_seed(5)
    factors = torch.randn(2, len(targets), generator=generator, dtype=torch.float64).to(logprobs.dtype)
    terms = {"log-probs": [factors[0] @ logprobs], "entropy": [factors[1] @ entropy]}
    terms["both"] = [*terms["log-probs"], *terms["entropy"]]
    torch.stack(terms[part]).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "log-probs": logprobs.detach(),
        "entropy": entropy.detach(),
        "hidden.grad": hidden.grad,
        "weight.grad": weight.grad,
    }


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float) -> None:
    """Errors below ``relative`` times the largest value of each tensor."""
    for name, expected in theirs.items():
        error = (ours[name].double() - expected).abs()
        assert error.numel() == expected.numel() > 0
        assert error.max() <= relative * expected.abs().max(), f"{name}: {error.max():.2e}"


@pytest.mark.parametrize("part", ["log-probs", "entropy", "both"])
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_values_and_gradients(part: str, chunk: int | None, temperature: float) -> None:
    def head(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(*inputs, temperature=temperature, chunk=chunk)

    def reference(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return naive(*inputs, temperature=temperature)

    inputs = make_inputs()
    assert_close(run(head, *inputs, part), run(reference, *inputs, part), relative=1e-13)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_lower_precision(dtype: torch.dtype, relative: float, chunk: int) -> None:
    """Against float64 on the same rounded inputs. Reductions are fp32 even where the logits are rounded to bf16."""
    hidden, weight, targets = make_inputs(dtype)
    ours = run(lambda *inputs: token_logprobs(*inputs, chunk=chunk), hidden, weight, targets, "both")
    theirs = run(naive, hidden.double(), weight.double(), targets, "both")
    assert_close(ours, theirs, relative)
    assert ours["log-probs"].dtype == ours["entropy"].dtype == torch.float32
    assert ours["hidden.grad"].dtype == ours["weight.grad"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_does_not_lose_small_chunks(dtype: torch.dtype) -> None:
    """One weight gradient over 4000 chunks is added up in fp32: in bf16 the sum would stop growing at 256 terms."""
    tokens = 4000
    hidden = torch.ones(tokens, 1, dtype=dtype)
    weight = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, weight, torch.zeros(tokens, dtype=torch.int64), chunk=1)
    logprobs.sum().backward()
    assert weight.grad is not None
    # Both p are 1/2, so dl/dz is +1/2 and -1/2 at each of the 4000 tokens; 2000 is a bf16 number.
    assert weight.grad.flatten().tolist() == [2000.0, -2000.0]


@pytest.mark.parametrize("chunk", [2, 100])
def test_gradcheck(chunk: int) -> None:
    hidden, weight, targets = make_inputs(tokens=5, vocab=9)

    def head(hidden: Tensor, weight: Tensor) -> Any:
        return token_logprobs(hidden, weight, targets, temperature=0.8, chunk=chunk)

    assert torch.autograd.gradcheck(head, (hidden.requires_grad_(), weight.requires_grad_()))


def test_one_of_the_inputs_may_be_constant() -> None:
    hidden, weight, targets = make_inputs()
    theirs = run(naive, hidden, weight, targets, "log-probs")
    factors = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[0]
    leaf = hidden.clone().requires_grad_()
    (factors @ token_logprobs(leaf, weight, targets)[0]).backward()
    torch.testing.assert_close(leaf.grad, theirs["hidden.grad"])
    leaf = weight.clone().requires_grad_()
    (factors @ token_logprobs(hidden, leaf, targets)[0]).backward()
    torch.testing.assert_close(leaf.grad, theirs["weight.grad"])


def test_no_tokens() -> None:
    hidden, weight, targets = make_inputs(tokens=0)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_large_logits_neither_overflow_nor_lose_the_rare_token() -> None:
    # Logits 3000, 2000 and 0: p is 1, 0, 0 and log p is 0, -1000, -3000, though exp(3000) has no fp32 number.
    hidden = torch.tensor([[1000.0]] * 3, requires_grad=True)
    weight = torch.tensor([[3.0], [2.0], [0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    assert logprobs.tolist() == [0.0, -1000.0, -3000.0]
    assert entropy.tolist() == [0.0, 0.0, 0.0]
    (logprobs.sum() + entropy.sum()).backward()
    # dl/dz = 1[target] - p, so dl/dh = w[target] - w[0]: 0, -1, -3.
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -1.0, -3.0]
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-2000.0, 1000.0, 1000.0]


def test_rows_of_one_shard_alone() -> None:
    """Rows 10 to 29 without a group: targets there get the shard's log_softmax, the others a logit of 0."""
    hidden, weight, targets = make_inputs()
    shard = weight[10:30]
    here = (targets >= 10) & (targets < 30)
    assert here.any()
    assert not here.all()

    def head(hidden: Tensor, shard: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden, shard, targets, first_row=10, chunk=7)

    def reference(hidden: Tensor, shard: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ shard.t()
        chosen, entropy = naive(hidden, shard, (targets - 10).clamp(0, 19))
        return torch.where(here, chosen, -logits.logsumexp(-1)), entropy

    ours, theirs = (run(each, hidden, shard, targets, "both") for each in (head, reference))
    assert_close(ours, theirs, relative=1e-13)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_the_whole_logits_are_never_made() -> None:
    tokens, vocab, chunk = 640, 500, 32
    inputs = make_inputs(torch.float32, tokens, vocab)
    with LargestTensor() as largest:
        run(lambda *parts: token_logprobs(*parts, chunk=chunk), *inputs, "both")
    assert largest.elements == chunk * vocab
    with LargestTensor() as largest:  # the probe sees them where they are made
        run(naive, *inputs, "both")
    assert largest.elements == tokens * vocab


def test_the_default_chunk_keeps_to_its_budget() -> None:
    # Two fp32 matrices [chunk, 152064] in 256 MiB: 268435456 / (2 * 4 * 152064) = 220.66
    assert chunk_tokens(152_064) == 220
    assert chunk_tokens(10, budget_bytes=8_000) == 100
    # Never fewer than 16, or a small budget would make thousands of thin products; and a shard may have no rows.
    assert chunk_tokens(10**9) == 16
    assert chunk_tokens(0) == CHUNK_BYTES // 8
