"""Folders that users really have are read as Transformers reads them, or refused with the reason and exit code 2.

A reason takes one line. Where several tensors are wrong, each has a further line.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.distributed.test_convert_endings import load_tool
from tests.support.ranks import run_ranks
from tests.support.tiny import LLAMA3_ROPE, save_model

Change = Callable[[Path], object]
UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def config(**settings: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        changed = json.loads(path.read_text()) | settings
        path.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return rewrite


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(placed.values()):
        part = {name: tensor for name, tensor in tensors.items() if placed[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def both(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "kept")
    shards(folder)
    (folder / "kept").rename(folder / "model.safetensors")


def without_one_shard(folder: Path) -> None:
    shards(folder)
    (folder / "model-1.safetensors").unlink()


def only(name: str) -> Change:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def linked(folder: Path) -> None:
    """Replace the file by a link, as in a snapshot of the hub's cache."""
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")


def extra(**tensors: torch.Tensor) -> Change:
    names = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return weights(lambda stored: stored | names)


def prefixed(prefix: str) -> Change:
    return weights(lambda stored: {prefix + name: tensor for name, tensor in stored.items()})


def renamed_index(file: Any) -> Change:
    def change(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "x.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    return change


def changed_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return weights(lambda stored: stored | {name: change(stored[name]).contiguous()})


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Store a head beside the embedding to which it is tied."""
    return weights(lambda stored: stored | {"lm_head.weight": change(stored[EMBEDDING].clone())})


def without_prefix(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in stored.items()}


def set_one(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor.view(-1)[5] = value
    return tensor


def in_a_wrong_shard(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Store a tensor also in a shard for which the index does not list it."""

    def rewrite(folder: Path) -> None:
        shards(folder)
        listed = json.loads((folder / INDEX).read_text())["weight_map"]
        (other,) = {*listed.values()} - {listed[UP]}
        tensor = load_file(folder / listed[UP])[UP]
        save_file(load_file(folder / other) | {UP: change(tensor)}, folder / other, {"format": "pt"})

    return rewrite


def rewrite_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text()) | changes
    (folder / INDEX).write_text(json.dumps({n: value for n, value in index.items() if value is not ...}))


def misplaced(folder: Path) -> None:
    """Give one tensor the wrong file in the index."""
    shards(folder)
    index = json.loads((folder / INDEX).read_text())
    (other,) = {*index["weight_map"].values()} - {index["weight_map"][UP]}
    rewrite_index(folder, weight_map=index["weight_map"] | {UP: other})


