"""Folders that users really have are read as Transformers reads them, or refused with the reason and exit code 2."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.distributed.test_convert_endings import load_tool
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model

Change = Callable[[Path], object]
UP = "model.layers.1.mlp.up_proj.weight"
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


ONE = torch.zeros(1)
LOADED: dict[str, Change] = {
    "as it is": lambda folder: None,
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
    "two dtypes": (weights(lambda t: t | {UP: t[UP].half()}), "--dtype rounds them to one"),
    "whole numbers as weights": (weights(lambda t: t | {UP: t[UP].int()}), "is of type I32"),
}  # fmt: skip


def read(folder: Path) -> tuple[dict[str, float], dict[str, tuple[int, str]]]:
    """Return the largest logit difference of each folder that loads, and the exit code and stderr of each that is
    refused."""
    from megatron_chord.convert import logits
    from megatron_chord.convert.sources import open_source

    tool = load_tool()
    model = save_model("qwen2", folder / "hf", layers=2)
    differences = {}
    tokens = logits.sample_tokens(203, 24)
    for number, (name, change) in enumerate(LOADED.items()):
        here = folder / f"loaded-{number}"
        shutil.copytree(model, here)
        change(here)
        source = open_source(here)
        largest, _ = logits.logit_differences(
            logits._transformers(source, tokens), logits._megatron(source, tokens)
        )
        differences[name] = largest
    refusals = {}
    for number, (name, (change, _)) in enumerate(REFUSED.items()):
        here = folder / f"refused-{number}"
        shutil.copytree(model, here)
        change(here)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = tool.main(["hf-to-megatron", str(here), str(folder / f"target-{number}")])
        refusals[name] = code, said.getvalue()
    return differences, refusals


def test_odd_folders_load_as_transformers_loads_them_or_are_refused(tmp_path: Path) -> None:
    ((differences, refusals),) = run_ranks(read, 1, tmp_path)
    assert {name: largest for name, largest in differences.items() if not largest < 1e-4} == {}
    for name, (code, said) in refusals.items():
        assert code == 2, (name, said)
        first, *findings = said.rstrip("\n").splitlines()
        assert first.startswith("error: "), (name, said)
        assert len(findings) <= 21, (name, said)
        assert all(finding.startswith("  ") for finding in findings), (name, said)
        assert re.search(REFUSED[name][1], said), (name, said)
    assert len(LOADED) + len(REFUSED) >= 40
    assert not list(tmp_path.glob("target-*"))
