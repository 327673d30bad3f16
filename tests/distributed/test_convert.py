"""tools/convert.py converts there and back bit for bit, Megatron-Core itself loads the result, and a refusal leaves no
file."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_chord.config import OptimConfig, ParallelConfig
from megatron_chord.config_io import dump_config
from megatron_chord.model.build import global_weights
from tests.distributed import steps
from tests.distributed.test_families import DENSE, MOE
from tests.support.ranks import ROOT, run_program_forked, run_ranks
from tests.support.tiny import save_model, save_qwen2, tiny_run

TOOL = ROOT / "tools" / "convert.py"
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}],
    4: [{"tensor": 2, "pipeline": 2}],
}


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_program_forked(TOOL, *arguments)


def convert_in_new_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the tool as a user starts it. Its imports take seconds, so most tests do not."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def megatron(model: Path) -> Path:
    target = model.parent / "megatron"
    result = convert_in_new_process("hf-to-megatron", model, target)
    assert result.returncode == 0, result.stderr
    return target


def test_conversion_to_megatron_and_back_changes_no_bit(model: Path, megatron: Path, tmp_path: Path) -> None:
    result = convert_in_new_process("megatron-to-hf", megatron, tmp_path / "back")
    assert result.returncode == 0, result.stderr
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    for one, other in ((model, megatron), (megatron, tmp_path / "back")):
        assert convert("verify", one, other).stdout.strip() == "the same model, bit for bit"
    assert convert("verify", model, megatron, "--logits").returncode == 0
    other = convert("verify", model, save_qwen2(tmp_path / "other", seed=5), "--logits")
    assert other.returncode == 1
    assert (
        "embedding.word_embeddings.weight (model.embed_tokens.weight) differs in rows 0 to 202"
        in other.stdout
    )
    assert "\n  ... and 15 more\n" in other.stdout
    assert "of 128 tokens in fp32 differ by at most" in other.stdout


def test_another_configuration_is_another_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    result = convert("verify", model, tmp_path / "other")
    assert result.returncode == 1
    assert "base=5000.0" in result.stdout
    assert "1e-05" in result.stdout


def loaded_by_megatron(folder: Path, checkpoint: Path, layouts: list[dict[str, Any]]) -> list[Any]:
    """Let Megatron's own loader fill models whose weights are NaN. Return whole tensors by Hugging Face name."""
    from megatron.core import dist_checkpointing

    results = []
    for layout in layouts:
        state = steps.build(folder, ParallelConfig(distributed_optimizer=False, **layout))
        modules = [chunk.module for chunk in state.chunks]
        with torch.no_grad():
            for module in modules:
                for weight in global_weights([module]).values():
                    weight.fill_(torch.nan)
            wanted = {
                str(i): module.sharded_state_dict(metadata={"singleton_local_shards": False})
                for i, module in enumerate(modules)
            }
            loaded: Any = dist_checkpointing.load(wanted, str(checkpoint))
            for i, module in enumerate(modules):
                module.load_state_dict(loaded[str(i)], strict=True)
        results.append(steps.gather_hf(state, state.weights()))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_megatron_core_loads_it_in_any_layout(model: Path, megatron: Path, world_size: int) -> None:
    expected = load_file(model / "model.safetensors")
    for results in run_ranks(loaded_by_megatron, world_size, model, megatron, LAYOUTS[world_size]):
        for layout, tensors in zip(LAYOUTS[world_size], results, strict=True):
            assert tensors.keys() == expected.keys(), layout
            assert all(tensors[name].equal(expected[name]) for name in expected), layout


