"""Complete estimates: the cluster examples, layouts that do not fit, the search, and the command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config import RunConfig, data_parallel_size
from megatron_chord.config_io import load_config
from megatron_chord.costs.gpus import GPUS
from megatron_chord.costs.parameters import model_count
from megatron_chord.model.build import check_shape
from megatron_chord.plan.constants import CONSTANTS
from megatron_chord.plan.estimate import (
    Cluster,
    Times,
    case_of,
    checkpoint_bytes,
    choice_of,
    disk_bytes,
    estimate,
    export_bytes,
)
from megatron_chord.plan.report import layout
from megatron_chord.plan.search import _splits, best_block, search, search_servers
from megatron_chord.plan.work import EarlyStop
from tests.support.published import CLUSTER_RUNS, CONFIGS, EXAMPLES, ROLLOUT_NODES, shared

ROOT = EXAMPLES.parents[1]


def shared_run(name: str, *overrides: str) -> RunConfig:
    """The example, with servers beside the ranks on every node."""
    return shipped(name, *shared(name), *overrides)


def shipped(name: str, *overrides: str) -> RunConfig:
    """The example as it is."""
    model, _ = CLUSTER_RUNS[name]
    return load_config(EXAMPLES / f"{name}.yaml", [f"model.path={CONFIGS / model}", *overrides])


def h100(nodes: int = 1, **others: int) -> Cluster:
    return Cluster(gpu=GPUS["h100"], nodes=nodes, **others)


@pytest.mark.parametrize("name", sorted(CLUSTER_RUNS))
def test_every_cluster_example_fits(name: str) -> None:
    run, nodes, apart = shipped(name), CLUSTER_RUNS[name][1], ROLLOUT_NODES[name]
    found = estimate(case_of(run, h100(nodes, rollout_nodes=apart)), choice_of(run))
    assert found.problems == ()
    assert found.warnings == (), "a push meets its deadline"
    assert max(found.training_peak, found.sampling_peak) <= 80e9
    assert run.parallel.ranks == (nodes - apart) * 8
    assert run.batch.max_tokens_per_gpu >= run.data.max_prompt_tokens + run.data.max_response_tokens


def test_there_are_no_other_cluster_examples() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(CLUSTER_RUNS)


@pytest.mark.parametrize("name", sorted(CLUSTER_RUNS))
def test_every_script_asks_for_the_nodes_that_its_example_fits(name: str) -> None:
    script = (ROOT / "slurm" / f"{name}.sh").read_text()
    assert f"#SBATCH --nodes={CLUSTER_RUNS[name][1]}\n" in script
    assert f'CHORD_ROLLOUT_NODES="${{CHORD_ROLLOUT_NODES:-{ROLLOUT_NODES[name]}}}"' in script
    assert f"examples/cluster/{name}.yaml" in script


def test_a_step_is_its_phases() -> None:
    times = Times(sampling=10.0, scoring=2.0, training=6.0, sync=1.0, overlap=False, overhead=0.1)
    assert times.step == pytest.approx(19 * 1.1)
    assert dataclasses.replace(times, overlap=True).step == pytest.approx(11 * 1.1)


def test_work_follows_the_settings() -> None:
    run = shared_run("chord_qwen7b")
    case = case_of(run, h100(), prompt_tokens=200, response_tokens=3000, demonstration_tokens=5000)
    # 32 x 8 rollouts of 3200 tokens, and 64 demonstrations of 5200.
    assert case.work.tokens == 256 * 3200 + 64 * 5200
    assert case.work.passes == 0
    kl = case_of(shared_run("chord_qwen7b", "objective.kl.coefficient=0.01"), h100())
    assert (kl.work.passes, kl.reference) == (1, True)
    both = shared_run("chord_qwen7b", "objective.kl.coefficient=0.01", "objective.ratio_from=recomputed")
    assert case_of(both, h100()).work.passes == 2
    # LUFFY trains on the own demonstration of each of 16 prompts.
    assert (
        case_of(load_config(ROOT / "examples" / "methods" / "luffy.yaml"), h100()).work.demonstrations == 16
    )
    sft = case_of(shared_run("chord_qwen7b", "method.mu.peak=1"), h100())
    assert (sft.work.sequences, sft.sampling_seconds(), sft.sync_seconds()) == (0, 0, 0)


def test_partial_rollouts_shorten_the_sampling() -> None:
    """A quarter more of 126 prompts are 32, rounded up."""
    run = shared_run("chord_qwen7b")
    batch = "batch.prompts=126"
    whole, carrying, dropping = (
        case_of(shared_run("chord_qwen7b", batch, *partial), h100())
        for partial in (
            [],
            ["rollout.partial.max_carries=3"],
            ["rollout.partial.unfinished=drop"],
        )
    )
    assert whole.work.early_stop is None
    assert carrying.work.early_stop == EarlyStop(extra_prompts=32, carries=True, max_carries=3)
    assert dropping.work.early_stop == EarlyStop(extra_prompts=32, carries=False)
    assert max(carrying.sampling_seconds(), dropping.sampling_seconds()) < whole.sampling_seconds()
    found = estimate(carrying, choice_of(run))
    assert found.times.sampling == carrying.sampling_seconds()
    assert found.warnings == ()


def test_scoring_is_a_third_and_recomputation_a_third_more() -> None:
    base = ("objective.kl.coefficient=0.01", "rollout.gpu_memory_utilization=0.3")
    full, none = (
        estimate(case_of(run, h100()), choice_of(run)).times
        for run in (
            shared_run("chord_qwen7b", *base),
            shared_run("chord_qwen7b", *base, "model.recompute=none"),
        )
    )
    assert full.scoring == pytest.approx(none.training / 3)
    assert full.training == pytest.approx(none.training * 4 / 3)


def test_two_updates_of_half_a_step_have_larger_bubbles() -> None:
    one, two = (shared_run("chord_llama70b", f"batch.updates_per_step={count}") for count in (1, 2))
    first, second = (estimate(case_of(run, h100(8)), choice_of(run)) for run in (one, two))
    assert second.training.micro_batches == pytest.approx(first.training.micro_batches / 2, abs=1)
    assert second.speed.bubble > first.speed.bubble


def test_a_run_that_does_not_fit_says_by_how_much() -> None:
    run = shared_run("chord_llama70b", "rollout.offload=false")
    found = estimate(case_of(run, h100(2)), choice_of(run))
    training, sampling = found.problems
    over = (found.training_peak - 80e9) / 1e9
    assert over > 0
    assert f"{over:.1f} GB more than the 80 GB of an H100 SXM" in training
    assert "pipeline stage" in training
    assert "lower rollout.gpu_memory_utilization" in sampling


def test_a_server_that_cannot_hold_the_model_says_so() -> None:
    run = shared_run("chord_llama70b", "rollout.tensor=2")
    (problem,) = estimate(case_of(run, h100(8)), choice_of(run)).problems
    assert "KV cache holds 0 tokens, one sample may have 9216" in problem
    assert "weights take 70.6 GB" in problem


def test_separate_nodes_do_not_share_memory() -> None:
    run = shared_run("chord_llama70b", "rollout.gpu_memory_utilization=0.85", "rollout.offload=false")
    together = estimate(case_of(run, h100(8)), choice_of(run))
    apart = estimate(case_of(run, h100(16, rollout_nodes=8), overlap=True), choice_of(run))
    assert together.problems
    assert not apart.problems
    assert apart.sampling_peak == pytest.approx(0.85 * 79.1 * 2**30)
    assert apart.times.step < together.times.step


def test_offloading_leaves_only_weights_beside_the_servers() -> None:
    """Llama-3.1-70B on 64 H100 with TP4 x PP4: 12 bytes of optimizer state a parameter, split over 4 data-parallel
    ranks."""
    with_it, without = (
        estimate(case_of(run, h100(8)), choice_of(run))
        for run in (shared_run("chord_llama70b", *more) for more in ((), ("rollout.offload=false",)))
    )
    assert with_it.choice.parallel.tensor * with_it.choice.parallel.pipeline == 16
    stage = max(with_it.stages, key=lambda stage: stage.parameters)
    count = stage.parameters
    assert 70.6e9 / 16 < count < 1.1 * 70.6e9 / 16
    assert with_it.saved == pytest.approx(12 * count / 4)
    assert without.sampling_peak - with_it.sampling_peak == pytest.approx(4 * count + 12 * count / 4)
    assert with_it.training_peak == without.training_peak
    assert with_it.times.step - without.times.step == pytest.approx(1.03 * 2 * 12 * count / 4 / 20e9)
    assert (without.saved, without.times.offload) == (0.0, 0.0)


def test_weights_travel_as_a_job_sends_them() -> None:
    """70B in BF16 is 141 GB. Over gloo each of a node's 8 GPUs receives all of it, at 0.72 GB/s a node."""
    run, size = shared_run("chord_llama70b"), 2 * 70_553_706_496
    relayed = case_of(run, h100(8))
    assert (relayed.chosen_transport, relayed.sync_seconds()) == (
        "relay",
        pytest.approx(4.34 + size / 13.9e9),
    )
    assert estimate(relayed, choice_of(run)).warnings == ()
    case = case_of(shared_run("chord_llama70b", "rollout.transport=gloo"), h100(8))
    assert case.sync_seconds() == pytest.approx(2 + 8 * size / 0.72e9)
    assert 25 * 60 < case.sync_seconds() < 27 * 60
    (warning,) = estimate(case, choice_of(run)).warnings
    assert "over gloo takes about 1570 s, longer than timeouts.weight_push_s (600 s)" in warning
    apart = case_of(run, h100(16, rollout_nodes=8))
    assert (apart.chosen_transport, apart.sync_seconds()) == ("broadcast", pytest.approx(0.5 + size / 40e9))
    assert estimate(apart, choice_of(run)).warnings == ()
    small = case_of(shared_run("chord_qwen7b"), h100())
    assert small.chosen_transport == "ipc"
    stated = case_of(shared_run("chord_llama70b", "rollout.transport=broadcast"), h100(8))
    assert stated.chosen_transport == "broadcast"


