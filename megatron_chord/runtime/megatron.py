"""The supported versions of Megatron-Core, and adaptations to the differences between them.

Each adaptation checks whether the installed Megatron-Core has the name or method in question. Nothing compares version
numbers. docs/megatron.md lists the differences.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

TESTED = {"0.16.1": ">=2.9,<2.12", "0.19.2": ">=2.11,<2.21"}
"""The versions with which the distributed tests run, and the versions of Transformer Engine that each supports. 0.16.1
states the bounds (METADATA, extra ``dev``). 0.19.2 states none; we built its layer specs with 2.11 to 2.20."""


def complete_names() -> None:
    """Correct names in Megatron-Core's latent attention that are missing or wrong without Transformer Engine.

    It changes nothing with Transformer Engine or when called again. Call it before a model is built.
    """
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        # 0.16.1, multi_latent_attention.py:185: isinstance is called with a mock as the class, and raises.
        multi_latent_attention.HAVE_TE = False
    if multi_latent_attention.Linear is None:
        # 0.19.2, multi_latent_attention.py:70: `Linear` is imported only with Transformer Engine, but line 532 compares
        # the layer spec's projections with it and refuses unknown ones.
        multi_latent_attention.Linear = Linear


def keep_one_norm(optimizer: Any) -> None:
    """Make the optimizer clip all gradients by one norm, without a collective that asks whether it should.

    0.19.2 uses a separate norm for the layers of multi-token prediction. In the first step it checks whether there are
    any, with one more all-reduce and one more wait for the device (optimizer/optimizer.py:294). No model here has such
    layers. 0.16.1 always uses one norm.
    """
    if hasattr(optimizer, "has_grad_norm_group"):
        optimizer.has_grad_norm_group = lambda group: False


def hide_warnings() -> None:
    """Hide warnings of Megatron-Core and ``torch.distributed``, in this process.

    They are about packages that a CPU cannot have and about calls inside Megatron-Core that torch will rename. A user
    can do nothing about them, and every rank would repeat them. Call it before Megatron-Core is imported.
    """
    for module in (r"megatron(?!_chord)", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("megatron").setLevel(logging.ERROR)


def leave_out_notices() -> None:
    """Remove messages from the log that 0.19.2 writes for every model and that a user cannot act on."""
    for module, notice in _NOTICES.items():
        logging.getLogger(module).addFilter(_Without(notice))


_NOTICES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}


@dataclass(frozen=True)
class _Without:
    """A filter of log records. It has an equality, so that a logger adds equal filters only once."""

    beginning: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)