MODELS = {"qwen2_tied": {"family": "qwen2", "tied": True}} | DENSE | MOE
FAMILIES = {
    "qwen2_tied": {"pipeline": 2},
    "llama_3": {},
    "qwen2_moe_tied": {"expert": 2},
    "qwen3_moe_untied": {"expert": 2},
    "qwen3_moe_every_other": {"pipeline": 2},
    "deepseek_v3_untied": {"tensor": 2, "sequence_parallel": True, "expert": 2},
}
"""Models of test_families, each with the layout in which Megatron loads it. Without one, the layout is two tensor
ranks."""


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def convert_all(folder: Path) -> dict[str, list[str]]:
    """Convert every family's models there and back in one process. Return the differences by model."""
    from megatron_chord.convert import directions
    from megatron_chord.convert.directions import differences, to_hf, to_megatron
    from megatron_chord.convert.sources import open_source

    # Sizes so small that every parameter has several pieces and every model several files.
    directions.PIECE_BYTES, directions.SHARD_BYTES = 2000, 20_000
    found = {}
    for name, settings in MODELS.items():
        here, options = folder / name, dict(settings)
        save_model(options.pop("family"), here / "hf", **options)
        original = open_source(here / "hf")
        to_megatron(original, here / "megatron")
        to_hf(open_source(here / "megatron"), here / "back")
        found[name] = [
            *differences(original, open_source(here / "megatron")),
            *differences(original, open_source(here / "back")),
        ]
        before, after = load_file(here / "hf" / "model.safetensors"), load_folder(here / "back")
        assert len(list((here / "back").glob("*.safetensors"))) > 5
        assert before.keys() == after.keys()
        assert all(before[tensor].equal(after[tensor]) for tensor in before)
    return found


def test_every_family_is_converted_there_and_back_and_loaded_by_megatron(tmp_path: Path) -> None:
    (found,) = run_ranks(convert_all, 1, tmp_path)
    assert found == {name: [] for name in MODELS}
    for name, layout in FAMILIES.items():
        here = tmp_path / name
        expected = load_file(here / "hf" / "model.safetensors")
        layouts = [layout or {"tensor": 2}]
        for (tensors,) in run_ranks(loaded_by_megatron, 2, here / "hf", here / "megatron", layouts):
            assert tensors.keys() == expected.keys(), name
            assert all(tensors[tensor].equal(expected[tensor]) for tensor in expected), name


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def convert_bias(folder: Path) -> dict[str, Any]:
    """Convert a BF16 model whose bias is FP32 there and back. Also convert it with the bias in other dtypes."""
    from megatron_chord.convert.directions import differences, to_hf, to_megatron
    from megatron_chord.convert.sources import open_source

    save_model("deepseek_v3", folder / "exact", layers=2)
    exact = load_file(folder / "exact" / "model.safetensors")
    for name, bias in {
        "hf": exact[BIAS],
        "rounded": exact[BIAS].bfloat16(),
        "double": exact[BIAS].double(),
    }.items():
        shutil.copytree(folder / "exact", folder / name)
        tensors = {name: tensor.bfloat16() for name, tensor in exact.items()} | {BIAS: bias}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    to_megatron(open_source(folder / "hf"), folder / "megatron")
    to_hf(open_source(folder / "megatron"), folder / "back")
    to_megatron(open_source(folder / "rounded"), folder / "rounded_megatron")
    with pytest.raises(ValueError, match=r"float64, which torch\.float32 cannot represent") as refused:
        open_source(folder / "double")

    def different(one: str, other: str) -> list[str]:
        return list(differences(open_source(folder / one), open_source(folder / other)))

    return {
        "same": different("hf", "back"),
        "rounded": different("rounded", "rounded_megatron"),
        "other": different("back", "rounded_megatron"),
        "refused": str(refused.value),
    }


