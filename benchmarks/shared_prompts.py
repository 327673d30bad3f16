"""Compare an update in which answers share the pass of their prompt with one in which each has its own prompt.

    python benchmarks/shared_prompts.py [--prompt 350 --answer 70 --prompts 2 --rollouts 8] [--dtype fp32]

Both make the gradients of L_GRPO for the same samples and the same random model of Llama's shape (by default that of
SmolLM2-135M with fewer layers), in one process and in turn. Seconds are CPU time of all threads, the median over the
rounds. The largest difference of the gradients is printed beside the largest gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import circumstances, save_model

from megatron_chord.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    sources_of,
)
from megatron_chord.data.packing import plan_step
from megatron_chord.families.table import read_shape
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.methods.table import build
from megatron_chord.records import Part, TrainSample
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.setup import can_share_prompts, packing_layout
from megatron_chord.train.state import build_state
from megatron_chord.train.update import Update, compute_gradients, prepare_batches

VOCAB = 49152


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=350, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=70, help="tokens of each answer")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rollouts", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": args.layers,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        }
        save_model(Path(folder), config, args.dtype)
        compare(args, Path(folder))
    print(circumstances("transformers"))
    return 0


def compare(args: argparse.Namespace, model: Path) -> None:
    run = RunConfig(
        output=Path("unused"),
        steps=100,
        model=ModelConfig(path=model, dtype=args.dtype),
        data=DataConfig(prompts=sources_of(Path("unused")), demonstrations=None),
        batch=BatchConfig(prompts=args.prompts, rollouts=args.rollouts, demonstrations=0),
        parallel=ParallelConfig(distributed_optimizer=False),
        optim=OptimConfig(lr=1e-5),
    )
    groups = runtime.start(run.parallel, seed=0)
    state = build_state(read_shape(model), run.model, run.parallel, run.optim, groups=groups, steps=100)
    assert can_share_prompts(state.shape, run.parallel)
    terms = {
        name: term
        for name, term in build(run.method).terms(run.resolved_objective(), run.batch).items()
        if name == "policy"
    }
    samples = with_scales(make_samples(args), terms)
    layout = packing_layout(state.shape, run.parallel, groups.data.size)
    plans = {
        "own prompts": plan_step(samples, max_tokens=args.max_tokens, layout=layout, pad_id=0),
        "shared prompts": plan_step(
            samples,
            max_tokens=args.max_tokens,
            layout=dataclasses.replace(layout, shares_prompts=True),
            pad_id=0,
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    gradients: dict[str, dict[str, Any]] = {}
    for _ in range(args.rounds + 1):
        for name, plan in plans.items():
            begun = time.process_time()
            batches = prepare_batches(state, plan.micro_batches[0], terms, temperature=1.0)
            update = Update(weights={"policy": 1.0}, counts=plan.counts)
            compute_gradients(state, batches, update, terms, temperature=1.0)
            seconds[name].append(time.process_time() - begun)
            gradients[name] = {key: _gradient(p).clone() for key, p in state.parameters().items()}
    runtime.stop()
    print(
        f"{args.prompts} prompts of {args.prompt} tokens, {args.rollouts} answers of {args.answer} tokens to each"
    )
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    tokens = {
        name: sum(len(batch.token_ids) for batch in plan.micro_batches[0]) for name, plan in plans.items()
    }
    for name in plans:
        print(f"{name:<15} {tokens[name]:>6} tokens {medians[name]:>7.2f} s of CPU")
    own, shared = plans
    print(
        f"ratio           {tokens[own] / tokens[shared]:>6.2f}        {medians[own] / medians[shared]:>7.2f}"
    )
    largest = max(grad.abs().max().item() for grad in gradients[own].values())
    difference = max(
        (gradients[own][key] - gradients[shared][key]).abs().max().item() for key in gradients[own]
    )
    print(f"largest difference of a gradient {difference:.1e}, largest gradient {largest:.1e}", flush=True)


def _gradient(parameter: Any) -> Any:
    return parameter.main_grad


def make_samples(args: argparse.Namespace) -> list[TrainSample]:
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(args.prompts):
        prompt = rng.integers(3, VOCAB, args.prompt)
        for number in range(args.rollouts):
            constants = {
                "advantage": 1.0 if number % 2 else -1.0,
                "rollout_logprob": np.full(args.answer, -10.8, np.float32),
            }
            positions = np.arange(args.prompt, args.prompt + args.answer)
            ids = np.concatenate([prompt, rng.integers(3, VOCAB, args.answer)])
            part = Part(term="policy", positions=positions, constants=constants)
            samples.append(TrainSample(token_ids=ids, parts=(part,)))
    return samples


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