@pytest.mark.parametrize(
    ("name", "nodes", "transport", "buffers"),
    [
        # A tensor that is larger than a bucket is sent alone: Qwen2.5-7B's embedding, 152064 x 3584 in BF16, over CUDA
        # IPC, and Llama-3.1-70B's, 128256 x 8192, over the relay, which ends in CUDA IPC on each node.
        ("chord_qwen7b", 1, "ipc", 2 * 2 * 152064 * 3584),
        ("chord_llama70b", 8, "relay", 2 * 2 * 128256 * 8192),
    ],
)
def test_memory_of_pushes_by_cuda_ipc(name: str, nodes: int, transport: str, buffers: int) -> None:
    """Servers on a node's other GPUs read an exporter's memory over CUDA IPC, with a reserve of one context of 0.5 GB.
    The exporter keeps two buffers."""
    run = shared_run(name)
    case = case_of(run, h100(nodes))
    assert case.chosen_transport == transport
    with_it, without = (
        estimate(one, choice_of(run)) for one in (case, dataclasses.replace(case, transport="broadcast"))
    )
    assert with_it.training_peak - without.training_peak == pytest.approx(0.5e9 + buffers)
    assert with_it.sampling_peak - without.sampling_peak == pytest.approx(0.5e9 + buffers)


