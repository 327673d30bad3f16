"""Time of the coordinator (rank 0) in a large step: read replies, plan the updates, make the messages to all ranks.

    python benchmarks/coordinator.py [--rollouts 16384 --ranks 1024 --replica 8]

A step has ``--rollouts`` sequences of 300 prompt tokens and, on average, 900 response tokens (log-normal). Each of the
``--ranks`` ranks belongs to a data-parallel replica of ``--replica`` ranks (tensor x pipeline x context). The messages
are those of ``ParallelGroups.from_coordinator``: one for each data-parallel rank. The row "pickled for every rank" is
what ``torch.distributed.scatter_object_list`` does: the same batches once for each rank of a replica.

Replies are JSON as vLLM 0.32 sends it, of a prompt with 8 samples. They are read by ``rollout.replies``, with all of
its checks, and for comparison by Python's own parser, without any check. The last table (alone with ``--routes``) shows
what the routes of a mixture of experts add, in replies and as references to what servers keep.

All times are those of one thread, because the other ranks wait meanwhile. Everything is also measured with twice and
four times as many rollouts: the last column is the time over that of half as many; 2.0 is linear.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import pickle
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from shared import circumstances

from megatron_chord.data.packing import StepPlan, make_layout, plan_step
from megatron_chord.losses.aggregate import drop_zero_gradient_parts, with_scales
from megatron_chord.losses.terms import Term
from megatron_chord.records import Part, Rollout, TrainSample
from megatron_chord.rollout.replies import AcceptedVersions, GenerateRequest, rollouts_of
from megatron_chord.rollout.route_store import RouteStore
from megatron_chord.routes import RouteShape
from megatron_chord.runtime.parallel import message

TERMS = {"policy": Term(loss=lambda stats, tokens: None, pool="policy", zero_gradient_column="advantage")}  # pyright: ignore
PROMPT, RESPONSE, GROUP = 300, 900, 8
MAX_TOKENS = 16384
ATTENTION = 1.5e-5
QWEN3_30B = RouteShape(layers=48, experts=128, chosen=8)
ROUTED_GROUPS = 8
"""Number of groups with routes that are measured."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=16384)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--replica", type=int, default=8, help="ranks that train the same batches")
    parser.add_argument("--growth", type=int, default=3, help="sizes to measure, each twice the one before")
    parser.add_argument("--routes", action="store_true", help="only the table of routes")
    arguments = parser.parse_args()
    console = Console()
    console.print(circumstances())
    if arguments.routes:
        console.print(routes_through_rank_0(arguments))
        return 0
    table = Table(title=f"{arguments.ranks} ranks, replicas of {arguments.replica}")
    for heading in ("rollouts", "million tokens", "work of rank 0", "seconds", "MB", "over half as many"):
        table.add_column(heading, justify="left" if heading == "work of rank 0" else "right")
    before: dict[str, float] = {}
    for doubling in range(arguments.growth):
        rollouts = arguments.rollouts << doubling
        samples = random_samples(rollouts)
        tokens = sum(len(sample.token_ids) for sample in samples)
        found = measured(samples, arguments)
        for name, (seconds, size) in found.items():
            table.add_row(
                str(rollouts),
                f"{tokens / 1e6:.1f}",
                name,
                f"{seconds:.2f}",
                f"{size / 1e6:.0f}" if size else "",
                f"{seconds / before[name]:.2f}" if name in before else "",
            )
        before = {name: seconds for name, (seconds, _) in found.items()}
        table.add_section()
    console.print(table)
    console.print(receiving())
    console.print(routes_through_rank_0(arguments))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    console.print(f"peak memory of this process {peak:.1f} GB")
    return 0


def receiving() -> Table:
    rng = np.random.default_rng(0)
    request = request_for(None)
    content = reply(request, rng)
    table = Table(title=f"replies of {len(content) / (GROUP * RESPONSE):.0f} bytes a token")
    table.add_column("read by")
    table.add_column("million tokens/s of one core", justify="right")
    ways: dict[str, Callable[[], Any]] = {
        "rollout.replies": lambda: rollouts_of(content, request, AcceptedVersions(7), may_be_aborted=False),
        "json.loads alone": lambda: json.loads(content),
    }
    for name, read in ways.items():
        start, count = time.process_time(), 0
        while time.process_time() - start < 3:
            read()
            count += 1
        speed = count * GROUP * RESPONSE / (time.process_time() - start)
        table.add_row(name, f"{speed / 1e6:.2f}")
    return table


