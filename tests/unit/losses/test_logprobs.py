"""The chunked head computes log_softmax, entropy, rivals and gradients, and never makes all logits at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_chord.losses import logit_kernels_torch
from megatron_chord.losses.logprobs import (
    CACHED_ROWS,
    CHUNK_BYTES,
    HeadOutput,
    chunk_tokens,
    token_logprobs,
)
from tests.support.head import head_inputs

Head = Callable[[Tensor, Tensor, Tensor], HeadOutput]
TOKENS, HIDDEN, VOCAB = 23, 12, 37


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> HeadOutput:
    full = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    others = full.detach().scatter(1, targets[:, None], -torch.inf)
    return HeadOutput(full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1), others.amax(1))


def make_inputs(
    dtype: torch.dtype = torch.float64, tokens: int = TOKENS, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor]:
    return head_inputs(tokens, HIDDEN, vocab, dtype)


def run(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, part: str) -> dict[str, Tensor]:
    """Return values, and gradients of a random weighting of the log-probs, the entropies, or both."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy, rival, _ = head(hidden, weight, targets)
    generator = torch.Generator().manual_seed(5)
    factors = torch.randn(2, len(targets), generator=generator, dtype=torch.float64).to(logprobs.dtype)
    terms = {"log-probs": [factors[0] @ logprobs], "entropy": [factors[1] @ entropy]}
    terms["both"] = [*terms["log-probs"], *terms["entropy"]]
    torch.stack(terms[part]).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    result = {
        "log-probs": logprobs.detach(),
        "entropy": entropy.detach(),
        "hidden.grad": hidden.grad,
        "weight.grad": weight.grad,
    }
    if rival is not None:
        assert not rival.requires_grad
        result["rival"] = rival
    return result


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float) -> None:
    """Assert that errors are below ``relative`` times the largest value of each tensor."""
    for name, expected in theirs.items():
        error = (ours[name].double() - expected).abs()
        assert error.numel() == expected.numel() > 0
        assert error.max() <= relative * expected.abs().max(), f"{name}: {error.max():.2e}"


