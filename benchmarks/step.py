"""Compare a whole CHORD step with the same step in plain Transformers and AdamW: time and peak memory.

    python benchmarks/step.py [--hidden 256 --layers 4 --vocab 32768 --rollouts 48 --demonstrations 16]
    python benchmarks/step.py --shape 7b --layers 4 --dtype bf16     # on a GPU
    python benchmarks/step.py --grpo          # mu = 0, rollouts alone: also beside TRL's GRPOTrainer, if installed

Each makes one optimizer update of L = 0.8 L_GRPO + 0.2 L_SFT-phi in one process, in FP32, with all passes, clipping
and AdamW. The random Qwen2-shaped model and the samples are the same for all. Lengths are like GSM8K's, or long-tailed
with ``--tails``. Ours packs all samples and projects only trained tokens, in chunks. The others pad micro-batches with
the same token budget: once with the samples as drawn, once sorted by length, which is the best that padding can do.

* **its matrix products alone** is the bound: the layers' and the head's products of as many tokens, forward and
  backward, without attention, norms, softmax, clipping and AdamW.
* **plain** makes whole logits, as in a first implementation.
* **TRL** has no SFT term, so it is compared at mu = 0. Its loss is ``GRPOTrainer.compute_loss`` of a prepared
  batch (``loss_type="dapo"``: a mean over the update's tokens, as ours) with the rollouts' log-probs as the old ones;
  optimizer and clipping are the plain step's. Its head is chunked. On a CPU it projects all tokens; **completions
  alone** is what it does on a GPU, switched on here. Its trainer pads to the longest of all samples; here each
  micro-batch is padded to its own.

Each runs in a process of its own, in turn for ``--rounds`` rounds. The first update warms up, and the median of the
next ones counts, in the fastest round. Seconds are CPU time of all threads (elapsed time on a GPU). Extra peak memory
is what updates needed beyond model, gradients and optimizer. TFLOP/s, and MFU on a known GPU, are the model's own
products (``costs/flops.py``) divided by elapsed time. The losses of all are printed. They must be equal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from samples import make_samples
from shapes import SHAPES, model_config
from shared import circumstances, qwen2_config, reset_high_water_mark, resident, save_model
from torch import Tensor

from megatron_chord.families.table import read_shape
from megatron_chord.records import TrainSample
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.throughput import own_gpu, throughput

GB = 1e9
MU, LR, CLIP = 0.2, 1e-5, 0.2
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""The allowed relative difference of losses, which are sums of rounded log-probs."""
KINDS = {
    "ours": "megatron_chord",
    "products": "its matrix products alone",
    "drawn": "plain, as drawn",
    "sorted": "plain, sorted by length",
    "trl": "TRL, sorted by length",
    "trl-completions": "TRL, sorted, completions alone",
}