def test_buffers_of_pushes_have_at_least_a_bucket() -> None:
    """Qwen2.5-7B with a small vocabulary: the largest matrices are those of its MLP, 18944 x 3584. In BF16 they are
    smaller than a bucket of 256 MiB, in FP32 larger."""
    case = case_of(shared_run("chord_qwen7b"), h100())
    case = dataclasses.replace(case, shape=dataclasses.replace(case.shape, vocab_size=1024))
    assert case.push_buffers == 2 * 256 * 2**20
    assert dataclasses.replace(case, weight_bytes=4).push_buffers == 2 * 4 * 18944 * 3584


def test_main_memory_and_disk_of_a_node() -> None:
    """Llama-3.1-70B, TP4 x PP4 x DP4: a rank offloads a quarter of its optimizer state, and copies a quarter of its
    checkpoint while it is written."""
    run = shared_run("chord_llama70b")
    case = case_of(run, h100(8))
    found = estimate(case, choice_of(run))
    count = max(stage.parameters for stage in found.stages)
    assert found.host.offloaded == pytest.approx(8 * 12 * count / 4)
    assert found.host.staged == pytest.approx(8 * 14 * count / 4)
    assert found.host.processes == 16 * 5e9
    assert found.host.total == found.host.offloaded + found.host.staged + found.host.processes
    assert disk_bytes(case) == 3 * checkpoint_bytes(case)
    evaluated = ("data.evaluation=held.jsonl", "evaluation.every=10", "checkpoint.keep_best=accuracy")
    best = case_of(shared_run("chord_llama70b", *evaluated), h100(8))
    assert disk_bytes(best) == 4 * checkpoint_bytes(case), "two newest, the best, and the one being written"


