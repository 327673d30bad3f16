"""Export of the trained policy as a Hugging Face folder. All pipeline stages write it; it appears only when
complete."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_chord.train.sanity import check_finite
from megatron_chord.train.state import TrainState
from megatron_chord.weights.mapping import check_accounting
from megatron_chord.weights.sums import checked_each
from megatron_chord.weights.writer import finish_folder, write_shards


def export_policy(state: TrainState, source: Path, target: Path, *, chat_template: str | None = None) -> None:
    """Write the policy to ``target``, which is replaced. Config, tokenizer and template are copied from ``source``.

    ``chat_template`` is the template that the policy was trained with, if it is not that of the source. Only the
    coordinator's value is used.

    Called on every rank. Additional memory: one safetensors shard on the first rank of each pipeline stage.

    Raises:
        NonFiniteWeights: a weight is not finite; nothing was written.
        WrongExport: a tensor to be written does not hold the parameters; ``target`` is as it was.
    """
    check_finite(state, f"{target} was not written", with_optimizer=False)
    groups = state.groups
    dtype = next(iter(state.parameters().values())).dtype
    partial = target.with_name(f".{target.name}.partial")

    def write() -> dict[str, tuple[str, int]]:
        expected = state.expected_sums()
        tensors = state.hf_tensors()
        try:
            return write_shards(
                checked_each(tensors, expected), partial, prefix=f"model-stage{groups.pipeline.rank + 1:02d}"
            )
        except Exception:
            for _ in tensors:  # take part in the gathers of the tensor-parallel peers
                pass
            raise

    def make_empty() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    groups.once(make_empty)
    placed = {name: place for part in groups.together(write) for name, place in part.items()}

    def finish() -> None:
        check_accounting(list(state.shape.weights.hf_names()), list(placed), str(partial))
        finish_folder(partial, source, placed, dtype=dtype, chat_template=chat_template)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)

    groups.once(finish)
