"""Compare the log-prob head with others: time and memory of one forward and backward pass.

    python benchmarks/logprob_head.py [--tokens 8192 --vocab 152064 --hidden 256 --dtype fp32 --device cpu]

Both compute log softmax(hidden @ weight.T) at the targets and its entropy, and the gradients of both (``--loss
logprobs``: of the log-probs alone, as in training without an entropy bonus) with respect to hidden states and weight.
The naive head makes the whole logits [tokens, vocabulary], and autograd keeps what it needs of them. A third row is
the bound: the time of only the matrix products that a chunked head needs (logits, logits again in the backward pass,
two gradients). On a GPU one more row is the chunked head with torch's operations in place of Triton's kernels. Then
come other chunked heads (``chunked_heads.py``): torch's own checkpointing, and those of TRL and Liger if they are
installed. Each runs in a process of its own, so that none profits from another's leftovers. All take turns for
``--rounds`` rounds, and the fastest round counts.

Extra peak memory is what the pass needed beyond its inputs, with the gradients. On a CPU it is the peak of the
resident set (VmHWM) minus the resident set before the pass. On a GPU torch's allocation counters give it. Seconds are
CPU time of all threads on a CPU, which other processes disturb little, and elapsed time on a GPU. If the whole number
of tokens would not fit, the naive head runs with ``--naive-tokens`` tokens (0: not at all). Its numbers are then also
scaled to all tokens and marked so: seconds, and memory without the gradient of the weight, in proportion to the
tokens. The exit code is 1 if the chunked head needs more than the limit, or if heads with the same tokens disagree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import chunked_heads
import torch
import torch.distributed as dist
from head_memory import head_limit
from rich.console import Console
from rich.table import Table
from shared import in_ranks, reset_high_water_mark, resident

from megatron_chord.losses import logit_kernels_torch
from megatron_chord.losses.logprobs import kernels_for, tile_for, token_logprobs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GB = 1e9


def main() -> int:
    arguments = parse()
    if arguments.child is not None:
        print(json.dumps(measure(arguments, arguments.child)))
        return 0
    tokens, naive_tokens = arguments.tokens, min(arguments.naive_tokens, arguments.tokens)
    runs = {"chunked": (tokens, 1), "products": (tokens, 1)}
    runs |= {"ranks": (tokens, arguments.tensor)} if arguments.tensor > 1 else {}
    runs |= {"naive": (naive_tokens, 1)} if naive_tokens else {}
    if arguments.device == "cuda":  # on a CPU the chunked head uses these anyway
        runs["torch-sweeps"] = (tokens, 1)
    runs |= dict.fromkeys(arguments.peers, (tokens, 1))
    rounds = [
        {head: in_children("chunked" if head == "ranks" else head, *run) for head, run in runs.items()}
        for _ in range(arguments.rounds)
    ]
    found = {head: min((row[head] for row in rounds), key=lambda row: row["seconds"]) for head in runs}
    return report(arguments, found, naive_tokens)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time and memory of the log-prob head against the naive one."
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--naive-tokens", type=int, default=1024, help="tokens of the naive run; 0: none")
    parser.add_argument("--vocab", type=int, default=152_064)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--chunk-mb", type=int, help="budget of the logits that live at a time, in MiB")
    parser.add_argument(
        "--limit-gb",
        type=float,
        help="extra memory allowed to the chunked head (default: its gradients and one tile; head_memory.py)",
    )
    parser.add_argument("--tensor", type=int, default=1, help="also with the vocabulary over so many ranks")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each rank")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--loss",
        choices=["both", "logprobs"],
        default="both",
        help="what is differentiated: entropies too, or log-probs alone, as without an entropy bonus",
    )
    parser.add_argument("--rounds", type=int, default=1, help="number of rounds; the fastest one counts")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(chunked_heads.HEADS),
        default=chunked_heads.available(),
        help="other people's chunked heads (default: those installed)",
    )
    parser.add_argument(
        "--child",
        choices=["chunked", "torch-sweeps", "products", "naive", *chunked_heads.HEADS],
        help=argparse.SUPPRESS,
    )
    return parser.parse_args()


def in_children(head: str, tokens: int, ranks: int) -> dict[str, Any]:
    """Run one process for each shard of the vocabulary. Return the slowest's time and the fullest's memory.

    The later of two values of an option counts, so the options of the children come after ours.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--child", head, "--tokens", str(tokens)]
    rows = in_ranks(command, ranks)
    return rows[0] | {name: max(row[name] for row in rows) for name in ("seconds", "extra_bytes")}