@pytest.mark.parametrize(
    ("method", "each", "written"),
    [
        ({"name": "relift"}, 8, 2 + 12 + 12),
        ({"name": "self_distillation", "teacher": "averaged"}, 4, 2 + 12 + 12),
        ({"name": "self_distillation"}, 0, 2 + 12),
    ],
)
def test_further_optimizer_states_are_in_main_memory(method: dict[str, Any], each: int, written: int) -> None:
    """ReLIFT keeps two FP32 moments in main memory, an averaged teacher the FP32 weights: each rank those of a quarter
    of its parameters. A checkpoint has a second optimizer state, which is copied to main memory before it is
    written, also if training waits."""
    aligned = json.dumps(method["name"] == "relift")
    settings = [f"method={json.dumps(method)}", "batch.demonstrations=0", f"data.aligned={aligned}"]
    run = shared_run("chord_llama70b", *settings)
    case = case_of(run, h100(8))
    found = estimate(case, choice_of(run))
    count = max(stage.parameters for stage in found.stages)
    assert found.host.states == pytest.approx(8 * each * count / 4)
    assert found.host.staged == pytest.approx(8 * written * count / 4)
    waiting = shared_run("chord_llama70b", *settings, "checkpoint.asynchronous=false")
    of_waiting = estimate(case_of(waiting, h100(8)), choice_of(waiting)).host
    assert of_waiting.staged == pytest.approx(8 * (written - 2 - 12) * count / 4)
    assert checkpoint_bytes(case) == pytest.approx(written * model_count(case.shape))


def test_routes_of_a_step_are_in_main_memory() -> None:
    """Qwen3-30B-A3B: 48 layers x 8 experts are 384 bytes for each token of a rollout. The servers of a node keep a
    quarter of them. A replica's ranks all have those of the replica."""
    run = shared_run("chord_qwen3_30b_a3b")
    case = case_of(run, h100(4), prompt_tokens=200, response_tokens=1000)
    found = estimate(case, choice_of(run)).host
    sequences = run.batch.prompts * run.batch.rollouts
    step = sequences * 1200 * 48 * 8
    assert found.routes == pytest.approx(step / 4 + step / 4), "the servers', and those of 8 of 32 replicas"
    wide = shared_run("chord_qwen3_30b_a3b", "parallel.context=2")
    case_of_wide = case_of(wide, h100(4), prompt_tokens=200, response_tokens=1000)
    of_wide = estimate(case_of_wide, choice_of(wide)).host
    assert of_wide.routes == pytest.approx(step / 4 + step / 2), "both ranks of 4 of 16 replicas have them"
    assert found.total == found.offloaded + found.staged + found.states + found.routes + found.processes
    off = shared_run("chord_qwen3_30b_a3b", "rollout.router_replay=false")
    assert estimate(case_of(off, h100(4)), choice_of(off)).host.routes == 0
    dense = shared_run("chord_qwen7b")
    assert estimate(case_of(dense, h100()), choice_of(dense)).host.routes == 0


def test_too_little_main_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("chord_qwen7b", "--host-memory", "1024") == 0
    assert "a checkpoint being written" in capsys.readouterr().out
    assert plan("chord_qwen7b", "--host-memory", "256") == 1
    said = capsys.readouterr().err
    assert "GB of main memory" in said
    assert "what needs less: rollout.offload: false, checkpoint.asynchronous: false" in said
    smaller = ("rollout.offload=false", "checkpoint.asynchronous=false")
    plan("chord_qwen7b", "--host-memory", "128", *smaller)
    assert "GB of main memory" not in capsys.readouterr().err, "what is advised must help"


