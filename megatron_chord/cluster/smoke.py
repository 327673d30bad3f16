"""One all-reduce over all ranks of a job. The preflight runs it, to find network faults within seconds."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from megatron_chord.runtime.rendezvous import meet

_TIMEOUT_S = 120


def main() -> int:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    meet("nccl" if device.type == "cuda" else "gloo", timeout_s=_TIMEOUT_S)
    total = torch.full((1 << 20,), float(rank), device=device)
    dist.all_reduce(total)
    expected = size * (size - 1) / 2
    dist.destroy_process_group()
    if not bool((total == expected).all()):
        print(f"rank {rank}: the sum over ranks is {float(total[0])} instead of {expected}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
