"""Measure the log-prob head at the shapes of real models: ours with several chunk budgets, and other heads.

The bound is the four products of the whole logits (logits, logits again, two gradients), and each head's share of the
ceiling counts the products that it makes: the naive head keeps its logits and makes three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import chunked_heads
from benchmarks.gpu.clock import device, seconds_of
from benchmarks.gpu.rows import Rows, parser_of
from benchmarks.head_memory import head_limit
from benchmarks.shapes import model_config
from megatron_chord.losses import logit_kernels_torch
from megatron_chord.losses.logit_kernels import LogitKernels
from megatron_chord.losses.logprobs import CHUNK_BYTES, kernels_for, tile_for, token_logprobs

BUDGETS = (CHUNK_BYTES, 2 * CHUNK_BYTES, 4 * CHUNK_BYTES, 8 * CHUNK_BYTES)
ENTROPY = 0.01
AGREE = 0.02
"""The allowed difference of mean log-probs of BF16 logits."""
Inputs = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    rows = Rows(arguments.rows, arguments.part)
    for name in ("7b", "70b"):
        config = model_config(name, tiny=arguments.tiny)
        tokens = 64 if arguments.tiny else arguments.tokens
        measure_shape(rows, name, tokens, config["hidden_size"], config["vocab_size"])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_shape(rows: Rows, name: str, tokens: int, hidden_size: int, vocab: int) -> None:
    inputs = make_inputs(tokens, hidden_size, vocab)
    one = 2 * tokens * vocab * hidden_size
    sizes = f"{tokens} x {hidden_size} x {vocab}"
    bound = seconds_of(lambda: four_products(inputs))
    rows.measured(f"{name}: four products", bound, amount=4 * one, ceiling="products", sizes=sizes)
    expected: float | None = None
    for label, head in heads(inputs).items():
        try:
            measured = measure_head(head, inputs)
        except Exception as error:  # out of memory, or any error of another version's head
            rows.failed(f"{name}: {label}", f"{type(error).__name__}: {error}"[:300])
            continue
        value = measured["mean_logprob"]
        expected = value if expected is None else expected
        if abs(value - expected) > AGREE:
            reason = f"its mean log-prob is {value:.4f}, that of the first head {expected:.4f}"
            rows.failed(f"{name}: {label}", reason)
            continue
        rows.measured(
            f"{name}: {label}",
            measured.pop("seconds"),
            amount=(3 if label == "naive" else 4) * one,
            ceiling="products",
            of_products=measured["both_seconds"] / bound,
            **{key: number for key, number in measured.items() if key != "both_seconds"},
        )


def make_inputs(tokens: int, hidden_size: int, vocab: int) -> Inputs:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=device()).bfloat16().requires_grad_()
    weight = torch.randn(vocab, hidden_size, device=device()).mul_(hidden_size**-0.5).bfloat16()
    return hidden, weight.requires_grad_(), torch.randint(vocab, (tokens,), device=device())


def heads(inputs: Inputs) -> dict[str, chunked_heads.Head]:
    """Return the heads by label. The first one is what a run uses."""
    found = {f"ours, {budget >> 20} MiB": ours(inputs, budget) for budget in BUDGETS}
    found["ours, torch's sweeps"] = ours(inputs, CHUNK_BYTES, logit_kernels_torch)
    found["naive"] = chunked_heads.naive
    found |= {chunked_heads.LABELS[name]: chunked_heads.HEADS[name] for name in chunked_heads.available()}
    return found


def ours(inputs: Inputs, budget: int, kernels: LogitKernels | None = None) -> chunked_heads.Head:
    hidden, weight, _ = inputs
    tokens, _ = tile_for(hidden, len(weight), kernels or kernels_for(hidden), budget)
    chunk = min(tokens, len(hidden))

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        found = token_logprobs(hidden, weight, targets, chunk=chunk, kernels=kernels)
        return found.logprobs, found.entropy

    return head


@torch.no_grad()
def four_products(inputs: Inputs) -> None:
    hidden, weight, _ = inputs
    _ = hidden @ weight.t()
    logits = hidden @ weight.t()
    _ = logits @ weight
    _ = logits.t() @ hidden


def measure_head(head: chunked_heads.Head, inputs: Inputs) -> dict[str, float]:
    hidden, weight, targets = inputs

    def forward() -> Tensor:
        with torch.no_grad():
            return head(hidden, weight, targets)[0]

    def both() -> None:
        hidden.grad = weight.grad = None
        logprobs, entropy = head(hidden, weight, targets)
        (logprobs.sum() if entropy is None else logprobs.sum() + ENTROPY * entropy.sum()).backward()

    seconds = seconds_of(both)
    found = {
        "seconds": seconds,
        "both_seconds": seconds,
        "forward_ms": 1e3 * seconds_of(forward),
        "mean_logprob": float(forward().float().mean()),
    }
    return found | extra_memory(both, inputs)


def extra_memory(both: Callable[[], None], inputs: Inputs) -> dict[str, float]:
    """Return the memory beyond the inputs, with gradients, and the limit that the project sets for its own head."""
    if not torch.cuda.is_available():
        return {}
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    limit = head_limit(
        tokens=len(hidden),
        vocab=len(weight),
        hidden=hidden.shape[1],
        itemsize=hidden.dtype.itemsize,
        tile_bytes=CHUNK_BYTES,
    )
    return {"extra_gb": (torch.cuda.max_memory_allocated() - before) / 1e9, "limit_gb": limit / 1e9}


if __name__ == "__main__":
    main()