def test_what_never_ends_has_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    """A server of two GPUs cannot hold 70B, so no time of a step is stated."""
    assert plan("chord_llama70b", "--nodes", "8", "rollout.tensor=2") == 1
    assert "never: does not fit" in capsys.readouterr().out
    assert plan("chord_llama70b", "--nodes", "8", "rollout.tensor=2", "--json") == 1
    assert json.loads(capsys.readouterr().out)["seconds"]["step"] is None


def test_gpu_names_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("chord_qwen7b", "--gpu", "GB200") == 0
    assert "8 GB200" in capsys.readouterr().out
    assert plan("chord_qwen7b", "--gpu", "H1000") == 2
    assert "'H1000' is not known; known are h100" in capsys.readouterr().err


def test_the_fullest_stage_may_lie_between() -> None:
    """DeepSeek-V2-Lite over 3 stages: the first has the dense layer and the last the head, so the middle one is the
    fullest."""
    run = shared_run("chord_qwen3_30b_a3b", f"model.path={CONFIGS / 'deepseek-v2-lite'}")
    parallel = dataclasses.replace(run.parallel, tensor=1, pipeline=3, sequence_parallel=False, expert=1)
    choice = dataclasses.replace(choice_of(run), parallel=parallel)
    found = estimate(case_of(run, h100(3)), choice)
    assert [stage.stage for stage in found.stages] == [0, 1, 2]
    # A layer's experts (66 x 3 x 2048 x 1408) are compared with the dense layer's MLP and the embedding.
    first, second, _ = (stage.parameters for stage in found.stages)
    assert second - first == 66 * 3 * 2048 * 1408 + 64 * 2048 - 3 * 2048 * 10944 - 102400 * 2048


def test_a_precision_of_the_run_is_planned_for() -> None:
    slow, fast = (
        case_of(shared_run("chord_qwen7b", f"precision={precision}"), h100())
        for precision in ("bf16", "fp8_e2e")
    )
    before, after = (estimate(case, choice_of(shared_run("chord_qwen7b"))).times for case in (slow, fast))
    # Hidden size 3584, tensor 2.
    linear = (CONSTANTS.width_cost + CONSTANTS.tensor_cost) / 3584
    faster = (CONSTANTS.bf16_floor + linear) / (CONSTANTS.fp8_floor + linear)
    assert after.training == pytest.approx(before.training / faster)
    assert after.sampling < before.sampling
    run = shared_run("chord_qwen72b", "precision=fp8_e2e")
    with pytest.raises(ValueError, match="29568"):
        estimate(case_of(run, h100(8)), choice_of(run))


def test_disk() -> None:
    case = case_of(shared_run("chord_llama70b"), h100(8))
    assert export_bytes(case) == 2 * 70_553_706_496
    assert checkpoint_bytes(case) == 14 * 70_553_706_496
    tiny = case_of(load_config(ROOT / "examples" / "methods" / "sft.yaml"), h100())
    # One step of this run on a CPU left tensors of 5,264,384 bytes.
    assert checkpoint_bytes(tiny) == 5_264_384


