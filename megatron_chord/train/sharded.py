"""Converts Megatron-Core's sharded state dictionaries to boxes of a checkpoint, and back.

The layout on disk is that of ``megatron.core.dist_checkpointing``. We do not use its functions: its saving forks
processes that outlive a killed trainer and keep its files open, and its loading unpickles arbitrary objects.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_chord.train.optimizer_shares import Shares
from megatron_chord.weights.torch_dist import Box, Checkpoint

_EXTRA_STATE = "._extra_state"
"""The end of the keys of Transformer Engine's extra states, one for each module and each expert."""
Boxes = dict[Box, Callable[[], Tensor]]
Content = tuple[Boxes, dict[str, bytes], dict[str, Any]]
"""What a rank writes: boxes of tensors, objects by name, and the common part, which is equal on all ranks."""


def split_state(
    state: dict[str, Any], shares: Shares, *, experts: tuple[str, ...], replicas: int, expert_replicas: int
) -> Content:
    """Split a sharded state dictionary into the parts that this rank writes. The dictionary is changed.

    Ranks that hold the same weights divide them: each rank writes whole tensors, of about equally many bytes in total.
    For a tensor on the meta device, a rank writes the elements that ``shares`` assigns to it. If several ranks have the
    same object, one of them writes it. No collectives: ``write_description`` checks that every element is written
    exactly once.

    Args:
        experts: what the keys of experts' tensors end with (``expert_keys``).
        replicas: number of ranks that hold the same weights; ``expert_replicas``: the same experts.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

    parts, common = save_preprocess(state, validate_access_integrity=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # this stream must finish its writes before other threads copy on other streams
    boxes: Boxes = {}
    objects: dict[str, bytes] = {}
    copies: list[ShardedTensor] = []
    for part in _leaves(parts):
        if isinstance(part, ShardedTensor):
            assert isinstance(part.replica_id, tuple), part.key
            assert part.data is not None, part.key
            # The last number is the data-parallel rank. All data-parallel ranks write, each a different share.
            if not is_main_replica((*part.replica_id[:-1], 0)):
                continue
            if part.data.is_meta:
                boxes |= _share(part, shares)
            else:
                copies.append(part)
        elif is_main_replica(part.replica_id):
            content = io.BytesIO()
            torch.save([part.data], content)  # in a list, as Megatron does
            objects[part.unique_key] = content.getvalue()
    # Every replica finds the same parts in the same order, so all of them find the same writers.
    written = {False: [0] * replicas, True: [0] * expert_replicas}
    for part in sorted(copies, key=lambda part: _box(part).num_bytes, reverse=True):
        sizes = written[part.key.endswith(experts)]
        writer = sizes.index(min(sizes))
        sizes[writer] += _box(part).num_bytes
        assert isinstance(part.replica_id, tuple)
        if part.replica_id[-1] == writer:
            assert part.data is not None
            boxes[_box(part)] = part.data.detach
    return boxes, objects, common


def expert_keys(state: Any) -> tuple[str, ...]:
    """Keys of experts' weights. Megatron-Core marks these parameters with ``allreduce = False``."""
    keys = {
        part.key
        for part in _leaves(state)
        if getattr(getattr(part, "data", None), "allreduce", True) is False
    }
    return tuple(keys)


