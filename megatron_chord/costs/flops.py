"""FLOPs of a model, by the convention of published figures.

A multiplication with an addition counts 2 FLOPs. Causal attention is counted once. Norms, lookups, activation functions
and recomputation do not count.
"""

from __future__ import annotations

from megatron_chord.costs.parameters import Sizes, active_count, active_in_layer, head_count
from megatron_chord.families.shape import ModelShape


def train_flops(shape: ModelShape, length: float) -> float:
    """FLOPs of one token's forward and backward pass, as a mean over a sequence of ``length`` tokens.

    The number is 6 per parameter that multiplies the token, plus 3 per layer, position and channel. The channels are
    those of the queries (for the scores) and those of attention's output (for the values). The factor is 3 and not 6
    because the mean token attends to half of the positions. If both have the same number of channels, this is the
    convention of [MB-ARCH] (docs/planning.md): 6 per layer, position and channel. Over sequences of several lengths,
    ``length`` is their mean weighted by tokens: the sum of squares over the sum.
    """
    return 6 * active_count(shape) + _per_position(shape) * length


def recomputed_flops(shape: ModelShape, length: float, recompute: str) -> float:
    """FLOPs of one token that ``model.recompute`` adds to ``train_flops``: a second forward pass, or only its MLPs."""
    if recompute == "full":
        return train_flops(shape, length) / 3
    return sum(layer_flops(shape, length, recompute)) - sum(layer_flops(shape, length, "none"))


def layer_flops(shape: ModelShape, length: float, recompute: str) -> list[float]:
    """FLOPs of one token's passes through each layer, including recomputation (``model.recompute``).

    With ``recompute`` none, these and ``head_flops`` add up to ``train_flops``.
    """

    def of_layer(number: int) -> float:
        attention = _per_position(shape) / shape.num_layers * length
        once = 6 * active_in_layer(shape, number) + attention
        if recompute == "mlp":
            return once + 2 * active_in_layer(shape, number, part="mlp.")
        return once * 4 / 3 if recompute == "full" else once

    dense = shape.experts.dense_layers if shape.experts else ()
    numbers = range(shape.num_layers)
    of_kind = {is_dense: of_layer(n) for is_dense, n in {n in dense: n for n in numbers}.items()}
    return [of_kind[number in dense] for number in numbers]


def head_flops(shape: ModelShape) -> float:
    """FLOPs of one token's forward and backward pass through the head."""
    return 6 * head_count(shape)


def attention_cost(shape: ModelShape) -> float:
    """The cost of attention relative to the matrix products of one token: a sequence of n tokens costs n +
    attention_cost n^2, in units of the products of one token with the parameters."""
    return _per_position(shape) / (6 * active_count(shape))


def decode_attention_flops(shape: ModelShape) -> float:
    """FLOPs of one decoded token for each position that it attends to, over all layers."""
    return 2 * shape.num_layers * Sizes.of(shape).decode_channels


def _per_position(shape: ModelShape) -> float:
    of = Sizes.of(shape)
    return 3 * shape.num_layers * (of.query + of.attended)