def main() -> int:
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return 0
    with_trl = arguments.grpo and importlib.util.find_spec("trl") is not None
    kinds = [kind for kind in KINDS if with_trl or not kind.startswith("trl")]
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), config_of(arguments), arguments.dtype)
        rounds = [{kind: in_child(kind, name) for kind in kinds} for _ in range(arguments.rounds)]
    results = {kind: min((found[kind] for found in rounds), key=lambda row: row["seconds"]) for kind in kinds}
    report(arguments, results, with_trl)
    losses = [result["loss"] for kind, result in results.items() if kind != "products"]
    agree = max(losses) - min(losses) < TOLERANCE[arguments.dtype] * max(1.0, abs(losses[0]))
    print(
        f"{'PASS' if agree else 'FAIL'}: the {len(losses)} losses agree: "
        f"{', '.join(f'{loss:.7f}' for loss in losses)}"
    )
    if arguments.grpo and not with_trl:
        print("TRL is not installed, so its rows are missing: pip install trl==1.16.0")
    return 0 if agree else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A CHORD step beside plain Transformers and AdamW.")
    parser.add_argument(
        "--shape", choices=SHAPES, help="sizes of a real model, in place of --hidden and --vocab"
    )
    parser.add_argument("--hidden", type=int, help="hidden size (default: 256)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, help="size of the vocabulary (default: 32768)")
    parser.add_argument("--rollouts", type=int, default=48)
    parser.add_argument("--demonstrations", type=int, default=16)
    parser.add_argument("--group", type=int, default=1, help="rollouts that share a prompt")
    parser.add_argument("--grpo", action="store_true", help="mu = 0: rollouts alone")
    parser.add_argument(
        "--max-tokens", type=int, default=4096, help="maximum number of tokens of a micro-batch"
    )
    parser.add_argument("--tails", action="store_true", help="long-tailed lengths: mean 500, cut at 2000")
    parser.add_argument("--updates", type=int, default=3, help="number of updates after one to warm up")
    parser.add_argument("--rounds", type=int, default=1, help="number of rounds; the fastest one counts")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="number format of the weights, also on disk"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--tensor", type=int, default=1, help=argparse.SUPPRESS)  # growth.py uses it
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shape and (arguments.hidden or arguments.vocab):
        parser.error(f"--shape {arguments.shape} sets --hidden and --vocab: leave them out")
    config = model_config(arguments.shape) if arguments.shape else {}
    arguments.hidden = config.get("hidden_size", arguments.hidden or 256)
    arguments.vocab = config.get("vocab_size", arguments.vocab or 32_768)
    if arguments.grpo:
        arguments.demonstrations = 0
    return arguments


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the model's config.json."""
    if arguments.shape:
        return model_config(arguments.shape, layers=arguments.layers)
    return qwen2_config(hidden=arguments.hidden, layers=arguments.layers, vocab=arguments.vocab)


def in_child(kind: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", kind, "--model", folder]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"{KINDS[kind]} failed (exit {child.returncode}); out of memory?")
    return json.loads(child.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    samples = make_samples(
        rollouts=arguments.rollouts,
        demonstrations=arguments.demonstrations,
        group=arguments.group,
        vocab=arguments.vocab,
        tails=arguments.tails,
    )
    has_cuda = torch.cuda.is_available()
    clock = time.perf_counter if has_cuda else time.process_time
    build = {"ours": ours, "products": products, "drawn": plain, "sorted": plain}.get(arguments.child, trl)
    update, tokens = build(arguments, samples)
    seconds: list[float] = []
    elapsed: list[float] = []
    loss, before = update(), resident("VmRSS")  # the first update also makes Adam's moments
    if has_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_high_water_mark()
    for _ in range(arguments.updates):
        start, begun = clock(), time.perf_counter()
        update()
        if has_cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
        elapsed.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if has_cuda else resident("VmHWM")
    runtime.stop()  # otherwise gloo's threads can abort the process when it ends
    lengths = [len(sample.token_ids) for sample in samples]
    rate = throughput(
        read_shape(arguments.model),
        tokens=sum(lengths),
        squared_tokens=sum(length**2 for length in lengths),
        passes=1.0,
        seconds=statistics.median(elapsed),
        ranks=1,
        gpu=own_gpu(),
    )
    return {
        "seconds": statistics.median(seconds),
        "elapsed": statistics.median(elapsed),
        "extra": peak - before,
        "peak": peak,
        "loss": loss,
        "tokens": sum(lengths),
        "passed": tokens,
        **rate,
    }


def ours(arguments: argparse.Namespace, samples: list[TrainSample]) -> tuple[Any, int]:
    from megatron_chord.config import (
        BatchConfig,
        DataConfig,
        ModelConfig,
        ObjectiveConfig,
        OptimConfig,
        ParallelConfig,
        RunConfig,
        sources_of,
    )
    from megatron_chord.data.packing import plan_step
    from megatron_chord.losses.aggregate import with_scales
    from megatron_chord.methods.table import build
    from megatron_chord.train.setup import packing_layout
    from megatron_chord.train.state import build_state
    from megatron_chord.train.update import Update, apply_gradients, compute_gradients, prepare_batches

    run = RunConfig(
        output=Path("unused"),
        steps=100,
        model=ModelConfig(path=arguments.model, dtype=arguments.dtype),
        data=DataConfig(
            prompts=sources_of(Path("unused")),
            demonstrations=sources_of(Path("unused")),
            max_response_tokens=2000,
        ),
        batch=BatchConfig(prompts=8, rollouts=6, demonstrations=16, max_tokens_per_gpu=arguments.max_tokens),
        parallel=ParallelConfig(tensor=arguments.tensor),
        objective=ObjectiveConfig(clip_low=CLIP, clip_high=CLIP),
        optim=OptimConfig(lr=LR),
    )
    groups = runtime.start(run.parallel, seed=0)
    state = build_state(
        read_shape(arguments.model), run.model, run.parallel, run.optim, groups=groups, steps=100
    )
    terms = build(run.method).terms(run.resolved_objective(), run.batch)
    plan = plan_step(
        with_scales(samples, terms),
        max_tokens=arguments.max_tokens,
        layout=packing_layout(state.shape, run.parallel, groups.data.size),
        pad_id=0,
    )
    mine = plan.micro_batches[groups.data.rank]
    mu = 0.0 if arguments.grpo else MU
    weights = {"policy": 1 - mu, "sft": mu}

    def update() -> float:
        batches = prepare_batches(state, mine, terms, temperature=1.0)
        measured = compute_gradients(
            state, batches, Update(weights=weights, counts=plan.counts), terms, temperature=1.0
        )
        apply_gradients(state)
        return measured.result.loss

    return update, sum(len(batch.token_ids) for rank in plan.micro_batches for batch in rank)


def products(arguments: argparse.Namespace, samples: list[TrainSample]) -> tuple[Any, int]:
    """Compute only the products that packed micro-batches need. Those of the head are in chunks of 1024 tokens."""
    from transformers import AutoConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    config: Any = AutoConfig.from_pretrained(arguments.model)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    tokens = sum(len(sample.token_ids) for sample in samples)
    trained = sum(map(response_length, samples))
    count = -(-tokens // arguments.max_tokens)
    layer = [(hidden + 2 * keys, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    weights = [torch.randn(shape, device=device, dtype=dtype) for shape in layer * config.num_hidden_layers]
    head = torch.randn((config.vocab_size, hidden), device=device, dtype=dtype)
    gradients = [torch.zeros_like(weight) for weight in [*weights, head]]
    inputs = {
        width: torch.randn(tokens // count, width, device=device, dtype=dtype) for width in (hidden, inner)
    }

    def update() -> None:
        for _ in range(count):
            for weight, gradient in zip(weights, gradients, strict=False):
                given = inputs[weight.shape[1]]
                output = given @ weight.t()
                _ = output @ weight
                gradient.addmm_(output.t(), given)
            for piece in inputs[hidden][: trained // count].split(1024):
                _ = piece @ head.t()
                logits = piece @ head.t()
                _ = logits @ head
                gradients[-1].addmm_(logits.t(), piece)

    return update, tokens


def plain(arguments: argparse.Namespace, samples: list[TrainSample]) -> tuple[Any, int]:
    """The first implementation that one would write: padded micro-batches, whole logits, torch's AdamW."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    if arguments.child == "sorted":
        samples = sorted(samples, key=lambda sample: len(sample.token_ids))
    micro_batches = padded(samples, arguments.max_tokens, device)
    counts = {
        name: sum(int((batch["term"] == code).sum()) for batch in micro_batches)
        for name, code in (("policy", 1), ("sft", 2))
    }
    mu = 0.0 if arguments.grpo else MU

    def update() -> float:
        total = 0.0
        for batch in micro_batches:
            logits = model(batch["ids"], attention_mask=batch["mask"], use_cache=False).logits[:, :-1].float()
            logp = torch.log_softmax(logits, -1).gather(-1, batch["ids"][:, 1:, None])[..., 0]
            ratio = (logp - batch["old"]).exp()
            advantage = batch["advantage"]
            policy = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            p = logp.detach().exp()
            demonstration = -(p * (1 - p)) * logp
            loss = (1 - mu) * (policy * (batch["term"] == 1)).sum() / counts["policy"]
            if mu > 0:
                loss = loss + mu * (demonstration * (batch["term"] == 2)).sum() / counts["sft"]
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return update, sum(batch["ids"].numel() for batch in micro_batches)


def trl(arguments: argparse.Namespace, samples: list[TrainSample]) -> tuple[Any, int]:
    """TRL's GRPO loss of prepared batches with its gradients, then clipping and torch's AdamW."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils

    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if has_cuda else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    # Nothing is sampled or graded. The tokenizer, the reward and the data only have to exist.
    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1, "a": 2}, unk_token="a"))
    trainer: Any = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=GRPOConfig(
            output_dir=str(arguments.model / "trl"),
            use_cpu=not has_cuda,
            bf16=False,  # the weights themselves are, where asked for
            gradient_checkpointing=False,
            report_to=[],
            per_device_train_batch_size=2,
            num_generations=2,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            loss_type="dapo",
            beta=0.0,
            epsilon=CLIP,
            temperature=1.0,
            max_completion_length=2000,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "a"]}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<end>"
        ),
    )
    model = trainer.model.to(device).train()
    trainer.current_gradient_accumulation_steps = (
        1  # Trainer.train sets this; num_items_in_batch is that of the whole update
    )
    if arguments.child == "trl-completions":
        utils._use_triton = lambda _: True  # of its head: which tokens, not how
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    micro_batches = trl_batches(samples, arguments.max_tokens, device)

    def update() -> float:
        total = 0.0
        for batch in micro_batches:
            loss = trainer.compute_loss(model, batch)
            trainer.accelerator.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return update, sum(
        batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in micro_batches
    )


def trl_batches(samples: list[TrainSample], budget: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Batches like GRPOTrainer's own: prompts are padded on the left, responses on the right."""

    def width(group: list[TrainSample]) -> int:
        return max(map(prompt_length, group)) + max(map(response_length, group))

    count = sum(map(response_length, samples))
    batches = []
    for group in in_micro_batches(sorted(samples, key=lambda sample: len(sample.token_ids)), budget, width):
        widest, longest = max(map(prompt_length, group)), max(map(response_length, group))
        prompts, responses = (
            np.zeros((len(group), widest), np.int64),
            np.zeros((len(group), longest), np.int64),
        )
        prompt_mask, response_mask = np.zeros_like(prompts), np.zeros_like(responses)
        old = np.zeros(responses.shape, np.float32)
        for row, sample in enumerate(group):
            constants, start, end = sample.parts[0].constants, prompt_length(sample), response_length(sample)
            prompts[row, widest - start :], prompt_mask[row, widest - start :] = sample.token_ids[:start], 1
            responses[row, :end], response_mask[row, :end] = sample.token_ids[start:], 1
            old[row, :end] = constants["rollout_logprob"]
        advantages = [sample.parts[0].constants["advantage"] for sample in group]
        arrays = {
            "prompt_ids": prompts,
            "prompt_mask": prompt_mask,
            "completion_ids": responses,
            "completion_mask": response_mask,
            "old_per_token_logps": old,
            "advantages": np.array(advantages, np.float32),
            "num_items_in_batch": np.array(count),
        }
        batches.append({name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
    return batches


def prompt_length(sample: TrainSample) -> int:
    return int(sample.parts[0].positions[0])


def response_length(sample: TrainSample) -> int:
    return len(sample.parts[0].positions)


def in_micro_batches(
    samples: list[TrainSample], budget: int, width: Callable[[list[TrainSample]], int]
) -> list[list[TrainSample]]:
    """Put samples in order into micro-batches. Each has as many as fit into the budget when they are padded."""
    groups: list[list[TrainSample]] = [[]]
    for sample in samples:
        group = [*groups[-1], sample]
        if groups[-1] and len(group) * width(group) > budget:
            groups.append([sample])
        else:
            groups[-1] = group
    return groups


def padded(samples: list[TrainSample], budget: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Samples in order, padded on the right."""

    def width(group: list[TrainSample]) -> int:
        return max(len(sample.token_ids) for sample in group)

    batches = []
    for group in in_micro_batches(samples, budget, width):
        shape = (len(group), width(group))
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        term, old, advantage = (np.zeros((shape[0], shape[1] - 1), np.float32) for _ in range(3))
        for row, sample in enumerate(group):
            (part,) = sample.parts
            ids[row, : len(sample.token_ids)], mask[row, : len(sample.token_ids)] = sample.token_ids, 1
            term[row, part.positions - 1] = 1 if part.term == "policy" else 2
            old[row, part.positions - 1] = part.constants.get("rollout_logprob", 0.0)
            advantage[row, part.positions - 1] = part.constants.get("advantage", 0.0)
        arrays = {"ids": ids, "mask": mask, "term": term, "old": old, "advantage": advantage}
        batches.append({name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
    return batches


def report(arguments: argparse.Namespace, results: dict[str, dict[str, Any]], with_trl: bool) -> None:
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {arguments.threads} thread(s)"
    )
    ours_row = results["ours"]
    table = Table(
        title=f"one update of {arguments.rollouts} rollouts and {arguments.demonstrations} demonstrations, "
        f"{ours_row['tokens']} tokens; hidden {arguments.hidden}, {arguments.layers} layers, vocabulary "
        f"{arguments.vocab}, {arguments.dtype}"
    )
    table.add_column("step")
    headings = (
        "tokens passed",
        "seconds",
        "tokens/s",
        "TFLOP/s",
        "extra peak GB",
        "time ratio",
        "memory ratio",
    )
    for heading in (*headings, *["MFU"] * ("mfu" in ours_row)):
        table.add_column(heading, justify="right")
    for kind, row in results.items():
        table.add_row(
            KINDS[kind],
            str(row["passed"]),
            f"{row['seconds']:.2f}",
            f"{row['tokens'] / row['seconds']:.0f}",
            f"{row['tflops_per_gpu']:.3g}",
            "" if kind == "products" else f"{row['extra'] / GB:.2f}",
            f"{row['seconds'] / ours_row['seconds']:.2f}",
            "" if kind == "products" else f"{row['extra'] / ours_row['extra']:.1f}",
            *([f"{row['mfu']:.1%}"] if "mfu" in row else []),
        )
    Console(width=120).print(table, f"{device}; {circumstances('transformers', *['trl'] * with_trl)}")


if __name__ == "__main__":
    sys.exit(main())