def test_a_bias_in_fp32_stays_so_in_a_bf16_model(tmp_path: Path) -> None:
    (found,) = run_ranks(convert_bias, 1, tmp_path)
    assert found["same"] == found["rounded"] == []
    assert found["other"] == [f"decoder.layers.1.mlp.router.expert_bias ({BIAS}) differs in rows 0 to 11"]
    assert BIAS in found["refused"]
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back[BIAS], load_file(tmp_path / "exact" / "model.safetensors")[BIAS])
    assert {tensor.dtype for name, tensor in back.items() if name != BIAS} == {torch.bfloat16}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def save_training(folder: Path, target: Path) -> None:
    from megatron_chord.train import checkpoint
    from megatron_chord.train.update import apply_gradients

    state = steps.build(folder, ParallelConfig(tensor=2), OptimConfig())
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    apply_gradients(state)  # the gradient is 0: Adam's moments are made and the weights stay
    checkpoint.save(state, {"step": 0}, target, keep=1)


def changed(model: Path, folder: Path, **settings: Any) -> Path:
    """Copy the model and change settings in its config.json."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_a_training_checkpoint_of_two_ranks_is_exported(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(save_training, 2, model, run / "checkpoints")
    step = run / "checkpoints" / "step-000000"
    result = convert("megatron-to-hf", step, tmp_path / "policy")
    assert result.returncode == 2
    assert "has no hf/ with a config.json: name its model's folder with --hf" in result.stderr
    result = convert("megatron-to-hf", step, tmp_path / "policy", "--hf", model)
    assert result.returncode == 0, result.stderr
    assert convert("verify", model, tmp_path / "policy").returncode == 0
    assert convert("verify", step, tmp_path / "policy", "--hf", model).returncode == 0
    # Now the run's own config.yaml names the model.
    (run / "config.yaml").write_text(dump_config(tiny_run(model)))
    result = convert("megatron-to-megatron", run / "checkpoints", tmp_path / "alone")
    assert result.returncode == 0, result.stderr
    assert convert("verify", step, tmp_path / "alone").returncode == 0
    other = changed(model, tmp_path / "other", rms_norm_eps=1e-5)
    result = convert("verify", step, model, "--hf", other)
    assert result.returncode == 2
    assert f"rms_norm_eps: 1e-06 in {model}, 1e-05 in {other}" in result.stderr
    assert "optimizer." in convert("inspect", step).stdout
    assert "optimizer." not in convert("inspect", tmp_path / "alone").stdout
    expected = load_file(model / "model.safetensors")
    for (tensors,) in run_ranks(loaded_by_megatron, 2, model, tmp_path / "alone", [{"pipeline": 2}]):
        assert all(tensors[name].equal(expected[name]) for name in expected)


def sources(folder: Path, model: Path, megatron: Path) -> None:
    """Check where a source is found, which config.json contradicts it, and what dtype it is rounded to."""
    from megatron_chord.convert.directions import differences, to_hf, to_megatron
    from megatron_chord.convert.sources import checkpoint_of, open_source

    for named, record in (("iter_0000100", "100\n"), ("release", "release")):
        above = folder / named
        above.mkdir()
        shutil.copytree(megatron, above / named)
        (above / "latest_checkpointed_iteration.txt").write_text(record)
        assert checkpoint_of(above) == above / named
    for record in ("200", "../release", "/release", "release/../release", ""):
        (above / "latest_checkpointed_iteration.txt").write_text(record)
        with pytest.raises(ValueError, match=r"names the checkpoint .* which does not exist"):
            checkpoint_of(above)
    (folder / "former" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match="old format"):
        open_source(folder / "former")

    rope = json.loads((model / "config.json").read_text())["rope_parameters"] | {"rope_theta": 5000.0}
    for name, value in (("rope_parameters", rope), ("rms_norm_eps", 1e-5), ("tie_word_embeddings", True)):
        other = changed(model, folder / name, **{name: value})
        with pytest.raises(ValueError, match="contradicts the checkpoint's own") as refused:
            open_source(megatron, other)
        (finding,) = str(refused.value).splitlines()
        field = "rope_theta" if name == "rope_parameters" else name
        assert f" {field}: " in finding, finding

    tensors = load_file(model / "model.safetensors")
    mixed = {name: tensor.bfloat16() if "mlp" in name else tensor for name, tensor in tensors.items()}
    shutil.copytree(model, folder / "mixed")
    save_file(mixed, folder / "mixed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"\(--dtype rounds them to one\)\. \d+ are b?float\d+, but:"):
        open_source(folder / "mixed")
    rounded = open_source(folder / "mixed", dtype=torch.bfloat16)
    to_megatron(rounded, folder / "mixed_megatron")
    to_hf(open_source(megatron, dtype=torch.bfloat16), folder / "rounded")
    back = load_folder(folder / "rounded")
    assert all(back[name].equal(tensor.bfloat16()) for name, tensor in tensors.items())
    assert list(differences(rounded, open_source(folder / "mixed_megatron"))) == []
    assert list(differences(rounded, open_source(folder / "rounded"))) == []
    assert list(differences(open_source(model, dtype=torch.bfloat16), open_source(folder / "rounded"))) == []
    (finding,) = differences(open_source(model), open_source(folder / "rounded"))
    assert finding.startswith("dtype: ")


def test_where_a_source_is_found_and_what_it_is_rounded_to(
    model: Path, megatron: Path, tmp_path: Path
) -> None:
    run_ranks(sources, 1, tmp_path, model, megatron)


def test_the_plan_of_a_70b_model_from_its_config_alone(tmp_path: Path) -> None:
    """The parameters of Llama 3.1 70B are counted by hand: 80 layers of 8192 x (8192 + 2 x 1024 + 8192) + 3 x 8192 x
    28672 + 2 x 8192, a final norm of 8192, and 2 x 128256 x 8192 for embedding and head."""
    config = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = convert("plan", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "70,553,706,496 numbers" in result.stdout


def test_the_plan_of_deepseek_v3_from_its_config_alone(tmp_path: Path) -> None:
    """The 671B parameters of DeepSeek-V3 are counted by hand.

    Each of 61 layers has latent attention: 7168 x (1536 + 512 + 64) + 1536 x 128 x 192 + 512 x 128 x 256 + 128 x 128 x
    7168, and norms of 1536 + 512 + 2 x 7168. 3 layers have an MLP of 3 x 7168 x 18432, and 58 have experts: 257 x 3 x
    7168 x 2048 + 256 x 7168 + 256. Embedding and head have 2 x 129280 x 7168, the final norm 7168.
    """
    config = {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = convert("plan", tmp_path)
    assert result.returncode == 0, result.stderr
    attention = 7168 * (1536 + 512 + 64) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    norms = 1536 + 512 + 2 * 7168
    experts = 257 * 3 * 7168 * 2048 + 256 * 7168 + 256
    whole = 61 * (attention + norms) + 3 * 3 * 7168 * 18432 + 58 * experts + 2 * 129280 * 7168 + 7168
    assert 671e9 < whole < 672e9
    assert f"{whole:,} numbers" in result.stdout


def test_layers_for_multi_token_prediction_are_passed_over_and_said_to_be(tmp_path: Path) -> None:
    model = save_model("deepseek_v3", tmp_path / "hf", layers=2)
    tensors = load_file(model / "model.safetensors")
    save_file(
        tensors | {"model.layers.2.eh_proj.weight": torch.zeros(64, 128)},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    result = convert("hf-to-megatron", model, tmp_path / "megatron")
    assert result.returncode == 0, result.stderr
    assert (
        "left out, because they do not belong to the model: 1 tensors (model.layers.2.eh_proj.weight"
        in result.stdout
    )


def damaged(model: Path, folder: Path, how: str) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        del tensors[name], tensors["model.norm.weight"]
    elif how == "extra":
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors[name].clone()
    elif how == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif how == "dtype":
        tensors[name] = tensors[name].half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if how == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    if how in ("config", "architecture"):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change = {"intermediate_size": 80} if how == "config" else {"model_type": "mamba9"}
        path.write_text(json.dumps(config | change))
    return folder


@pytest.mark.parametrize(
    ("how", "findings"),
    [
        ("missing", ["missing model.layers.1.mlp.up_proj.weight", "missing model.norm.weight"]),
        ("extra", ["unexpected model.layers.9.mlp.up_proj.weight"]),
        ("shape", ["model.layers.1.mlp.up_proj.weight"]),
        ("dtype", ["model.layers.1.mlp.up_proj.weight is float16"]),
        ("truncated", ["model.safetensors"]),
        ("config", [f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in range(4)]),
        ("architecture", ["unknown model_type 'mamba9'"]),
    ],
)
def test_damaged_input_leaves_nothing_behind(
    model: Path, tmp_path: Path, how: str, findings: list[str]
) -> None:
    source = damaged(model, tmp_path / "damaged", how)
    result = convert("hf-to-megatron", source, tmp_path / "target")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert all(finding in result.stderr for finding in findings), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_truncated_checkpoint_is_refused_and_leaves_nothing(megatron: Path, tmp_path: Path) -> None:
    shutil.copytree(megatron, tmp_path / "damaged")
    file = max((tmp_path / "damaged").glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result = convert("megatron-to-hf", tmp_path / "damaged", tmp_path / "target")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert str(tmp_path / "damaged") in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_full_disk_leaves_nothing_behind(
    model: Path, megatron: Path, tmp_path: Path, direction: str
) -> None:
    """The disk has room for the weights, so the check before the conversion passes, and only 4 kB for all other
    files."""
    source = model if direction == "hf-to-megatron" else megatron
    weights = (model / "model.safetensors").stat().st_size
    size = -(-weights // 4096) * 4096 + 4096
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size={size} tmpfs {disk} && {sys.executable} {TOOL} {direction} {source} {disk}/target"
    script += f"; code=$?; ls -A {disk}; exit $code"
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no file system of its own can be mounted here")
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_fp8_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    """Numbers times scales differ from the weights by at most half of E4M3's widest spacing (32 of 448), relative to
    the block's largest number."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 128, "vocab": 250}
    model = save_model("qwen3_moe", tmp_path / "hf", layers=2, moe_intermediate_size=128, **sizes)
    result = convert("to-fp8", model, tmp_path / "fp8")
    assert result.returncode == 0, result.stderr
    exported = load_folder(tmp_path / "fp8")
    quantised = {name for name, tensor in exported.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name.split(".")[-2] for name in quantised} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    ).state_dict()
    assert read.keys() == exact.keys()
    for name, numbers in exact.items():
        if not any(part in name for part in ("_proj", "experts")):
            assert read[name].equal(numbers), name
            continue
        blocks = numbers.unflatten(-2, (-1, 128)).unflatten(-1, (-1, 128))
        largest = blocks.abs().amax(dim=(-3, -1), keepdim=True).expand_as(blocks)
        error = (read[name] - numbers).unflatten(-2, (-1, 128)).unflatten(-1, (-1, 128)).abs()
        assert (error <= largest * 16.001 / 448).all(), name
        assert error.max() > 0


def test_fp8_blocks_over_a_border_are_refused(model: Path, tmp_path: Path) -> None:
    result = convert("to-fp8", model, tmp_path / "fp8")
    assert result.returncode == 2
    assert "model.layers.3.self_attn.k_proj.weight has 32 rows" in result.stderr
    assert not (tmp_path / "fp8").exists()


class Canary:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/megatron_chord_canary"),))


def test_a_hostile_checkpoint_runs_nothing(megatron: Path, tmp_path: Path) -> None:
    canary = Path("/tmp/megatron_chord_canary")
    canary.unlink(missing_ok=True)
    shutil.copytree(megatron, tmp_path / "hostile")
    (tmp_path / "hostile" / ".metadata").write_bytes(pickle.dumps(Canary()))
    result = convert_in_new_process("megatron-to-hf", tmp_path / "hostile", tmp_path / "target")
    assert result.returncode == 2
    assert "cannot be read: it needs" in result.stderr
    assert not canary.exists()
    assert not (tmp_path / "target").exists()
