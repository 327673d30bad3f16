"""The modules that the server of ``tests.support.ranks`` imports before it forks. None of them starts a thread."""

from megatron_chord.importing import importing

with importing():
    import torch.distributed  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from megatron_chord.runtime import cpu

    cpu.import_without_compiling()

    import tests.distributed.steps  # noqa: F401