BAD = [
    (lambda: Cluster(gpu=GPUS["h100"], nodes=0), "at least 1"),
    (lambda: h100(2, rollout_nodes=2), "leave none to train on"),
    (lambda: case_of(shared_run("chord_qwen7b", "rollout.tensor=16"), h100()), "does not divide the 8 GPUs"),
    (lambda: case_of(shared_run("chord_qwen7b", "rollout.tensor=8"), h100()), "28 attention heads"),
    (lambda: case_of(shared_run("chord_qwen7b"), h100(), overlap=True), "only on nodes of its own"),
    (lambda: case_of(shared_run("chord_qwen7b"), h100(), response_tokens=20_000), "response tokens 20000"),
    (
        lambda: case_of(shared_run("chord_qwen7b", "data.max_response_tokens=40000"), h100()),
        "more than the model's 32768 positions",
    ),
    (
        lambda: case_of(shared_run("chord_qwen7b", "batch.demonstrations=0"), h100()),
        "batch.demonstrations is 0",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_trainers_own_rules_hold() -> None:
    run = shared_run("chord_qwen7b", "parallel.tensor=8")
    with pytest.raises(ValueError, match="28 attention heads / tensor 8; 4 key-value heads / tensor 8"):
        estimate(case_of(run, h100()), choice_of(run))
    large = shared_run("chord_llama70b")
    with pytest.raises(ValueError, match="does not divide the 8 processes"):
        estimate(case_of(large, h100()), choice_of(large))


@pytest.mark.parametrize("name", ["chord_qwen7b", "chord_llama70b", "chord_qwen3_30b_a3b"])
def test_search(name: str) -> None:
    run, nodes = shared_run(name), CLUSTER_RUNS[name][1]
    case = case_of(run, h100(nodes))
    own = estimate(case, choice_of(run))
    found = search(case, choice_of(run))
    steps = [one.times.step for one in found.fitting]
    assert steps[0] <= 1.01 * min(steps)
    assert steps[0] <= 1.01 * own.times.step
    assert own.choice in [one.choice for one in found.fitting]
    for one in found.fitting[:20]:
        assert not one.problems
        check_shape(case.shape, one.choice.parallel)
        assert data_parallel_size(one.choice.parallel, nodes * 8) == one.training.data
        assert one.choice.parallel.tensor <= 8
    assert all(one.problems for one in found.too_large)


def test_the_block_is_the_layout(tmp_path: Path) -> None:
    run = shared_run("chord_llama70b")
    case = case_of(run, h100(8))
    best = search(case, choice_of(run)).fitting[0]
    base = f"base: {EXAMPLES / 'chord_llama70b.yaml'}\n"
    (tmp_path / "run.yaml").write_text(base + best_block(best))
    again = load_config(tmp_path / "run.yaml", [f"model.path={run.model.path}", *shared("chord_llama70b")])
    assert choice_of(again) == best.choice


def test_the_search_varies_servers_and_the_split_of_nodes(tmp_path: Path) -> None:
    """7B on 2 nodes whose own servers have too little cache: the search finds others, beside the ranks and apart."""
    run = shared_run("chord_qwen7b", "rollout.gpu_memory_utilization=0.2")
    case = case_of(run, h100(2))
    assert estimate(case, choice_of(run)).problems
    _, placed = search_servers(case, choice_of(run))
    assert {one.case.cluster.rollout_nodes for one in placed} == {0, 1}
    assert len({one.case.rollout_tensor for one in placed}) > 1
    assert len({one.case.utilization for one in placed}) > 1
    for one in placed:
        assert one.estimate == estimate(one.case, one.estimate.choice)
        assert not one.estimate.problems
        assert one.case.cluster.gpus == 16
    best = placed[0]
    assert best.estimate.times.step <= 1.01 * min(one.estimate.times.step for one in placed)
    base = f"base: {EXAMPLES / 'chord_qwen7b.yaml'}\n"
    (tmp_path / "run.yaml").write_text(base + best_block(best.estimate, best.case))
    again = load_config(tmp_path / "run.yaml", [f"model.path={run.model.path}"])
    assert choice_of(again) == best.estimate.choice
    assert again.rollout.tensor == best.case.rollout_tensor
    assert again.rollout.gpu_memory_utilization == best.case.utilization


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ([], [(0, True), (1, False), (2, False), (3, False)]),
        (["rollout.offload=true"], [(0, True), (1, True), (2, True), (3, True)]),
        (["rollout.offload=false"], [(0, False), (1, False), (2, False), (3, False)]),
        (["rollout.transport=ipc"], [(0, True)]),
        (["rollout.transport=broadcast"], [(0, True), (1, False), (2, False), (3, False)]),
    ],
)
def test_the_search_keeps_stated_settings_in_every_split_of_nodes(
    stated: list[str], expected: list[tuple[int, bool]]
) -> None:
    case = case_of(shared_run("chord_qwen7b", *stated), h100(4))
    assert [(one.cluster.rollout_nodes, one.offload) for one in _splits(case)] == expected