def fill(
    state: dict[str, Any], checkpoint: Checkpoint, common: dict[str, Any], shares: Shares
) -> tuple[dict[str, Any], Boxes]:
    """Fill a sharded state dictionary of this rank from a checkpoint. No collectives.

    Returns:
        the dictionary, whose tensors on the meta device are not filled, and for ``read_shares`` what this rank keeps of
        them.

    Raises:
        ValueError: a tensor is missing or has another shape, or an object is not plain data.
        OSError: a file cannot be read.
    """
    from megatron.core.dist_checkpointing.dict_utils import merge
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    factories: Any
    state, plain, factories = load_preprocess(state)
    parts, _ = extract_sharded_base(state)
    wanted = [part for part in _leaves(parts) if isinstance(part, ShardedTensor)]
    whole = {key: shape for key, shape, _ in checkpoint.tensors()}
    kept: Boxes = {}
    filled: list[ShardedTensor] = []
    for part in wanted:
        if not part.allow_shape_mismatch and whole.get(part.key) != tuple(part.global_shape):
            found = whole.get(part.key, "missing")
            raise ValueError(
                f"{checkpoint.folder}: {part.key} should be {tuple(part.global_shape)}, but is {found}"
            )
        if part.data is not None and part.data.is_meta:
            kept |= _share(part, shares)
            continue
        if part.data is None:
            part.data = torch.empty(part.local_shape, dtype=part.dtype)
        if part.allow_shape_mismatch:
            part.data.zero_()
        filled.append(part)
    checkpoint.read_all((_box(part), _with_axes(part)) for part in filled)
    loaded: Any = dict(common)
    merge(loaded, plain)
    merge(loaded, _each(parts, lambda part: _value(part, checkpoint)))
    return apply_factory_merges(loaded, factories), kept


def read_shares(checkpoint: Checkpoint, kept: Boxes) -> None:
    """Read what this rank keeps of the optimizer's state, in place. One stored part of a tensor is in memory at a time.

    Elements that the checkpoint does not have, as padding of the vocabulary, become 0.

    Raises:
        OSError: a file cannot be read.
    """
    targets: list[tuple[Box, Tensor]] = []
    for box, data in kept.items():
        into = data().zero_()
        targets.append((box, into[(None,) * (len(box.shape) - into.dim())]))
    checkpoint.read_all(targets)


def _value(part: Any, checkpoint: Checkpoint) -> Any:
    """The value that is loaded for a part. An extra state of Transformer Engine is never read; the value is then an
    empty tensor.

    An extra state is a pickle as a tensor of bytes. Transformer Engine 2.11 would load it with ``pickle.loads``, which
    can execute anything (pytorch/module/base.py, set_extra_state); it passes an empty tensor over. Nothing is lost: for
    the recipes blockwise and tensorwise it contains only the recipe, which comes from the settings at every forward
    pass. Only delayed scaling, which no precision here uses, keeps scales in it. A checkpoint that was written without
    Transformer Engine has none.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if isinstance(part, ShardedTensor):
        return part.data
    if part.key.endswith(_EXTRA_STATE):
        return torch.empty(0, dtype=torch.uint8)
    value = checkpoint.object(part.unique_key)
    if not isinstance(value, list) or len(value) != 1:
        raise ValueError(f"{checkpoint.folder}: {part.unique_key} was not written by a training run")
    return value[0]


def _box(part: Any) -> Box:
    assert part.flattened_range is None, part.key
    return Box(
        key=part.key,
        offset=tuple(part.global_offset),
        shape=(1,) * part.prepend_axis_num + tuple(part.local_shape),
        whole=tuple(part.global_shape),
        dtype=part.dtype,
    )


def _share(part: Any, shares: Shares) -> Boxes:
    box = _box(part)
    extra = (0,) * part.prepend_axis_num
    found: Boxes = {}
    for kept in shares.boxes(part.data):
        offset = tuple(a + b for a, b in zip(box.offset, extra + kept.offset, strict=True))
        shape = box.shape[: part.prepend_axis_num] + kept.shape
        found[replace(box, offset=offset, shape=shape)] = kept.data
    return found


def _with_axes(part: Any) -> Tensor:
    """A view of the data with the leading axes that the whole tensor has."""
    return part.data.detach()[(None,) * part.prepend_axis_num]


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _leaves(value)
    else:
        yield state


def _each(state: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(state, dict):
        return {key: _each(value, change) for key, value in state.items()}
    return [_each(value, change) for value in state] if isinstance(state, list) else change(state)
