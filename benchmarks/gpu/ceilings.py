"""What this GPU can do at most: large matrix products, copies in its memory, transfers from and to pinned memory."""

from __future__ import annotations

import torch

from benchmarks.gpu.clock import device, seconds_of
from benchmarks.gpu.rows import Ceiling, Rows, parser_of

FP8_CAPABILITY = (8, 9)


def main() -> None:
    arguments = parser_of(__doc__ or "").parse_args()
    rows = Rows(arguments.rows, arguments.part)
    size = 256 if arguments.tiny else 8192
    size_bytes = 1 << (20 if arguments.tiny else 31)
    products(rows, size)
    fp8_products(rows, size)
    copies(rows, size_bytes)
    transfers(rows, size_bytes // 2)


def products(rows: Rows, size: int) -> None:
    left, right = (torch.randn(size, size, device=device()).bfloat16() for _ in range(2))
    seconds = seconds_of(lambda: left @ right, repeats=10)
    rows.measured(f"BF16 products of {size}", seconds, amount=2 * size**3, ceiling="products")


def fp8_products(rows: Rows, size: int) -> None:
    """Matrix products with one scale for each matrix."""
    case = f"FP8 products of {size}"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_CAPABILITY:
        rows.not_run(case, "needs a CUDA device of capability 8.9")
        return
    kind = torch.float8_e4m3fn
    left, right = (torch.randn(size, size, device="cuda").to(kind) for _ in range(2))
    one = torch.ones((), device="cuda")

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    seconds = seconds_of(multiply, repeats=10)
    rows.measured(case, seconds, amount=2 * size**3, ceiling="fp8 products")


def copies(rows: Rows, size: int) -> None:
    here = torch.zeros(size, dtype=torch.uint8, device=device())
    there = torch.zeros_like(here)
    seconds = seconds_of(lambda: there.copy_(here), repeats=10)
    case = f"copy of {size / 1e9:.3g} GB, read and written"
    rows.measured(case, seconds, amount=2 * size, ceiling="copies")


def transfers(rows: Rows, size: int) -> None:
    cases: dict[Ceiling, str] = {
        "to the host": f"{size / 1e9:.3g} GB to pinned memory",
        "from the host": f"{size / 1e9:.3g} GB from pinned memory",
    }
    if not torch.cuda.is_available():
        for case in cases.values():
            rows.not_run(case, "needs a CUDA device")
        return
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    here = torch.zeros(size, dtype=torch.uint8, device="cuda")
    ways = {"to the host": (pinned, here), "from the host": (here, pinned)}
    for ceiling, case in cases.items():
        target, source = ways[ceiling]
        seconds = seconds_of(lambda to=target, given=source: to.copy_(given, non_blocking=True))
        rows.measured(case, seconds, amount=size, ceiling=ceiling)


if __name__ == "__main__":
    main()