def routes_through_rank_0(arguments: argparse.Namespace) -> Table:
    """What the routes of a mixture of experts add to rank 0's work, for a step of Qwen3-30B-A3B.

    A recorded reply of one group is read again and again, and a step's messages are made for its samples, once with
    routes in the replies, and once with references to routes that the servers keep.
    """
    table = Table(
        title=f"routes of Qwen3-30B-A3B, {arguments.rollouts} rollouts of {PROMPT + RESPONSE} tokens (a sample of "
        f"{ROUTED_GROUPS * GROUP} rollouts, scaled)"
    )
    for heading in (
        "replies bring",
        "GB of replies",
        "CPU s to read",
        "GB of messages to ranks",
        "CPU s to pack and send",
    ):
        table.add_column(heading, justify="left" if heading == "replies bring" else "right")
    for name, keeps in (("no routes", None), ("routes", False), ("references", True)):
        rng = np.random.default_rng(0)
        request = request_for(None if keeps is None else QWEN3_30B)
        content = reply(request, rng, keeps=keeps)
        start = time.process_time()
        groups = [
            rollouts_of(
                content, request, AcceptedVersions(7), may_be_aborted=False, url="http://10.0.0.1:8000"
            )
            for _ in range(ROUTED_GROUPS)
        ]
        reading = time.process_time() - start
        rollouts = [rollout for group in groups for rollout in group]
        samples = [
            replace(sample, routes=rollout.routes)
            for sample, rollout in zip(samples_of(rollouts), rollouts, strict=True)
        ]
        layout = make_layout(
            data=ROUTED_GROUPS,
            tensor=1,
            pipeline=1,
            context=1,
            sequence_parallel=False,
            virtual=False,
            attention_cost=ATTENTION,
        )
        start = time.process_time()
        plan = plan_step(with_scales(samples, TERMS), max_tokens=MAX_TOKENS, layout=layout, pad_id=0)
        size = sum(len(message(batches)) for batches in plan.micro_batches)
        packing = time.process_time() - start
        scale = arguments.rollouts / len(rollouts)
        table.add_row(
            name,
            f"{ROUTED_GROUPS * len(content) * scale / 1e9:.2f}",
            f"{reading * scale:.1f}",
            f"{size * scale / 1e9:.3f}",
            f"{packing * scale:.1f}",
        )
    return table


def request_for(routes: RouteShape | None) -> GenerateRequest:
    """A request for the answers of one group, with routes of this shape or without any."""
    return GenerateRequest(
        prompt_ids=tuple(range(5, 5 + PROMPT)),
        num_rollouts=GROUP,
        seed=0,
        temperature=1.0,
        max_tokens=RESPONSE,
        stop_token_ids=(2,),
        routes=routes,
    )


def samples_of(rollouts: Sequence[Rollout]) -> list[TrainSample]:
    return [
        TrainSample(
            token_ids=np.array([*range(5, 5 + PROMPT), *rollout.token_ids]),
            parts=(
                Part(
                    term="policy",
                    positions=np.arange(PROMPT, PROMPT + len(rollout.token_ids)),
                    constants={
                        "rollout_logprob": np.array(rollout.logprobs, np.float32),
                        "advantage": 1.0,
                    },
                ),
            ),
        )
        for rollout in rollouts
    ]


def random_routes(rng: np.random.Generator, length: int) -> np.ndarray:
    """Distinct experts of each token in each layer of ``QWEN3_30B``: a random one and those after it."""
    first = rng.integers(0, QWEN3_30B.experts, (length, QWEN3_30B.layers, 1))
    return ((first + np.arange(QWEN3_30B.chosen)) % QWEN3_30B.experts).astype(np.uint8)


