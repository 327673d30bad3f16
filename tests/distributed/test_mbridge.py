"""mbridge, an independent converter, makes the same Megatron parameters from the same Hugging Face folder.

mbridge's models need Transformer Engine. Its tables of names and layouts do not, and only these are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.distributed.test_families import DENSE, MOE
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model

MODELS = {"qwen2": {"family": "qwen2"}} | {
    name: settings
    for name, settings in (DENSE | MOE).items()
    # mbridge does not know Mistral, DeepSeek-V2, dense layers among Qwen's experts, or routers that choose one expert.
    # Its DeepSeek-V3 has settings that megatron-core 0.16.1 lacks.
    if settings["family"] not in ("mistral", "deepseek_v2", "deepseek_v3")
    and not settings.keys() & {"mlp_only_layers", "decoder_sparse_step"}
    and settings.get("num_experts_per_tok") != 1
}


def hf_names(bridge: Any, entry: Any) -> tuple[str, list[str]]:
    """Return mbridge's name of the parameter, and the Hugging Face tensors that mbridge makes it from.

    mbridge's tables are written for Transformer Engine's layers. In layers with experts, these do not fuse the norm.
    """
    names = [
        name.replace("{layer}", str(entry.layer)).replace("{expert}", str(entry.expert))
        for name in reversed(entry.rule.megatron)
    ]
    for name in names:
        try:
            return name, bridge._weight_name_mapping_mcore_to_hf(name)
        except (NotImplementedError, KeyError):
            continue
    raise AssertionError(f"mbridge knows none of {names}")


def compare(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """Return, for each model, the number of compared parameters and the names of those that differ."""
    from mbridge import AutoBridge
    from transformers import AutoConfig

    from megatron_chord.convert.sources import HFSource

    results = {}
    for name, settings in MODELS.items():
        options = dict(settings)
        hf = save_model(options.pop("family"), folder / name, **options)
        source = HFSource.of(hf)  # must be first: it builds the process groups that mbridge needs
        config = AutoConfig.from_pretrained(hf)
        config.rope_theta = 1e4  # mbridge reads it where Transformers 4 had it; no weight depends on it
        if getattr(config, "head_dim", 0) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
        bridge: Any = AutoBridge.from_config(config, dtype=torch.float32)
        tensors = load_file(hf / "model.safetensors")
        compared, differences = 0, []
        for stored in source.layout.parameters:
            if not stored.entry.rule.exported:
                continue
            theirs, made_of = hf_names(bridge, stored.entry)
            expected = bridge._weight_to_mcore_format(theirs, [tensors[part] for part in made_of])
            if sorted(made_of) != sorted(stored.entry.hf):
                differences.append(f"{theirs}: {made_of}, ours {stored.entry.hf}")
            elif not source.rows(stored, 0, stored.shape[0]).equal(expected):
                differences.append(theirs)
            compared += 1
        results[name] = (compared, differences)
    return results


def test_mbridge_makes_the_same_parameters(tmp_path: Path) -> None:
    (results,) = run_ranks(compare, 1, tmp_path)
    assert {name: differences for name, (_, differences) in results.items()} == {name: [] for name in MODELS}
    assert all(compared > 20 for compared, _ in results.values())
