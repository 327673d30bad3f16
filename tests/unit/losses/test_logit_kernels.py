"""Both sweeps reduce and differentiate a shard's logits as float64 and autograd do for the whole vocabulary.

Triton's kernels run in its interpreter. The interpreter rounds to BF16 towards 0, while GPUs round to nearest. Its
error is below one unit of BF16's last place (2^-7 of the number), not half of one.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chord.losses import logit_kernels_torch
from megatron_chord.losses.logit_kernels import LogitKernels, Reduced
from tests.support.interpreter import accept_numpy_2_4, run_with_triton

BLOCKS = (2048, 4096)
"""The columns that a kernel's program processes at a time (``test_the_kernels_have_these_blocks``)."""

LAST_PLACE = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-11}
"""An upper bound of the relative rounding error. FP32's rounding is counted as an error of the arithmetic."""

CASE: dict[str, Any] = {
    "tokens": 5,
    "widths": (37,),  # widths of the shards, in order
    "dtype": torch.float32,
    "scale": 1.0,
    "spread": 3.0,  # standard deviation of the logits
    "rival": True,
    "parts": (True, True),  # whether log-probs and entropies have gradients
    "apart": 0,  # columns between the end of a row and the beginning of the next
}
CASES: list[dict[str, Any]] = [
    CASE,
    *({**CASE, "widths": (width,)} for width in (1, 2, 8, 4095, 4096, 4097, 10_001)),
    *({**CASE, "widths": widths} for widths in ((1, 36), (36, 1), (4096, 4097), (20, 30, 40))),
    *({**CASE, "tokens": tokens, "widths": (100, 100)} for tokens in (1, 2, 33)),
    # Qwen's vocabularies: one is whole, the other is padded and split over eight ranks, of which the last has fewer
    # rows.
    {**CASE, "tokens": 2, "widths": (151_936,), "dtype": torch.bfloat16},
    {**CASE, "tokens": 2, "widths": (19_008,) * 7 + (18_880,), "dtype": torch.bfloat16},
    *({**CASE, "dtype": dtype, "widths": (3000, 2000)} for dtype in (torch.bfloat16, torch.float16)),
    *({**CASE, "scale": 1 / temperature, "dtype": torch.bfloat16} for temperature in (0.6, 0.7, 2.5)),
    *(
        {**CASE, "scale": (1.0, 1 / 0.6, 0.4, 1.0, 1 / 0.6), "widths": (3000, 2000), "dtype": dtype}
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *({**CASE, "parts": parts} for parts in ((True, False), (False, True))),
    *({**CASE, "rival": False, "widths": widths} for widths in ((37,), (3000, 2000))),
    *({**CASE, "apart": apart, "widths": (37, 63)} for apart in (1, 8, 5000)),
    # Cases: one token has almost all probability; most probabilities are 0 in FP32; all are equal.
    *({**CASE, "spread": spread, "widths": (2500, 2500)} for spread in (30.0, 1e4, 0.0)),
    # A row begins beyond 2^31 numbers. Hardly any of the memory between is used.
    {**CASE, "tokens": 3, "widths": (5000,), "apart": 2**30 - 5000, "dtype": torch.bfloat16},
]


def make_logits(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits over the whole vocabulary, targets, and gradients of log-probs and entropies [2, tokens]."""
    tokens, vocab = case["tokens"], sum(case["widths"])
    generator = torch.Generator().manual_seed(tokens + vocab)
    logits = case["spread"] * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[: min(2, tokens)] = torch.tensor([vocab - 1, 0])[:tokens]
    return logits.to(case["dtype"]), targets, torch.randn(2, tokens, generator=generator)


def column(case: dict[str, Any]) -> float | Tensor:
    """Return the scale in the shape that multiplies logits [tokens, width]."""
    scale = case["scale"]
    return scale if isinstance(scale, float) else torch.tensor(scale, dtype=torch.float64)[:, None]


def sweep_shards(kernels: LogitKernels, case: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Return the sweep's reductions of each shard, and the gradients of all shards side by side."""
    logits, targets, grads = (part.to(device) for part in make_logits(case))
    expected = reference(case)
    scale = case["scale"] if isinstance(case["scale"], float) else torch.tensor(case["scale"], device=device)
    first, reduced, gradients = 0, [], []
    for width in case["widths"]:
        stride = width + case["apart"]
        memory = torch.empty(case["tokens"] * stride, dtype=case["dtype"], device=device)
        if len(memory) < 2**30:
            memory.fill_(torch.nan)  # numbers between the rows must not count
        shard = memory.as_strided((case["tokens"], width), (stride, 1))
        rows = targets - first
        shard.copy_(logits[:, first : first + width])
        reduced.append(tuple(kernels.reduce(shard, rows, scale, rival=case["rival"])))
        shard.copy_(logits[:, first : first + width])
        whole = [expected[name].float().to(device) for name in ("lse", "entropy")]
        parts = [grad if asked else None for grad, asked in zip(grads, case["parts"], strict=True)]
        kernels.differentiate_(shard, rows, scale, *whole, *parts)
        gradients.append(shard.clone())
        first += width
    return {"reduced": reduced, "gradient": torch.cat(gradients, 1)}


def in_triton(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from megatron_chord.losses import logit_kernels_triton

    assert (logit_kernels_triton.DIFFERENTIATE_BLOCK, logit_kernels_triton.REDUCE_BLOCK) == BLOCKS
    return [sweep_shards(logit_kernels_triton, case) for case in cases]


def in_triton_3_6(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case with NumPy 2.4, which does not accept an array with a dimension as a whole number."""
    from triton.runtime import interpreter

    def as_3_6_does(tensor: Any, scope: Any) -> None:
        def index(number: Any) -> int:
            if number.handle.data.ndim:
                raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
            return int(number.handle.data)

        patch(tensor, scope)
        tensor.__index__ = index

    patch = interpreter._patch_lang_tensor
    interpreter._patch_lang_tensor = as_3_6_does
    accept_numpy_2_4()
    return in_triton([case])[0]


def reference(case: dict[str, Any]) -> dict[str, Tensor]:
    """Return lse, entropy and the logits' gradient for the whole vocabulary, in float64."""
    logits, targets, grads = make_logits(case)
    logits = logits.double().requires_grad_()
    full = torch.log_softmax(logits * column(case), -1)
    entropy = -(full.exp() * full).sum(-1)
    terms = (full.gather(1, targets[:, None])[:, 0], entropy)
    torch.stack(
        [grad @ term for grad, term, asked in zip(grads.double(), terms, case["parts"], strict=True) if asked]
    ).sum().backward()
    assert logits.grad is not None
    lse = torch.logsumexp(logits.detach() * column(case), -1)
    return {"lse": lse, "entropy": entropy.detach(), "gradient": logits.grad}


@pytest.fixture(scope="module", params=["torch", "triton"])
def outcomes(request: pytest.FixtureRequest) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    if request.param == "torch":
        return [(case, sweep_shards(logit_kernels_torch, case)) for case in CASES]
    return list(zip(CASES, run_with_triton(in_triton, CASES)[0], strict=True))


def test_a_shard_is_reduced_as_float64_does(outcomes: Any) -> None:
    for case, ours in outcomes:
        assert_reduced(case, ours["reduced"])


def assert_reduced(case: dict[str, Any], shards: list[tuple[Tensor | None, ...]]) -> None:
    logits, targets, _ = make_logits(case)
    z = logits.double() * column(case)
    # FP32 keeps 24 bits of z itself, and some fewer of sums of a few thousand terms.
    tolerance = 2**-21 * max(1.0, z.abs().max().item())
    first = 0
    for width, found in zip(case["widths"], shards, strict=True):
        shard, rows = z[:, first : first + width], targets - first
        first += width
        here = (rows >= 0) & (rows < width)
        index = rows.clamp(0, width - 1)[:, None]
        is_target = here[:, None] & (torch.arange(width) == rows[:, None])
        expected = Reduced(
            lse=torch.logsumexp(shard, 1),
            target=torch.where(here, shard.gather(1, index)[:, 0], 0.0),
            mean=(torch.softmax(shard, 1) * shard).sum(1),
            rival=shard.masked_fill(is_target, -torch.inf).amax(1) if case["rival"] else None,
        )
        for name, value, exact in zip(Reduced._fields, found, expected, strict=True):
            if exact is None or value is None:
                assert value is exact
                continue
            assert value.dtype == torch.float32
            error = torch.where(value.cpu() == exact, 0.0, (value.cpu() - exact).abs())  # both may be -inf
            assert error.max() <= tolerance, f"{case}: {name}: {error.max():.1e}"


def test_gradients_of_shards_are_those_of_the_whole(outcomes: Any) -> None:
    for case, ours in outcomes:
        assert_gradient(case, ours["gradient"])


def assert_gradient(case: dict[str, Any], gradient: Tensor) -> None:
    expected = reference(case)["gradient"]
    assert gradient.dtype == case["dtype"]
    z = (make_logits(case)[0].double() * column(case)).abs().max().item()
    # log p has an absolute error of some 2^-24 |z|, and p the same relative one.
    tolerance = 2**-21 * max(1.0, z) * expected.abs().max().item() + 1e-7
    tolerance = tolerance + LAST_PLACE[case["dtype"]] * expected.abs()
    error = (gradient.cpu().double() - expected).abs()
    assert (error <= tolerance).all(), f"{case}: {error.max():.1e}"


def test_the_cases_reach_what_they_are_for() -> None:
    assert any(case["tokens"] > 2**31 // (sum(case["widths"]) + case["apart"]) for case in CASES)
    for block in BLOCKS:
        for beside in (-1, 0, 1):
            assert any(width % block == beside % block for case in CASES for width in case["widths"])


def test_the_interpreter_of_triton_3_6_counts_under_numpy_2_4() -> None:
    (ours,) = run_with_triton(in_triton_3_6, CASE)
    assert_reduced(CASE, ours["reduced"])
    assert_gradient(CASE, ours["gradient"])


def compile_kernels(capabilities: tuple[int, ...]) -> dict[str, str]:
    """Return the PTX of both kernels in BF16. Raises if Triton or NVIDIA's assembler refuses a kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for

    from megatron_chord.losses import logit_kernels_triton

    types = {"logits": "*bf16", "rows": "*i64", "found": "*fp32", "of_tokens": "*fp32", "scale": "fp32"}
    values = {"RIVAL": True, "PER_TOKEN": False}
    kernels = (
        (logit_kernels_triton._reduce, logit_kernels_triton.REDUCE_BLOCK, logit_kernels_triton.REDUCE_WARPS),
        (
            logit_kernels_triton._differentiate,
            logit_kernels_triton.DIFFERENTIATE_BLOCK,
            logit_kernels_triton.DIFFERENTIATE_WARPS,
        ),
    )
    texts = {}
    for capability in capabilities:
        for kernel, block, warps in kernels:
            names = kernel.arg_names
            constants = {name: value for name, value in {**values, "BLOCK": block}.items() if name in names}
            signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
            # Triton finds these alignments of pointers and of a chunk's stride. The width may be any number.
            multiples = [name for name in names if types.get(name, "").startswith("*") or name == "stride"]
            compiled = compile_for(
                ASTSource(
                    kernel,
                    signature,
                    constexprs={(names.index(name),): value for name, value in constants.items()},
                    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
                ),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": warps},
            )
            assert compiled.asm["cubin"]
            texts[f"{kernel.__name__} {capability}"] = compiled.asm["ptx"]
    return texts


def test_the_kernels_compile_for_gpus(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compile for A100, H100 and B200. They read and write 16 bytes a thread; with less, memory would be
    too slow."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (texts,) = run_with_triton(compile_kernels, (80, 90, 100), interpret=False)
    assert len(texts) == 6
    for name, text in texts.items():
        assert re.search(r"ld\.global[.\w]*\.v4\.b32", text), name
        assert re.search(r"st\.global[.\w]*\.v4\.b32", text) or name.startswith("_reduce"), name
