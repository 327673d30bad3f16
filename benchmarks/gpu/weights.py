"""What a push of weights computes on the trainer's GPU: fingerprints, and staging for servers on the same GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.clock import device, seconds_of
from benchmarks.gpu.rows import Rows, parser_of
from benchmarks.shapes import model_config
from megatron_chord.rollout.buckets import describe
from megatron_chord.rollout.checksum import fingerprints
from megatron_chord.rollout.transports import IpcTransport


def main() -> None:
    arguments = parser_of(__doc__ or "").parse_args()
    rows = Rows(arguments.rows, arguments.part)
    bucket = matrices(tiny=arguments.tiny)
    size = sum(tensor.nbytes for _, tensor in bucket)
    seconds = seconds_of(lambda: fingerprints(bucket))
    rows.measured("fingerprints of a layer", seconds, amount=size, ceiling="copies", gb=size / 1e9)
    case = "staging of a layer"
    if not torch.cuda.is_available():
        rows.not_run(case, "needs a CUDA device")
        return
    transport, infos = IpcTransport(0, 1, device()), describe(bucket)
    seconds = seconds_of(lambda: transport.publish(bucket, infos))
    rows.measured(case, seconds, amount=2 * size, ceiling="copies", gb=size / 1e9)


def matrices(*, tiny: bool) -> list[tuple[str, Tensor]]:
    """The matrices of one layer of the 7B shape, in BF16."""
    config = model_config("7b", tiny=tiny)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    sizes = {"q": (hidden, hidden), "o": (hidden, hidden), "gate": (inner, hidden), "down": (hidden, inner)}
    return [(name, torch.randn(*size, device=device()).bfloat16()) for name, size in sizes.items()]


if __name__ == "__main__":
    main()