def measure(arguments: argparse.Namespace, head: str) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        if arguments.device == "cuda":
            torch.cuda.set_device(int(os.environ["RANK"]))
        dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    dtype = DTYPES[arguments.dtype]
    like = torch.empty(0, dtype=dtype, device=arguments.device)
    kernels = logit_kernels_torch if head == "torch-sweeps" else kernels_for(like)
    budget = arguments.chunk_mb * 2**20 if arguments.chunk_mb else None
    tile = tile_for(like, arguments.vocab // ranks, kernels, budget)
    sizes = (arguments.tokens, arguments.vocab, tile)
    # Libraries load their kernels now. On a GPU, kernels are also chosen or compiled by size.
    run_head(arguments, head, *(sizes if like.is_cuda else (32, 1000, (16, 500))))
    extra, value, seconds = run_head(arguments, head, *sizes)
    return {
        "seconds": seconds,
        "extra_bytes": extra,
        "value": value,
        "tile": f"{tile[0]} x {tile[1]}",
        "tile_bytes": tile[0] * tile[1] * kernels.bytes_per_logit(dtype),
    }


def run_head(
    arguments: argparse.Namespace, head: str, tokens: int, vocab: int, tile: tuple[int, int]
) -> tuple[int, float, float]:
    """Return extra peak bytes, the mean log-prob (which must be equal for both heads) and seconds."""
    torch.manual_seed(0)
    dtype, device = DTYPES[arguments.dtype], torch.device(arguments.device)
    group = dist.group.WORLD if dist.is_initialized() else None
    weight = torch.randn(vocab, arguments.hidden).mul_(arguments.hidden**-0.5)
    first_row = 0
    if group is not None:
        rows = len(weight) // group.size()
        first_row = rows * group.rank()
        weight = weight[first_row : first_row + rows].clone()
    weight = weight.to(device, dtype)
    hidden = torch.randn(tokens, arguments.hidden).to(device, dtype)
    targets = torch.randint(vocab, (tokens,)).to(device)
    hidden.requires_grad_()
    weight.requires_grad_()
    before = reset_peak(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    if head == "products":
        with torch.no_grad():
            value = chunked_heads.products(hidden, weight, tile)
        return peak(device) - before, value, clock() - start
    if head == "naive":
        logprobs, entropy = chunked_heads.naive(hidden, weight, targets)
    elif head in chunked_heads.HEADS:
        logprobs, entropy = chunked_heads.HEADS[head](hidden, weight, targets)
    else:
        logprobs, entropy, *_ = token_logprobs(
            hidden,
            weight,
            targets,
            chunk=tile[0],
            first_row=first_row,
            group=group,
            kernels=logit_kernels_torch if head == "torch-sweeps" else None,
        )
    if entropy is None or arguments.loss == "logprobs":
        logprobs.sum().backward()
    else:
        (logprobs.sum() + entropy.sum()).backward()
    extra = peak(device) - before
    return extra, logprobs.detach().mean().item(), clock() - start


def reset_peak(device: torch.device) -> int:
    """Start the count of the peak. Return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    reset_high_water_mark()
    return resident("VmRSS")


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def report(
    arguments: argparse.Namespace,
    found: dict[str, dict[str, Any]],
    naive_tokens: int,
) -> int:
    ours, products = found["chunked"], found["products"]
    ranks, other, swept = (found.get(name) for name in ("ranks", "naive", "torch-sweeps"))
    console = Console(width=110)
    console.print(
        f"log-prob head, forward and backward: vocabulary {arguments.vocab}, hidden {arguments.hidden}, "
        f"{arguments.dtype}, {describe_device(arguments)}, torch {torch.__version__}"
    )
    gradients = (arguments.vocab + arguments.tokens) * arguments.hidden * DTYPES[arguments.dtype].itemsize
    table = Table(
        "head",
        "tokens",
        "seconds" if arguments.device == "cuda" else "CPU seconds",
        "extra peak GB",
        "time ratio",
        "memory ratio",
    )
    row = (arguments.tokens, ours["seconds"], ours["extra_bytes"])
    table.add_row(f"chunked ({ours['tile']})", *numbers(*row), "1", "1")
    if ranks is not None:
        each = (arguments.tokens, ranks["seconds"], ranks["extra_bytes"])
        ratios = (f"{each[1] / row[1]:.2f}", f"{each[2] / row[2]:.1f}")
        table.add_row(f"each of {arguments.tensor} ranks ({ranks['tile']})", *numbers(*each), *ratios)
    if swept is not None:
        of_torch = (arguments.tokens, swept["seconds"], swept["extra_bytes"])
        ratios = (f"{of_torch[1] / row[1]:.2f}", f"{of_torch[2] / row[2]:.1f}")
        table.add_row(f"torch's sweeps, no kernels ({swept['tile']})", *numbers(*of_torch), *ratios)
    bound = (arguments.tokens, products["seconds"], products["extra_bytes"])
    bound_ratios = (f"{bound[1] / row[1]:.2f}", f"{bound[2] / row[2]:.1f}")
    table.add_row("its matrix products alone", *numbers(*bound), *bound_ratios)
    for peer in arguments.peers:
        of_peer = (arguments.tokens, found[peer]["seconds"], found[peer]["extra_bytes"])
        ratios = (f"{of_peer[1] / row[1]:.2f}", f"{of_peer[2] / row[2]:.1f}")
        table.add_row(chunked_heads.LABELS[peer], *numbers(*of_peer), *ratios)
    if other is not None:
        measured = (naive_tokens, other["seconds"], other["extra_bytes"])
        factor = arguments.tokens / naive_tokens
        fixed = arguments.vocab * arguments.hidden * DTYPES[arguments.dtype].itemsize
        scaled_bytes = fixed + (other["extra_bytes"] - fixed) * factor
        scaled = (arguments.tokens, other["seconds"] * factor, scaled_bytes)
        ratios = (f"{scaled[1] / row[1]:.2f}", f"{scaled[2] / row[2]:.1f}")
        table.add_row("naive, measured", *numbers(*measured), *(ratios if factor == 1 else ("", "")))
        if factor != 1:
            table.add_row(f"naive, scaled x {factor:g}", *numbers(*scaled), *ratios)
    console.print(table)
    console.print(f"Of the extra memory, {gradients / GB:.2f} GB are the gradients that both heads return.")
    same = ["chunked", *arguments.peers] + ["naive"] * (
        other is not None and naive_tokens == arguments.tokens
    )
    values = [found[head]["value"] for head in same]
    agree = max(values) - min(values) < 1e-3
    if len(same) > 1:
        means = ", ".join(f"{head} {found[head]['value']:.6f}" for head in same)
        console.print(f"{'PASS' if agree else 'FAIL'}: mean log-probs agree: {means}", highlight=False)
    limit = head_limit(
        tokens=arguments.tokens,
        vocab=arguments.vocab,
        hidden=arguments.hidden,
        itemsize=DTYPES[arguments.dtype].itemsize,
        tile_bytes=ours["tile_bytes"],
    )
    if arguments.limit_gb is not None:
        limit = arguments.limit_gb * GB
    passed = ours["extra_bytes"] < limit
    console.print(f"{'PASS' if passed else 'FAIL'}: extra peak below {limit / GB:.2f} GB", highlight=False)
    return 0 if passed and agree else 1


def numbers(tokens: int, seconds: float, extra_bytes: float) -> tuple[str, str, str]:
    return str(tokens), f"{seconds:.3g}", f"{extra_bytes / GB:.2f}"


def describe_device(arguments: argparse.Namespace) -> str:
    if arguments.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU with {arguments.threads} thread{'s' * (arguments.threads > 1)}"


if __name__ == "__main__":
    sys.exit(main())
