"""The policy: a GPTModel whose last stage returns hidden states, and a separate log-prob head.

The head gets only the hidden states that predict a trained token. So logits are computed for trained tokens only, and
only for one chunk of them at a time (``losses.logprobs``).
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_chord.losses.logprobs import HeadOutput, token_logprobs
from megatron_chord.model.packed import SharedPrompts
from megatron_chord.runtime.parallel import Axis


class PolicyModel(GPTModel):
    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron's, with the rotary frequencies of each token's own position if prompts are shared.

        Megatron uses frequencies as they are if there is one for each token of the pack (rope_utils.py:202).
        """
        embedded, frequencies, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        packed = kwargs.get("packed_seq_params")
        if frequencies is not None and isinstance(packed, SharedPrompts):
            frequencies = frequencies[position_ids[0]]
        return (embedded, frequencies, *rest)

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """The final hidden states [T (or T / tensor with sequence parallelism), 1, H]: no logits."""
        return hidden_states

    def token_logprobs(
        self,
        hidden: Tensor,
        positions: Tensor,
        targets: Tensor,
        *,
        vocab_size: int,
        temperature: float | Tensor,
        tensor: Axis,
        rival: bool = False,
    ) -> HeadOutput:
        """Log-probs and entropies [P] of ``targets`` [P], predicted at ``positions`` [P] of the packed batch.

        Args:
            hidden: the output of the last stage's forward pass.
            vocab_size: without padding rows, which are not part of the softmax.
            temperature: one number, or [P].
            rival: also return the log-prob of the best other token.

        Collectives on the tensor group: 2 all-reduces forward, 1 backward; with sequence parallelism also one
        all-gather forward, and a reduce-scatter in place of the all-reduce backward.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=tensor.group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=tensor.group)
        weight = self.output_weight()
        first_row = tensor.rank * weight.shape[0]
        real_rows = min(max(vocab_size - first_row, 0), weight.shape[0])
        return token_logprobs(
            hidden[:, 0][positions],
            weight[:real_rows] if real_rows < weight.shape[0] else weight,
            targets,
            first_row=first_row,
            temperature=temperature,
            group=tensor.group,
            rival=rival,
        )

    def output_weight(self) -> Tensor:
        """This rank's rows of the output embedding [W, H], padding rows included."""
        if self.share_embeddings_and_output_weights:
            shared = self.shared_embedding_or_output_weight()
            assert shared is not None, "only the first and the last pipeline stage hold the embedding"
            return shared
        weight: Any = self.output_layer.weight
        return weight