def reply(request: GenerateRequest, rng: np.random.Generator, *, keeps: bool | None = None) -> bytes:
    """A reply as JSON with the fields that vLLM 0.32 sends, with random tokens and log-probs.

    ``keeps``: whether the server keeps the routes (``rollout.route_store``), or sends them; None: there are none.
    """
    store = RouteStore(1 << 40)

    def experts() -> str | None:
        if keeps is None:
            return None
        routes = random_routes(rng, PROMPT + request.max_tokens - 1)
        if keeps:
            reference = store.keep(routes, 0)
            assert reference is not None
            return base64.b64encode(reference).decode()
        file = io.BytesIO()
        np.save(file, routes)
        return base64.b64encode(file.getvalue()).decode()

    def choice(index: int) -> dict[str, Any]:
        token_ids = rng.integers(10, 150_000, request.max_tokens).tolist()
        values = (-rng.exponential(0.5, request.max_tokens)).tolist()
        entries = [
            {"token_id": token, "logprob": value, "rank": 1}
            for token, value in zip(token_ids, values, strict=True)
        ]
        return {
            "index": index,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": token_ids,
            "routed_experts": experts(),
            "sampling_mask": None,
            "weight_versions": [{"version": "7", "start": 0, "end": len(token_ids)}],
            "logprobs": {"content": [entry | {"top_logprobs": [entry]} for entry in entries]},
        }

    body = {
        "request_id": "generate-tokens-0",
        "model": "policy",
        "prompt_token_ids": list(request.prompt_ids),
        "choices": [choice(index) for index in range(request.num_rollouts)],
    }
    return json.dumps(body, separators=(",", ":")).encode()


def random_samples(rollouts: int) -> list[TrainSample]:
    """Random sequences with the constants of CHORD's policy term. Every eighth group has equal rewards."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(RESPONSE) - 0.18, 0.6, rollouts), 8, 8 * RESPONSE).astype(int)
    advantages = rng.standard_normal(rollouts)
    return [
        TrainSample(
            token_ids=rng.integers(0, 150_000, PROMPT + length),
            parts=(
                Part(
                    term="policy",
                    positions=np.arange(PROMPT, PROMPT + length),
                    constants={
                        "rollout_logprob": rng.standard_normal(length).astype(np.float32),
                        "advantage": float(advantage) if index // GROUP % 8 else 0.0,
                    },
                ),
            ),
        )
        for index, (length, advantage) in enumerate(zip(lengths.tolist(), advantages, strict=True))
    ]


def measured(samples: list[TrainSample], arguments: argparse.Namespace) -> dict[str, tuple[float, int]]:
    """Return seconds and bytes of each kind of work."""
    layout = make_layout(
        data=arguments.ranks // arguments.replica,
        tensor=arguments.replica,
        pipeline=1,
        context=1,
        sequence_parallel=True,
        virtual=False,
        attention_cost=ATTENTION,
    )
    found: dict[str, tuple[float, int]] = {}

    def timed(name: str, work: Callable[[], Any], size: Callable[[Any], int] = lambda result: 0) -> Any:
        start = time.perf_counter()
        result = work()
        found[name] = time.perf_counter() - start, size(result)
        return result

    scaled = timed("scales", lambda: with_scales(samples, TERMS))
    trained = timed("leave out equal groups", lambda: drop_zero_gradient_parts(scaled, TERMS))
    plan: StepPlan = timed(
        "plan and pack", lambda: plan_step(trained, max_tokens=MAX_TOKENS, layout=layout, pad_id=0)
    )
    messages = timed(
        "messages, one a replica",
        lambda: [message(batches) for batches in plan.micro_batches],
        lambda result: sum(map(len, result)),
    )
    del messages
    found["sum"] = sum(seconds for seconds, _ in found.values()), 0

    def for_every_rank() -> int:
        size = 0
        for batches in plan.micro_batches:
            for _ in range(arguments.replica):
                size += len(pickle.dumps(batches))
        return size

    timed("pickled for every rank instead", for_every_rank, lambda result: result)
    return found


if __name__ == "__main__":
    sys.exit(main())