@pytest.mark.parametrize("part", ["log-probs", "entropy", "both"])
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_values_and_gradients(part: str, chunk: int | None, temperature: float) -> None:
    def head(*inputs: Tensor) -> HeadOutput:
        return token_logprobs(*inputs, temperature=temperature, chunk=chunk, rival=True)

    def reference(*inputs: Tensor) -> HeadOutput:
        return naive(*inputs, temperature=temperature)

    inputs = make_inputs()
    assert_close(run(head, *inputs, part), run(reference, *inputs, part), relative=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_tokens_with_temperatures_of_their_own(dtype: torch.dtype, chunk: int | None) -> None:
    """Each token has the values of its own temperature. Gradients are sums over tokens of both temperatures."""
    inputs = make_inputs(dtype)
    temperature = torch.tensor([1.0, 0.6] * TOKENS)[:TOKENS]

    def head(*inputs: Tensor) -> HeadOutput:
        return token_logprobs(*inputs, temperature=temperature, chunk=chunk, rival=True)

    def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadOutput:
        return naive(hidden / temperature.double()[:, None], weight, targets)

    theirs = run(reference, *(part.double() if part.is_floating_point() else part for part in inputs), "both")
    assert_close(run(head, *inputs, "both"), theirs, relative=1e-7 if dtype == torch.float64 else 1e-6)
    # Equal temperatures give the same bits as one number.
    same = torch.full((TOKENS,), 0.5)
    ours = run(lambda *parts: token_logprobs(*parts, temperature=same, rival=True), *inputs, "both")
    one = run(lambda *parts: token_logprobs(*parts, temperature=0.5, rival=True), *inputs, "both")
    assert all(torch.equal(ours[name], one[name]) for name in one)


def test_the_targets_logits() -> None:
    hidden, weight, targets = make_inputs()
    logit = token_logprobs(hidden.requires_grad_(), weight, targets, temperature=0.7, chunk=7).logit
    assert logit is not None
    assert not logit.requires_grad
    torch.testing.assert_close(logit, (hidden @ weight.t())[torch.arange(TOKENS), targets].detach() / 0.7)


@pytest.mark.parametrize("part", ["log-probs", "entropy", "both"])
@pytest.mark.parametrize("vocab", [CACHED_ROWS, CACHED_ROWS + 1, 2 * CACHED_ROWS + 300])
def test_tiles_of_the_vocabulary(part: str, vocab: int) -> None:
    """Targets are on both sides of every border between tiles. The last tile has 1 or 300 rows."""
    hidden, weight, targets = make_inputs(vocab=vocab)
    borders = torch.tensor([CACHED_ROWS - 1, CACHED_ROWS, 2 * CACHED_ROWS - 1, 2 * CACHED_ROWS])
    targets[2:6] = borders.clamp(max=vocab - 1)
    ours = run(lambda *inputs: token_logprobs(*inputs, chunk=9, rival=True), hidden, weight, targets, part)
    assert_close(ours, run(naive, hidden, weight, targets, part), relative=1e-13)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_lower_precision(dtype: torch.dtype, relative: float, chunk: int) -> None:
    """The reference is float64 on the same rounded inputs. Reductions are in FP32 even where logits are rounded to
    BF16."""
    hidden, weight, targets = make_inputs(dtype)
    ours = run(
        lambda *inputs: token_logprobs(*inputs, chunk=chunk, rival=True), hidden, weight, targets, "both"
    )
    theirs = run(naive, hidden.double(), weight.double(), targets, "both")
    assert_close(ours, theirs, relative)
    assert ours["log-probs"].dtype == ours["entropy"].dtype == ours["rival"].dtype == torch.float32
    assert ours["hidden.grad"].dtype == ours["weight.grad"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_does_not_lose_small_chunks(dtype: torch.dtype) -> None:
    """The weight gradient of 4000 chunks is summed in fp32. In bf16 the sum would stop growing after 256 terms."""
    tokens = 4000
    hidden = torch.ones(tokens, 1, dtype=dtype)
    weight = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    logprobs, *_ = token_logprobs(hidden, weight, torch.zeros(tokens, dtype=torch.int64), chunk=1)
    logprobs.sum().backward()
    assert weight.grad is not None
    # Both p are 1/2, so dl/dz is +1/2 and -1/2 at each of the 4000 tokens. 2000 is a BF16 number.
    assert weight.grad.flatten().tolist() == [2000.0, -2000.0]


@pytest.mark.parametrize("chunk", [2, 100])
def test_gradcheck(chunk: int) -> None:
    hidden, weight, targets = make_inputs(tokens=5, vocab=9)

    def head(hidden: Tensor, weight: Tensor) -> Any:
        return token_logprobs(hidden, weight, targets, temperature=0.8, chunk=chunk, rival=True)[:2]

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
    logprobs, entropy, rival, _ = token_logprobs(hidden, weight, targets, rival=True)
    assert rival is not None
    assert logprobs.shape == entropy.shape == rival.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_large_logits_neither_overflow_nor_lose_the_rare_token() -> None:
    # Logits 3000, 2000 and 0: p is 1, 0, 0 and log p is 0, -1000, -3000, although exp(3000) is beyond FP32.
    hidden = torch.tensor([[1000.0]] * 3, requires_grad=True)
    weight = torch.tensor([[3.0], [2.0], [0.0]], requires_grad=True)
    logprobs, entropy, rival, _ = token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), rival=True)
    assert logprobs.tolist() == [0.0, -1000.0, -3000.0]
    assert rival is not None
    assert rival.tolist() == [-1000.0, 0.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0, 0.0]
    (logprobs.sum() + entropy.sum()).backward()
    # dl/dz = 1[target] - p, so dl/dh = w[target] - w[0]: 0, -1, -3.
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -1.0, -3.0]
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-2000.0, 1000.0, 1000.0]


def test_rows_of_one_shard_alone() -> None:
    """A shard with rows 10 to 29 is computed without a group. Targets in it get the shard's log_softmax.

    Other targets get a logit of 0 and, as rival, the best row of all.
    """
    hidden, weight, targets = make_inputs()
    shard = weight[10:30]
    here = (targets >= 10) & (targets < 30)
    assert here.any()
    assert not here.all()

    def head(hidden: Tensor, shard: Tensor, targets: Tensor) -> HeadOutput:
        return token_logprobs(hidden, shard, targets, first_row=10, chunk=7, rival=True)

    def reference(hidden: Tensor, shard: Tensor, targets: Tensor) -> HeadOutput:
        logits = hidden @ shard.t()
        chosen, entropy, rival, _ = naive(hidden, shard, (targets - 10).clamp(0, 19))
        assert rival is not None
        best = logits.detach().log_softmax(-1).amax(-1)
        return HeadOutput(
            torch.where(here, chosen, -logits.logsumexp(-1)), entropy, torch.where(here, rival, best)
        )

    ours, theirs = (run(each, hidden, shard, targets, "both") for each in (head, reference))
    assert_close(ours, theirs, relative=1e-13)


