"""Makes vLLM's CPU build return routes. Runs in vLLM's processes only, and never with a GPU.

vLLM 0.32 returns routes with its Model Runner V2 alone. That runner needs Triton, and there is no Triton for CPUs. The
other parts do not depend on the runner: the hook in the routers, the store of routes, the scheduler's part and the HTTP
field. So the CPU's runner gets the calls that V2 makes (v1/worker/gpu/model_runner.py), and the check of the runner is
left out (config/vllm.py, _verify_aux_output_compatibility).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_chord.rollout.vllm_plugin import CPU_ROUTES_VERSION


def install() -> None:
    """Adapt the CPU's model runner. It changes nothing when called again.

    Raises:
        RuntimeError: another version of vLLM than ``CPU_ROUTES_VERSION``, or no CPU build.
    """
    import vllm
    from vllm.config.vllm import VllmConfig
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    runner: Any = CPUModelRunner
    if getattr(runner, "returns_routes", False):
        return
    if not current_platform.is_cpu() or not vllm.__version__.startswith(CPU_ROUTES_VERSION):
        raise RuntimeError(
            f"routes on a CPU need the CPU build of vLLM {CPU_ROUTES_VERSION}x, but this is vLLM {vllm.__version__} "
            f"for {current_platform.device_name}"
        )
    runner.returns_routes = True
    # It checks the runner, which is adapted, and that prefixes are cached. They are not with rollout.repeatable: the
    # buffer holds the routes of one whole request then, and only one is computed at a time.
    VllmConfig._verify_aux_output_compatibility = lambda self: None  # type: ignore[method-assign]
    initialize, execute, sample = runner.initialize_kv_cache, runner.execute_model, runner.sample_tokens

    def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = initialize(self, kv_cache_config, *args, **kwargs)
        self.route_connector, self.pending_routes = None, None
        if self.vllm_config.aux_output_config.enabled:
            from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

            self.route_connector = get_aux_output_connector(
                self.model, self.vllm_config, self.kv_cache_config
            )
        return result

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        connector = getattr(self, "route_connector", None)  # there is none while vLLM measures its memory
        if connector is None:
            return execute(self, scheduler_output, *args, **kwargs)
        connector.begin_step(scheduler_output.aux_output_connector_metadata)
        result = execute(self, scheduler_output, *args, **kwargs)
        self.pending_routes = None
        if scheduler_output.total_num_scheduled_tokens:
            self.pending_routes = connector.prepare_output(_batch(self, scheduler_output))
        return result

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample(self, *args, **kwargs)
        pending, self.pending_routes = getattr(self, "pending_routes", None), None
        if pending is None:
            return output
        if not hasattr(output, "get_output"):
            return _with_routes(output, pending)
        get = output.get_output  # the tokens are read later
        output.get_output = lambda: _with_routes(get(), pending)
        return output

    runner.initialize_kv_cache = initialize_kv_cache
    runner.execute_model = execute_model
    runner.sample_tokens = sample_tokens


def _batch(runner: Any, scheduler_output: Any) -> Any:
    """The fields of V2's InputBatch that the connector reads."""
    ids = list(runner.input_batch.req_ids)
    counts = [scheduler_output.num_scheduled_tokens[name] for name in ids]
    return SimpleNamespace(
        req_ids=ids,
        query_start_loc_np=np.cumsum([0, *counts]),
        num_computed_tokens_np=runner.input_batch.num_computed_tokens_cpu[: len(ids)].copy(),
    )


def _with_routes(output: Any, pending: Any) -> Any:
    places = output.req_id_to_index
    sampled = np.array([len(output.sampled_token_ids[places[name]]) for name in pending.request_ids])
    pending.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
    output.aux_output_connector_output = pending.process_output()
    return output