def test_the_search_keeps_to_the_main_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("chord_qwen7b", "--search", "--host-memory", "100") == 1
    assert "no layout fits the main memory of a node" in capsys.readouterr().err


def test_the_search_tries_unequal_stages(tmp_path: Path) -> None:
    """27 layers fit 2, 4 and 8 stages only with a list. The printed block gives the same layout again."""
    overrides = (f"model.path={CONFIGS / 'deepseek-v2-lite'}", *shared("chord_qwen3_30b_a3b"))
    run = shared_run("chord_qwen3_30b_a3b", *overrides)
    case = case_of(run, h100(4, rollout_nodes=2))
    found = search(case, choice_of(run))
    stages = {one.choice.parallel.pipeline: one.choice.parallel.stages for one in found.fitting}
    assert {2, 4, 8} <= stages.keys()
    for one in found.fitting:
        parallel = one.choice.parallel
        check_shape(case.shape, parallel)
        assert (parallel.stages is not None) == (parallel.pipeline > 1)
    unequal = next(one for one in found.fitting if one.choice.parallel.stages)
    base = f"base: {EXAMPLES / 'chord_qwen3_30b_a3b.yaml'}\n"
    (tmp_path / "run.yaml").write_text(base + best_block(unequal))
    assert choice_of(load_config(tmp_path / "run.yaml", overrides)) == unequal.choice


def test_the_fullest_stage_sets_the_pace() -> None:
    run = shared_run("chord_llama70b")
    equal, slow, even = (
        estimate(
            case_of(run, h100(8)),
            dataclasses.replace(
                choice_of(run), parallel=dataclasses.replace(run.parallel, pipeline=4, stages=stages)
            ),
        )
        for stages in (None, (30, 20, 15, 15), (20, 20, 21, 19))
    )
    assert even.times.training < equal.times.training < slow.times.training
    assert [stage.stage for stage in slow.stages] == [0, 1, 2, 3]
    assert slow.worst.stage == 0
    # 30 layers of recomputed 6 N + attention instead of 20, and the head of 8 x 128256 x 8192 beside the last 20.
    layer = 4 / 3 * (6 * 855_638_016 + 6 * 8192 * case_of(run, h100(8)).work.length)
    ratio = 30 * layer / (20 * layer + 8 * 128256 * 8192)
    assert slow.times.training / equal.times.training == pytest.approx(ratio)
    assert layout(slow) == layout(equal).replace("PP4", "PP4*")


def test_nothing_fits_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    code = plan("chord_llama70b", "--nodes", "1", "--search")
    error = capsys.readouterr().err
    assert code == 1
    assert "no layout fits" in error
    assert "GB more than the 80 GB of an H100 SXM" in error


def plan(name: str, *arguments: str) -> int:
    model, _ = CLUSTER_RUNS[name]
    spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = [f"model.path={CONFIGS / model}", *shared(name)]
    return module.main([str(EXAMPLES / f"{name}.yaml"), *settings, *arguments])


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("chord_qwen7b") == 0
    assert "pipeline bubble" in capsys.readouterr().out
    assert plan("chord_qwen7b", "--gpu", "a100-40") == 1
    assert "does not fit: training needs" in capsys.readouterr().err
    assert plan("chord_qwen7b", "parallel.tensor=8") == 2
    assert "28 attention heads / tensor 8" in capsys.readouterr().err
    assert plan("chord_qwen7b", "batch.promts=3") == 2
    assert "did you mean batch.prompts?" in capsys.readouterr().err
    assert plan("chord_qwen7b", "model.path=/nowhere") == 2
    assert "/nowhere/config.json does not exist" in capsys.readouterr().err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("chord_qwen7b", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 7_615_616_512
    assert found["fits"] is True
    assert found["memory"]["weights"] == pytest.approx(7.6e9, rel=0.01)
    assert plan("chord_qwen7b", "--json", "--search") == 0
    searched = json.loads(capsys.readouterr().out)
    assert searched["block"].startswith("parallel:")
    assert searched["number_fitting"] > 10


def test_no_library_of_training_is_loaded() -> None:
    code = (
        "import sys, megatron_chord.plan.search, megatron_chord.plan.report;"
        "print(sorted({'vllm', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
