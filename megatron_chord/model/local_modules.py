"""Norm and attention of the local layer spec, for machines without Transformer Engine.

They replace two modules of Megatron-Core. Megatron's torch norm does not support sequence parallelism. Its unfused
attention does not support packed sequences, expands grouped keys and materialises the scores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_chord.data.packing import context_order
from megatron_chord.model.packed import SharedPrompts


class RMSNorm(torch.nn.Module):
    """RMS norm with fp32 statistics; marks its weight for the gradient reduction of sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class PackedAttention(MegatronModule):
    """Causal self-attention over packed sequences, with one call of scaled_dot_product_attention for each sequence.

    It needs no mask over the pack and no copies of grouped keys. With context parallelism every rank has two chunks of
    each sequence, in Transformer Engine's layout, and keys and values are gathered over the context group (one
    all-gather forward, one reduce-scatter backward).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = groups.cp
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        if config.attention_dropout or config.apply_query_key_layer_scaling or config.window_size is not None:
            raise ValueError("PackedAttention has no dropout, no layer scaling and no sliding window")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """[T, heads, D], [T, groups, D] and [T, groups, V] -> [T, heads * V]; T tokens of this context rank."""
        assert packed_seq_params is not None, "only packed batches come here"
        assert attention_mask is None, "the mask of a packed batch is causal"
        starts = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(starts)]
        if self.context_group.size() > 1:
            outputs = self._over_context(query, key, value, lengths)
        elif isinstance(packed_seq_params, SharedPrompts):
            outputs = self._over_prompts(query, key, value, lengths, packed_seq_params.prompts)
        else:
            sequences = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            outputs = [self._attend(q, k, v, None) for q, k, v in sequences]
        return torch.cat(outputs).flatten(1)

    def _over_prompts(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], prompts: Sequence[int]
    ) -> list[Tensor]:
        """Each sequence attends to its prompt's sequence as well, if it has one."""
        keys, values = key.split(lengths), value.split(lengths)
        outputs = []
        for index, (part, prompt) in enumerate(zip(query.split(lengths), prompts, strict=True)):
            if prompt < 0:
                outputs.append(self._attend(part, keys[index], values[index], None))
                continue
            before, own = lengths[prompt], lengths[index]
            mask = torch.ones(own, before + own, dtype=torch.bool, device=query.device).tril(before)
            whole_key, whole_value = (torch.cat([parts[prompt], parts[index]]) for parts in (keys, values))
            outputs.append(self._attend(part, whole_key, whole_value, mask))
        return outputs

    def _over_context(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> list[Tensor]:
        size, rank = self.context_group.size(), self.context_group.rank()
        gathered = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1), tensor_parallel_output_grad=True, group=self.context_group
        ).unflatten(0, (size, -1))
        outputs, start = [], 0
        for length in lengths:
            stop = start + length // size
            # The gathered tokens are ordered by rank; this permutation restores the order of the sequence.
            order = torch.cat([context_order(length, size, r, query.device) for r in range(size)]).argsort()
            whole = gathered[:, start:stop].flatten(0, 1)[order]
            whole_key, whole_value = whole.split([key.shape[-1], value.shape[-1]], dim=-1)
            positions = context_order(length, size, rank, query.device)
            mask = positions[:, None] >= torch.arange(length, device=query.device)[None, :]
            outputs.append(self._attend(query[start:stop], whole_key, whole_value, mask))
            start = stop
        return outputs

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[S, heads, D], [L, groups, D] and [L, groups, V] -> [S, heads, V]; causal when there is no mask."""
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1)
