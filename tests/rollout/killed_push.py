"""A trainer that is killed in the middle of a push: python -m tests.rollout.killed_push URL, with CHORD_TEST_KEY."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.sync import SyncSettings, WeightSync
from tests.rollout.helpers import make_model, weights_of


def half() -> Iterator[tuple[str, torch.Tensor]]:
    """The weights up to the middle of a layer."""
    for name, tensor in weights_of(make_model(7)):
        if name == "model.layers.1.self_attn.v_proj.weight":
            os.kill(os.getpid(), signal.SIGKILL)
        yield name, tensor


def main() -> None:
    settings = SyncSettings(transport="file", timeout_s=240, folder=Path("/dev/shm"), bucket_bytes=1)
    client = RolloutClient(sys.argv[1], os.environ["CHORD_TEST_KEY"])
    WeightSync([client], settings, exporters=[0], group=None, device=torch.device("cpu")).push(half(), 7)


if __name__ == "__main__":
    main()
