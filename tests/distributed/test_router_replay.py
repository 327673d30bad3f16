"""Routers that replay given experts compute the gradients of Transformers with the same experts, in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_chord.config import ParallelConfig
from megatron_chord.config_methods import SimpleWeight
from megatron_chord.data.packing import plan_step
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.model.forward import unwrapped
from megatron_chord.model.replay import RouterReplay, replays_of
from megatron_chord.records import TrainSample
from megatron_chord.train.routing import take_routing
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.update import Update, compute_gradients, prepare_batches
from tests.distributed import steps
from tests.distributed.splits import assert_split_invariant
from tests.support.oracle_terms import policy_term, sft_term
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, save_model, terms_of, tiny_run

TP2_SP = {"tensor": 2, "sequence_parallel": True}
PP2_VPP2 = {"pipeline": 2, "virtual_pipeline": 2}
CASES: dict[str, tuple[str, Literal["none", "mlp", "full"], dict[str, dict[str, Any]]]] = {
    "qwen3_moe": ("qwen3_moe", "full", {"cp2_ep2": {"context": 2, "expert": 2}, "pp2_vpp2": PP2_VPP2}),
    "qwen3_moe kept": ("qwen3_moe", "none", {"dp2": {}}),
    "deepseek_v3": ("deepseek_v3", "mlp", {"tp2_sp_ep2": TP2_SP | {"expert": 2}, "pp2": {"pipeline": 2}}),
}
"""Family, what is computed again in the backward pass, and layouts of two ranks, by the name of the case."""
SIZES = {"qwen3_moe": (4, 2, 0), "deepseek_v3": (12, 4, 1)}
"""Number of experts, experts of each token and dense layers at the beginning of the tiny models, by family."""
LAYERS = 4


def random_routes(family: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """Routes as vLLM returns them: distinct experts in any order, and zeros in dense layers."""
    experts, k, dense = SIZES[family]
    everything = np.tile(np.arange(experts, dtype=np.uint8), (length, LAYERS, 1))
    routes = rng.permuted(everything, axis=-1)[..., :k]
    routes[:, :dense] = 0
    return routes


def routed(samples: list[TrainSample], family: str) -> list[TrainSample]:
    """The rollouts with random routes: of all tokens but the last, or of fewer. Demonstrations have none."""
    rng = np.random.default_rng(7)
    return [
        replace(
            sample,
            routes=random_routes(family, len(sample.token_ids) - 1 - (number % 3 == 2), rng)
            if sample.parts[0].term == "policy"
            else None,
        )
        for number, sample in enumerate(samples)
    ]


@pytest.mark.parametrize("name", CASES)
def test_forced_experts_give_transformers_gradients(name: str, tmp_path: Path) -> None:
    family, recompute, layouts = CASES[name]
    folder = save_model(family, tmp_path, layers=LAYERS)
    run = tiny_run(folder)
    run = replace(run, model=replace(run.model, recompute=recompute))
    terms = {"policy": policy_term(run.objective), "sft": sft_term(SimpleWeight(kind="phi"))}
    samples = routed(make_samples(), family)
    objective = (run, samples, {"policy": 0.7, "sft": 0.3}, terms)
    assert_split_invariant(folder, {"routed": objective}, layouts={2: layouts})


def replay_own(folder: Path, recompute: Literal["none", "full"]) -> dict[str, Any]:
    """One update without routes, and one that replays the experts that the first has chosen."""
    run = tiny_run(folder, ratio_from="recomputed")
    parallel = ParallelConfig(distributed_optimizer=False)
    state = steps.build(folder, parallel, recompute=recompute)
    terms = terms_of(run)
    (chunk,) = map(unwrapped, state.chunks)
    chosen: list[np.ndarray] = []

    def note(router: Any, inputs: Any, output: Any) -> None:
        found = output[1].nonzero()[:, 1].view(len(output[1]), -1)
        chosen.append(found.numpy().astype(np.uint8))

    def update(samples: list[TrainSample]) -> Any:
        layout = packing_layout(state.shape, parallel, 1)
        plan = plan_step(with_scales(samples, terms), max_tokens=10_000, layout=layout, pad_id=0)
        batches = prepare_batches(state, plan.micro_batches[0], terms, temperature=1.0)
        what = Update(weights={"policy": 1.0}, counts=plan.counts)
        loss = compute_gradients(state, batches, what, terms, temperature=1.0).result.loss
        weights: dict[str, Any] = dict(state.parameters())
        grads = {name: weight.main_grad.clone() for name, weight in weights.items()}
        return loss, grads, take_routing(state)

    samples = make_samples(num_policy=1, num_sft=0)
    hooks = [layer.mlp.router.register_forward_hook(note) for layer in chunk.decoder.layers]
    own = update(samples)
    for hook in hooks:
        hook.remove()
    routes = np.stack(chosen[:LAYERS], axis=1)
    replayed = update([replace(samples[0], routes=routes)])
    reversed_ = update([replace(samples[0], routes=routes[:, :, ::-1])])
    wrong = update([replace(samples[0], routes=(routes + 1) % 4)])
    refused = ""
    try:
        update([replace(samples[0], routes=routes[:, :, :1])])
    except RuntimeError as error:
        refused = str(error)
    return {
        "own": own,
        "replayed": replayed,
        "reversed": reversed_,
        "wrong": wrong,
        "refused": refused,
        "waiting": [len(replay._waiting) for replay in replays_of(chunk)],
    }


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_replayed_own_choice_changes_no_bit(recompute: Literal["none", "full"], tmp_path: Path) -> None:
    """The old log-probs are computed in a pass of their own, with the routes too: the ratio is 1, and nothing is kept
    of that pass. Another choice changes the gradient, so the test can fail."""
    folder = save_model("qwen3_moe", tmp_path, layers=LAYERS)
    (found,) = run_ranks(replay_own, 1, folder, recompute)
    (loss, grads, counted), (loss_again, again, counted_again) = found["own"], found["replayed"]
    assert loss_again == loss
    assert all(torch.equal(again[name], grad) for name, grad in grads.items())
    assert any(not torch.equal(found["wrong"][1][name], grad) for name, grad in grads.items())
    assert "otherwise" not in counted["routing"]
    assert counted_again["routing"] == counted["routing"] | {"replayed": 1.0, "otherwise": 0.0}
    wrong = found["wrong"][2]["routing_by_layer"]["otherwise"]
    assert wrong["0"] == 1.0, "later layers have other inputs then, and may agree by chance"
    assert found["reversed"][0] == pytest.approx(loss, rel=1e-6)
    assert "layer 0 got routes of shape" in found["refused"]
    assert found["waiting"] == [0] * LAYERS


def test_a_router_that_mixes_micro_batches_up_is_refused() -> None:
    """Three forward passes, of which only one is computed again."""
    replay = RouterReplay(2)
    replay.begin(has_backward=True)
    for _ in range(3):
        replay.give(None)
    weight = torch.ones(1, requires_grad=True)
    again: Any = checkpoint(lambda x: _route(replay, x), weight, use_reentrant=False)
    again.sum().backward()
    with pytest.raises(RuntimeError, match="layer 2 was computed again for 1 of 3 micro-batches"):
        replay.check()
    replay.begin(has_backward=False)
    replay.give(None)
    replay.check()


def _route(replay: RouterReplay, x: torch.Tensor) -> torch.Tensor:
    scores = x * torch.arange(4.0)[None]
    own, _ = replay.get_replay_topk(
        scores, 2, default_compute_topk=lambda scores, k, num_groups, group_topk: scores.topk(k)
    )
    return own * own
