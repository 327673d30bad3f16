"""The versions of Megatron-Core that this program supports, and what one of them does that another does not.

Every difference is found by asking the installed Megatron-Core for the name or the method in question. Nothing compares
version numbers. docs/megatron.md lists what each version brings.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

TESTED = {"0.16.1": ">=2.9,<2.12", "0.19.2": ">=2.11,<2.21"}
"""The versions on which the distributed tests were run, and the versions of Transformer Engine that each works with.

0.16.1 states its bounds (METADATA, extra ``dev``). 0.19.2 states none; its layer specs were built with 2.11 to 2.20.
"""


def complete_names() -> None:
    """Give Megatron-Core's latent attention the names that it lacks, or has wrongly, without Transformer Engine.

    With Transformer Engine, and when called again, it changes nothing. To be called before a model is built.
    """
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        # 0.16.1, multi_latent_attention.py:185: it asks for instances of what is a mock, and isinstance raises.
        multi_latent_attention.HAVE_TE = False
    if multi_latent_attention.Linear is None:
        # 0.19.2, multi_latent_attention.py:70: imported with Transformer Engine only, but line 532 compares the layer
        # spec's projections with it, and refuses those that it does not know.
        multi_latent_attention.Linear = Linear


def keep_one_norm(optimizer: Any) -> None:
    """Have the optimizer clip all gradients by one norm, without asking all ranks whether it should.

    0.19.2 gives the layers of multi-token prediction a norm of their own, and asks in the first step whether there are
    any, which costs one more all-reduce and one more wait for the device (optimizer/optimizer.py:294). No model here
    has such layers. 0.16.1 has one norm for all.
    """
    if hasattr(optimizer, "has_grad_norm_group"):
        optimizer.has_grad_norm_group = lambda group: False


def leave_out_notices() -> None:
    """Leave out of the log what 0.19.2 says of every model, and what a user can do nothing about."""
    for module, notice in _NOTICES.items():
        logging.getLogger(module).addFilter(_Without(notice))


_NOTICES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}


@dataclass(frozen=True)
class _Without:
    """A filter of log records. A logger adds equal ones once."""

    beginning: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)