@pytest.mark.parametrize("vocab", [2, 3, 37, 1000])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_rivals_change_nothing_else(vocab: int, chunk: int) -> None:
    inputs = make_inputs(vocab=vocab)
    plain = run(lambda *parts: token_logprobs(*parts, chunk=chunk), *inputs, "both")
    asked = run(lambda *parts: token_logprobs(*parts, chunk=chunk, rival=True), *inputs, "both")
    assert "rival" not in plain
    for name, value in plain.items():
        assert torch.equal(asked[name], value), name
    assert_close(asked, run(naive, *inputs, "both"), relative=1e-13)


def test_rivals_of_best_worst_and_tied_targets() -> None:
    # p is 1/8, 3/8, 3/8, 1/8. The rival of a best token is the other best one. The others' rival is one of the two.
    weight = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64).log()[:, None]
    targets = torch.tensor([0, 1, 2, 3])
    rival = token_logprobs(torch.ones(4, 1, dtype=torch.float64), weight, targets, rival=True).rival
    assert rival is not None
    torch.testing.assert_close(rival.exp(), torch.full((4,), 3 / 8, dtype=torch.float64))
    # With a single best token, its rival is the second best: p is 1/10, 6/10, 3/10.
    weight = torch.tensor([1.0, 6.0, 3.0], dtype=torch.float64).log()[:, None]
    rival = token_logprobs(torch.ones(3, 1, dtype=torch.float64), weight, torch.arange(3), rival=True).rival
    assert rival is not None
    torch.testing.assert_close(rival.exp(), torch.tensor([0.6, 0.3, 0.6], dtype=torch.float64))


def test_the_only_token_has_no_rival() -> None:
    hidden, weight, targets = make_inputs(tokens=3, vocab=1)
    ours = run(lambda *parts: token_logprobs(*parts, chunk=2, rival=True), hidden, weight, targets, "both")
    assert ours["rival"].tolist() == [-torch.inf] * 3
    for name in ("log-probs", "entropy", "hidden.grad", "weight.grad"):
        assert not ours[name].any(), name


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned, forward or backward."""

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
    tokens, vocab, chunk = 640, 512, 32
    inputs = make_inputs(torch.float32, tokens, vocab)
    with LargestTensor() as largest:
        run(lambda *parts: token_logprobs(*parts, chunk=chunk, rival=True), *inputs, "both")
    assert largest.elements == chunk * vocab
    with LargestTensor() as largest:  # the naive head shows that the probe finds such a tensor
        run(naive, *inputs, "both")
    assert largest.elements == tokens * vocab


class Matrices(TorchDispatchMode):
    """Records how many tensors of ``elements`` FP32 numbers or more existed at once, and the products that made
    them."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.bytes, self.most, self.products = 4 * elements, 0, 0
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= self.bytes:
            self.made.append(weakref.ref(result))
            self.products += func is torch.ops.aten.mm.out
        living = [value for made in self.made if (value := made()) is not None]
        self.most = max(self.most, len({value.untyped_storage().data_ptr() for value in living}))
        return result


@pytest.mark.parametrize("rival", [False, True])
@pytest.mark.parametrize("part", ["log-probs", "both"])
def test_two_matrices_live_at_a_time(rival: bool, part: str) -> None:
    tokens, vocab, chunk = 96, 512, 32
    inputs = make_inputs(torch.float32, tokens, vocab)
    with Matrices(chunk * vocab) as matrices:
        run(lambda *parts: token_logprobs(*parts, chunk=chunk, rival=rival), *inputs, part)
    assert matrices.most == 2
    assert matrices.products == 2 * tokens // chunk  # one per chunk forward, one backward
    with Matrices(tokens * vocab) as matrices:  # the naive head shows that the probe finds more of them
        run(naive, *inputs, part)
    assert matrices.most > 2


def test_the_default_chunk_keeps_to_its_budget() -> None:
    # Two fp32 matrices [chunk, 152064] in 256 MiB: 268435456 / (2 * 4 * 152064) = 220.66
    assert logit_kernels_torch.bytes_per_logit(torch.float32) == 8
    assert chunk_tokens(152_064, bytes_per_logit=8) == 220
    assert chunk_tokens(10, 8_000, bytes_per_logit=8) == 100
    # In BF16 the logits stay in memory too: 268435456 / (10 * 152064) = 176.53
    assert logit_kernels_torch.bytes_per_logit(torch.bfloat16) == 10
    assert chunk_tokens(152_064, bytes_per_logit=10) == 176
    # A chunk has at least 16 tokens, because a small budget would make thousands of thin products. A shard may have no
    # rows.
    assert chunk_tokens(10**9, bytes_per_logit=8) == 16
    assert chunk_tokens(0, bytes_per_logit=8) == CHUNK_BYTES // 8