def cut_off(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def instead(name: str) -> Change:
    """Replace a file by a folder."""
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


ONE = torch.zeros(1)
FREQUENCIES = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
OLD_LLAMA3_ROPE = {"type" if name == "rope_type" else name: value for name, value in LLAMA3_ROPE.items()}
BASES: dict[str, tuple[str, bool]] = {
    "a tied head that is stored, too": ("qwen3", True),
    "a tied head that differs": ("qwen3", True),
    "a tied head of another shape": ("qwen3", True),
    "a tied folder without the prefix model.": ("qwen3", True),
    "a tied folder under both names": ("qwen3", True),
    "the frequencies of old folders": ("llama", False),
    "RoPE that is scaled linearly": ("llama", False),
    "Llama 3's RoPE as Transformers 4 wrote it": ("llama", False),
    "RoPE of Llama 3 without its factor": ("llama", False),
    "a window that is as long as the positions": ("mistral", False),
    "a window that is shorter than the positions": ("mistral", False),
    "a mixture with more chosen than experts": ("mixtral", False),
    "a mixture of many experts": ("qwen3_moe", False),
}
"""The family of each folder that is not made of Qwen2, and whether its embeddings are tied."""
LOADED: dict[str, Change] = {
    "as it is": lambda folder: None,
    "a tied head that is stored, too": with_head(lambda embedding: embedding),
    "a tied folder without the prefix model.": weights(without_prefix),
    "the frequencies of old folders": weights(lambda stored: stored | FREQUENCIES),
    "swish instead of silu": config(hidden_act="swish"),
    "RoPE that is scaled linearly": config(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "Llama 3's RoPE as Transformers 4 wrote it": config(
        rope_parameters=..., rope_theta=1e4, rope_scaling=OLD_LLAMA3_ROPE
    ),
    "a window that is as long as the positions": config(sliding_window=512),
    "a window that is switched off": config(use_sliding_window=False, sliding_window=8, max_window_layers=1),
    "is_causal true": config(is_causal=True),
    "the old name of the dtype": config(dtype=..., torch_dtype="float32"),
    "another dtype in config.json": config(dtype="bfloat16"),
    "the class of another program": config(architectures=["MyPolicy"]),
    "no end token": config(eos_token_id=None, bos_token_id=None),
    "an index with a wrong total size": all_of(
        shards, lambda folder: rewrite_index(folder, metadata={"total_size": "x"})
    ),
    "NaN among the weights": changed_tensor(UP, lambda tensor: set_one(tensor, torch.nan)),
    "shards with an index": shards,
    "a symbolic link": linked,
    "an index that names the single file": lambda folder: (folder / INDEX).write_text(
        json.dumps(
            {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")}
        )
    ),
    "all in bfloat16": weights(lambda stored: {name: t.bfloat16() for name, t in stored.items()}),
    "all in float16": weights(lambda stored: {name: t.half() for name, t in stored.items()}),
    "an adapter beside the model": text("adapter_config.json", "{}"),
    "pickled weights beside the model": text("pytorch_model.bin", "pickle"),
    "a stale index of pickled weights": text("pytorch_model.bin.index.json", "[]"),
    "RoPE as Transformers 4 wrote it": config(rope_parameters=..., rope_theta=5000.0),
    "no RoPE settings": config(rope_parameters=...),
    "no tie_word_embeddings": config(tie_word_embeddings=...),
    "unknown settings": config(my_own_setting=[1], unsloth_version="2025.1"),
}
REFUSED: dict[str, tuple[Change, str]] = {
    "a tied head that differs": (with_head(lambda embedding: set_one(embedding, 9.0)), "in 1 of 203 rows"),
    "a tied head of another shape": (with_head(lambda embedding: embedding[:100]), r"lm_head\.weight has shape"),
    "a tied folder under both names": (
        weights(lambda t: t | {"norm.weight": t["model.norm.weight"] + 1}), r"with and without 'model\.': model\.norm"
    ),
    "a tensor in two shards, equal": (in_a_wrong_shard(lambda tensor: tensor), "stored twice"),
    "a tensor in two shards, different": (in_a_wrong_shard(lambda tensor: tensor + 1), "stored twice"),
    "a tensor that the index seeks in a wrong file": (misplaced, UP),
    "a file that is cut off": (cut_off, r"model\.safetensors is not a readable"),
    "a file that is something else": (text("model.safetensors", "<!DOCTYPE html>" * 99), "is not a readable"),
    "a folder instead of the weights": (instead("model.safetensors"), "has no weights"),
    "a link to nothing": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("gone")),
        "has no weights",
    ),
    "a folder instead of config.json": (instead("config.json"), r"config\.json does not exist"),
    "a config.json that is nested deeply": (text("config.json", "[" * 9**5), "nested too deeply"),
    "a config.json that is not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "not a JSON file"),
    "an index that is cut off": (all_of(shards, text(INDEX, '{"weight_map": {')), "not a JSON file"),
    "an index without a map": (all_of(shards, text(INDEX, '{"weight_map": null}')), "weight_map must be an object"),
    "an index with an empty map": (all_of(shards, text(INDEX, '{"weight_map": {}}')), "weight_map must be an object"),
    "an index of absolute paths": (renamed_index("/tmp/x.safetensors"), "file of the same folder"),
    "a tokenizer_config of a list": (text("tokenizer_config.json", "[]"), r"tokenizer_config\.json must hold"),
    "a generation_config that is cut off": (text("generation_config.json", '{"a'), r"generation_config\.json is not"),
    "no model_type": (config(model_type=...), "model_type must be a string"),
    "a family that Megatron-Core cannot compute": (config(model_type="gemma2"), "cannot compute"),
    "a number as text": (config(rms_norm_eps="1e-6"), "rms_norm_eps must be a positive number, not '1e-6'"),
    "a number of 0": (config(rms_norm_eps=0), "rms_norm_eps must be a positive number"),
    "a number that is NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps must be a positive number"),
    "a number that is infinite": (config(rms_norm_eps=float("inf")), "rms_norm_eps must be a positive number"),
    "a number that no float holds": (config(rope_theta=10**400), "rope_theta must be a positive number"),
    "a size as text": (config(hidden_size="64"), "hidden_size must be a positive integer"),
    "a size that is null": (config(num_hidden_layers=None), "num_hidden_layers"),
    "a size that is true": (config(num_hidden_layers=True), "num_hidden_layers must be a positive integer"),
    "a size that is negative": (config(num_attention_heads=-4), "num_attention_heads must be a positive integer"),
    "a size with a fraction": (config(intermediate_size=96.5), "intermediate_size must be a positive integer"),
    "very many layers": (config(num_hidden_layers=10**12), "more than this program can list"),
    "a mixture of many experts": (config(num_experts=..., num_local_experts=10**12), "can list"),
    "a mixture with more chosen than experts": (config(num_experts_per_tok=5), "num_experts_per_tok 5 of 4"),
    "a very large vocabulary": (config(vocab_size=10**15), "shape"),
    "a flag as text": (config(tie_word_embeddings="false"), "must be true or false"),
    "heads that do not divide": (config(num_key_value_heads=3), "no multiple of 3 key-value heads"),
    "another activation": (config(hidden_act="gelu"), "hidden_act 'gelu' is not silu"),
    "an activation of a list": (config(hidden_act=["silu"]), "hidden_act"),
    "an embedder": (config(is_causal=False), "is_causal False is not supported"),
    "a window that is switched on": (config(use_sliding_window=True, sliding_window=8), "window"),
    "a window that is shorter than the positions": (config(sliding_window=8), "window of 8 is shorter"),
    "layers of unequal kinds": (config(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    "layer_types of text": (config(layer_types="full_attention"), "layer_types"),
    "YaRN": (config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "type 'yarn'"),
    "dynamic RoPE": (config(rope_parameters={"rope_type": "dynamic", "factor": 4.0}), "type 'dynamic'"),
    "longrope": (config(rope_parameters={"rope_type": "longrope", "long_factor": [1.0]}), "type 'longrope'"),
    "a RoPE type of a list": (config(rope_parameters={"rope_type": ["linear"]}), "rope_type"),
    "RoPE settings of a list": (config(rope_parameters=[1]), "rope_parameters"),
    "RoPE settings of text": (config(rope_scaling="linear"), "rope_scaling"),
    "RoPE of Llama 3 without its factor": (
        config(rope_parameters={n: v for n, v in LLAMA3_ROPE.items() if n != "factor"}), "positive 'factor'"
    ),
    "RoPE on half of a head": (config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "RoPE over several axes": (config(rope_parameters={"mrope_section": [4, 2, 2]}), "RoPE over several axes"),
    "an end token beyond the vocabulary": (config(eos_token_id=[2, 203]), "eos_token_id 203 is beyond the vocabulary"),
    "an end token of text": (config(eos_token_id="2"), "eos_token_id"),
    "weights in float8": (
        weights(lambda stored: {n: t.to(torch.float8_e4m3fn) for n, t in stored.items()}), "must all be float32"
    ),
    "weights in float64": (weights(lambda stored: {n: t.double() for n, t in stored.items()}), "--dtype rounds them"),
    "a matrix that is transposed": (changed_tensor(UP, torch.t), "disagree with its config.json"),
    "a matrix that is a vector": (changed_tensor(UP, torch.flatten), "disagree with its config.json"),
    "an embedding of more tokens": (
        weights(lambda t: t | {n: torch.cat([t[n], t[n][:5]]) for n in (EMBEDDING, "lm_head.weight")}), r"208, 64"
    ),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), r"config\.json does not exist"),
    "a config.json that is cut off": (text("config.json", '{"model_type": "qw'), r"config\.json"),
    "a config.json that is empty": (text("config.json", ""), r"config\.json"),
    "a config.json of a list": (text("config.json", "[1]"), r"config\.json"),
    "a generation_config of a list": (text("generation_config.json", "[]"), r"generation_config\.json must hold"),
    "a tokenizer_config that is cut off": (text("tokenizer_config.json", "{"), r"tokenizer_config\.json is not"),
    "an unknown model_type": (config(model_type="mamba9"), "unknown model_type 'mamba9'"),
    "a model_type of a list": (config(model_type=["qwen2"]), "model_type"),
    "no vocab_size": (config(vocab_size=...), "vocab_size"),
    "quantised weights": (config(quantization_config={"quant_method": "gptq"}), "quanti"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "pickled weights alone": (only("pytorch_model.bin"), "save it again with save_pretrained"),
    "an adapter alone": (only("adapter_config.json"), "merge_and_unload"),
    "GGUF alone": (only("model-Q4_K_M.gguf"), "GGUF"),
    "a publisher's own format": (only("consolidated.00.pth"), "publisher's own format"),
    "the hub's cache, one level up": (only("snapshots"), "snapshots/REVISION"),
    "a pointer of Git LFS": (text("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "an empty file": (text("model.safetensors", ""), "it is empty"),
    "a shard that is not there": (without_one_shard, r"lists files that do not exist: model-1\.safetensors"),
    "a single file beside an index of others": (both, "has both"),
    "an index out of the folder": (renamed_index("../x.safetensors"), "file of the same folder"),
    "an index of numbers": (renamed_index(3), "file of the same folder"),
    "an index of a list": (lambda folder: (only("x.safetensors")(folder), (folder / INDEX).write_text("[]")), INDEX),
    "a tensor that is missing": (weights(lambda t: {n: v for n, v in t.items() if n != UP}), f"missing {UP}"),
    "a tensor too many": (extra(model__layers__9__x=ONE), r"unexpected model\.layers\.9\.x"),
    "a value head": (extra(v_head__summary__weight=ONE), "value head"),
    "a classifier": (extra(score__weight=ONE), "reward model"),
    "an adapter in the weights": (extra(model__layers__0__lora_A__weight=ONE), "adapter"),
    "names of torch.compile": (prefixed("_orig_mod."), "torch.compile"),
    "names of a data-parallel wrapper": (prefixed("module."), "data-parallel wrapper"),
    "names of PEFT": (prefixed("base_model.model."), "PEFT"),
    "a shape that config.json does not have": (config(intermediate_size=80), "disagree with its config.json"),
    "two dtypes": (weights(lambda t: t | {UP: t[UP].half()}), rf"--dtype rounds.* but: {UP} is float16"),
    "whole numbers as weights": (weights(lambda t: t | {UP: t[UP].int()}), "is of type I32"),
}  # fmt: skip


LISTS = (
    "a very large vocabulary",
    "an embedding of more tokens",
    "a family that Megatron-Core cannot compute",
    "a shape that config.json does not have",
    "names of torch.compile",
    "names of a data-parallel wrapper",
    "names of PEFT",
)
"""Folders in which several tensors or parts are wrong: each has a further line below the error."""


def read(folder: Path) -> tuple[dict[str, float], dict[str, tuple[int, str]]]:
    """Return the largest logit difference of each folder that loads, and the exit code and stderr of each that is
    refused."""
    from megatron_chord.convert import logits
    from megatron_chord.convert.sources import open_source

    tool = load_tool()

    @functools.cache
    def base(family: str, tied: bool) -> Path:
        return save_model(family, folder / f"{family}-{tied}", tied=tied, layers=2)

    def odd(name: str, change: Change) -> Path:
        here = folder / str(len(os.listdir(folder)))
        shutil.copytree(base(*BASES.get(name, ("qwen2", False))), here)
        change(here)
        return here

    differences = {}
    tokens = logits.sample_tokens(203, 24)
    for name, change in LOADED.items():
        source = open_source(odd(name, change))
        theirs, ours = logits._transformers(source, tokens), logits._megatron(source, tokens)
        same_places = torch.equal(theirs.isnan(), ours.isnan())
        largest, _ = logits.logit_differences(theirs.nan_to_num(), ours.nan_to_num())
        differences[name] = largest if same_places else torch.nan
    refusals = {}
    for name, (change, _) in REFUSED.items():
        path, said = odd(name, change), io.StringIO()  # Transformers shows its progress while it saves a base
        with contextlib.redirect_stderr(said):
            code = tool.main(["hf-to-megatron", str(path), str(folder / f"target-{name}")])
        refusals[name] = code, said.getvalue()
    return differences, refusals


def test_odd_folders_load_as_transformers_loads_them_or_are_refused(tmp_path: Path) -> None:
    ((differences, refusals),) = run_ranks(read, 1, tmp_path)
    assert {name: largest for name, largest in differences.items() if not largest < 2e-5} == {}
    for name, (code, said) in refusals.items():
        assert code == 2, (name, said)
        first, *findings = said.rstrip("\n").splitlines()
        assert first.startswith("error: "), (name, said)
        assert len(findings) <= 21, (name, said)
        assert all(finding.startswith("  ") for finding in findings), (name, said)
        assert bool(findings) == (name in LISTS), (name, said)
        assert re.search(REFUSED[name][1], said), (name, said)
    assert {*BASES, *LISTS} <= {*LOADED, *REFUSED}
    assert not list(tmp_path.glob("target-*"))
