"""Checks the settings before any work, and loads and describes what a run needs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_chord.config import (
    ParallelConfig,
    RunConfig,
    SourceConfig,
    check_lengths,
    data_parallel_size,
    hub_paths,
    sources_by_setting,
)
from megatron_chord.config_io import one_line
from megatron_chord.costs.flops import attention_cost
from megatron_chord.data.align import align
from megatron_chord.data.cache import cached_loader
from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.layouts import unknown_fields
from megatron_chord.data.mixed_cursor import cursor_over
from megatron_chord.data.observed import Observe
from megatron_chord.data.packing import Layout, make_layout
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.served import tokenizer_difference
from megatron_chord.data.sources import load_sources
from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.data.tools import require_one_way
from megatron_chord.data.truths import doubts
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.hub import refusal, unresolved_name, why_offline
from megatron_chord.losses.terms import TEACHER_COLUMNS, Term, need_reference
from megatron_chord.methods.base import Method
from megatron_chord.methods.step_text import step_text
from megatron_chord.methods.table import method_of
from megatron_chord.model.specs import has_transformer_engine
from megatron_chord.precision import Fp8Training, preset
from megatron_chord.records import Demonstration, Prompt
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.prose import reads_as_text
from megatron_chord.rewards.table import RewardConfig, SumReward, check_sources, needs_of, terms_of
from megatron_chord.routes import RouteShape
from megatron_chord.sampling.context import Sources
from megatron_chord.train.evaluate import HeldOutSet, held_out_sets
from megatron_chord.train.router_replay import router_replay, wanted_routes
from megatron_chord.train.trackers import check_installed
from megatron_chord.weights.folder import check_copies, open_model

_TRIED = 50
"""Number of prompts, and of demonstrations, with which the exported folder's tokenizer is tested."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run; the coordinator draws from it."""

    template: ChatTemplate
    sources: Sources
    problems: tuple[Prompt, ...]
    """Held-out problems for evaluation."""
    reports: tuple[str, ...]
    """For each file a line that says how its rows were read."""
    left_out: tuple[Mapping[str, Any], ...]
    """Every row that is not used, with the reason; for dropped.jsonl."""
    routes: RouteShape | None = None
    """The shape of the rollouts' routes; None without router replay."""


def check_run(run: RunConfig, world_size: int) -> tuple[ModelShape, Method]:
    """Check every rule that needs only the settings, the number of processes and the model folder's headers.

    Raises:
        ValueError: the message names the rule that is broken.
    """
    # Imported here because these modules need Megatron-Core; reading data does not need it.
    from megatron_chord.model.build import check_overrides, check_shape
    from megatron_chord.model.fp8 import check_fp8

    check_installed(run.tracking)
    for setting, path in hub_paths(run):
        name = unresolved_name(path)
        if name is not None:
            raise ValueError(f"{setting}: {refusal(name, why_offline() or 'it was not downloaded')}")
    method = method_of(run)
    shape = read_shape(run.model.path)
    check_copies(open_model(run.model.path, shape.weights), shape.weights)
    check_shape(shape, run.parallel)
    data = data_parallel_size(run.parallel, world_size)
    check_overrides(run.model.megatron_overrides, shape)
    router_replay(run, shape)
    check_fp8(shape, run.parallel, run.precision)
    multiple = packing_layout(shape, run.parallel, data, preset(run.precision).training).batch_multiple
    if run.batch.max_tokens_per_gpu < multiple:
        raise ValueError(
            f"batch.max_tokens_per_gpu {run.batch.max_tokens_per_gpu} is below {multiple}, but the length of every "
            "packed micro-batch must be a multiple of it (precision, tensor and context parallelism; docs/fp8.md)"
        )
    check_lengths(run.data, shape.max_positions)
    method.check_positions(run.data, shape.max_positions)
    for setting, sources in sources_by_setting(run).items():
        for source in sources:
            if fault := unknown_fields(source.fields):
                raise ValueError(f"{setting}.fields {fault}")
        for path in (path for source in sources for path in source.path):
            if not (path.exists() or glob.glob(str(path))):
                raise ValueError(f"{setting}: {path} does not exist")
    if run.data.chat_template is not None and not run.data.chat_template.exists():
        raise ValueError(f"data.chat_template: {run.data.chat_template} does not exist")
    if run.objective.kl is not None and run.objective.kl.reference is not None:
        _check_reference(run.objective.kl.reference, shape)
    return shape, method


def needs_servers(run: RunConfig, method: Method) -> bool:
    """True if the run samples at any time, for the method or for evaluation."""
    return method.uses_rollouts(run.batch) or bool(run.held_out())


def reference_folder(run: RunConfig, terms: Mapping[str, Term]) -> Path | None:
    """The folder of the reference policy; None if no term needs its log-probs."""
    if not need_reference(terms.values()):
        return None
    kl = run.objective.kl
    return kl.reference if kl is not None and kl.reference is not None else run.model.path


def _check_reference(folder: Path, shape: ModelShape) -> None:
    reference = read_shape(folder)
    for field in fields(ModelShape):
        theirs, ours = getattr(reference, field.name), getattr(shape, field.name)
        if field.name != "weights" and theirs != ours:
            raise ValueError(
                f"objective.kl.reference: {folder} has {field.name} {theirs!r}, the policy has {ours!r}"
            )
    check_copies(open_model(folder, reference.weights), reference.weights)


def _reads_as_text(reward: RewardConfig, prompt: Prompt) -> bool:
    """True if a mathematics grader of the prompt can compare its truth only as text."""
    return any(
        isinstance(term, MathReward)
        and term.grades(prompt.source)
        and reads_as_text(prompt.truth, marker=term.answer_marker)
        for term in terms_of(reward).values()
    )


def load_data(run: RunConfig, shape: ModelShape, *, observe: Mapping[str, Observe] | None = None) -> RunData:
    """Read, check and tokenise all rows.

    ``observe``: for "prompts", "demonstrations" and "evaluation" a function that is called for each row.

    Raises:
        ValueError: rows are faulty. The message has file, line and reason.
    """
    observe = observe or {}
    template = load_template(
        run.model.path,
        chat_template=run.data.chat_template,
        arguments=run.data.template_arguments,
        system_prompt=run.data.system_prompt,
        tools_as=run.data.tools_as,
        train_on=run.data.train_on,
        vocab_size=shape.vocab_size,
    )
    limits: dict[str, Any] = {
        "max_prompt_tokens": run.data.max_prompt_tokens,
        "overlong": run.data.overlong,
        "max_dropped": run.data.max_dropped,
    }
    read_prompts = partial(load_prompts, needs=partial(needs_of, run.reward), **limits)
    asked = load_sources(run.data.prompts, template, partial(read_prompts, observe=observe.get("prompts")))
    shown = load_sources(
        run.data.demonstrations,
        template,
        cached_loader(
            partial(load_demonstrations, observe=observe.get("demonstrations")),
            run.data.cache or run.output.parent / ".data_cache",
            {
                "max_response_tokens": run.data.max_response_tokens,
                **limits,
            },
            read="demonstrations" not in observe,
        ),
    )
    held_out = load_sources(
        run.held_out(), template, partial(read_prompts, observe=observe.get("evaluation"))
    )
    reports = [
        *asked.lines("prompts    "),
        *shown.lines("demonstrations"),
        *held_out.lines("evaluation "),
    ]
    require_one_way([*asked.reports, *shown.reports, *held_out.reports])
    for what, loaded in (("prompts", asked), ("evaluation", held_out)):
        reports += [
            f"truths      {what}: {doubt}"
            for doubt in doubts(loaded.records, partial(_reads_as_text, run.reward))
        ]
    left_out = [
        *asked.left_out("prompts"),
        *shown.left_out("demonstrations"),
        *held_out.left_out("evaluation"),
    ]
    prompts, demonstrations = asked.records, shown.records
    template.renderer.stop_processes()
    check_sources(run.reward, {prompt.source for prompt in (*prompts, *held_out.records)})
    demonstration_of: dict[str, Demonstration] = {}
    if run.data.aligned:
        num_prompts = len(prompts)
        everything = prompts
        prompts, demonstration_of = align(prompts, demonstrations, unmatched=run.data.unmatched)
        reason = "no demonstration answers it"
        left_out += [
            {"data": "prompts", "source": prompt.source, "id": prompt.id, "reason": reason}
            for prompt in everything
            if prompt.id not in demonstration_of
        ]
        reports.append(f"aligned     {len(prompts)} of {num_prompts} prompts have their own demonstration")
    tried = [prompt.token_ids for prompt in prompts[:_TRIED]] + [
        demonstration.token_ids for demonstration in demonstrations[:_TRIED]
    ]
    difference = tokenizer_difference(run.model.path, template, tried)
    if difference is not None:
        reports.append(
            f"tokenizer   WARNING: the exported policy will be served with another tokenizer: {difference}. Give the "
            "folder a tokenizer_class (tokenizer_config.json) and a model type that go together"
        )
    return RunData(
        template=template,
        sources=Sources(
            prompts=tuple(prompts),
            demonstrations=tuple(demonstrations),
            demonstration_of=demonstration_of,
            prompt_cursor=cursor_over("prompts", prompts, _weights(run.data.prompts), seed=run.seed),
            demonstration_cursor=cursor_over(
                "demonstrations",
                demonstrations,
                _weights(run.data.demonstrations),
                seed=run.seed,
                tag="experts",
            )
            if run.data.demonstrations is not None
            else None,
        ),
        problems=_first_of_each(
            held_out.records,
            {item.name: item.problems for item in run.evaluation.resolved()},
            run.evaluation.problems,
        ),
        reports=tuple(reports),
        left_out=tuple(left_out),
        routes=wanted_routes(run, shape),
    )


def packing_layout(
    shape: ModelShape,
    parallel: ParallelConfig,
    data_parallel: int,
    fp8: Fp8Training | None = None,
    *,
    shares_prompts: bool = False,
) -> Layout:
    """The properties of parallel layout, FP8 and model (the cost of long sequences) that packing depends on."""
    layout = make_layout(
        data=data_parallel,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        virtual=parallel.virtual_pipeline is not None,
        attention_cost=attention_cost(shape),
        fp8=fp8,
    )
    return replace(layout, shares_prompts=shares_prompts)


def can_share_prompts(shape: ModelShape, parallel: ParallelConfig) -> bool:
    """True if answers to one prompt can share its pass through the model.

    Only the local attention can do so (``model.local_modules``), without context parallelism and without a latent
    (whose rotary frequencies Megatron computes inside the layer). In a mixture of experts the prompt would count once
    in the balance of its experts.
    """
    return (
        not has_transformer_engine()
        and parallel.context == 1
        and shape.experts is None
        and not shape.has_latent_attention
    )


def coordinator_timeout_s(run: RunConfig, method: Method) -> float:
    """The longest time that ranks may have to wait for the coordinator, in seconds.

    It includes a server's start, sampling and grading of all steps in the queue, and their repetitions. It is a last
    resort: normally ``runtime.heartbeat`` detects a frozen coordinator earlier.
    """
    rollout, timeouts = run.rollout, run.timeouts
    rollouts = run.batch.prompts * run.batch.rollouts
    grading = max(reward.timeout_s * rollouts / reward.workers for reward in terms_of(run.reward).values())
    # An evaluation samples its sets one after the other.
    rounds = max(method.max_sampling_rounds(run.batch), len(run.held_out()))
    sampling = rounds * (timeouts.sampling_s + grading)
    once = timeouts.server_start_s + sampling * max(1, rollout.max_off_policy_steps) + timeouts.weight_push_s
    return max(run.timeouts.collective_s, once * (1 + rollout.restarts))


def plan_lines(
    run: RunConfig, shape: ModelShape, method: Method, world_size: int, say: Callable[[str], None]
) -> None:
    """Print the plan of the run: model, layout, method, and what a step consists of."""
    batch, parallel = run.batch, run.parallel
    data = data_parallel_size(parallel, world_size)
    say(
        f"run         {_counted(run.steps, 'step')}, seed {run.seed}; prompts of at most {run.data.max_prompt_tokens} "
        f"tokens, answers of at most {run.data.max_response_tokens}"
    )
    say(
        f"model       {shape.family}, {shape.num_layers} layers of {shape.hidden_size}, vocabulary "
        f"{shape.vocab_size}, {run.model.dtype}, from {run.model.path}"
    )
    say(
        f"layout      {_counted(world_size, 'rank')}: tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"context {parallel.context} x data {data}"
        + (f"; stages of {', '.join(map(str, parallel.stages))} layers" if parallel.stages else "")
    )
    if run.precision is not None:
        say(f"precision   {run.precision}: {_precision_text(run, shape, data)}")
    say(f"method      {one_line(run.method)}")
    say(f"objective   {one_line(run.objective)}")
    say(f"optimizer   {one_line(run.optim)}")
    if method.uses_rollouts(run.batch):
        for name, reward in terms_of(run.reward).items():
            say(f"reward      {f'{name} = ' if isinstance(run.reward, SumReward) else ''}{one_line(reward)}")
        say(f"sampling    temperature {run.rollout.temperature}")
    for held_out in held_out_sets(run):
        say(f"evaluation  {_evaluation_text(held_out)}")
    say(
        f"one step    {step_text(method, batch)}; {_updates_text(batch.updates_per_step, batch.epochs)}; "
        f"micro-batches of at most {batch.max_tokens_per_gpu} tokens on each of {_counted(data, 'data-parallel rank')}"
    )
    if run.rollout.asynchronous is not None:
        say(f"ahead       {_ahead_text(run)}")
    if shape.experts is not None and method.uses_rollouts(run.batch):
        say(f"routing     {router_replay(run, shape)}")
    if run.rollout.partial is not None:
        say(f"early stop  {_early_stop_text(run)}")
    terms = method.all_terms(run.resolved_objective(), run.batch)
    pools = {term.pool: term for term in terms.values()}
    for pool, term in pools.items():
        names = " and ".join(name for name, other in terms.items() if other.pool == pool)
        say(f"average     {names}: the sum over the whole update's tokens / {_denominator(term)}")
    scored = {column for term in terms.values() for column in term.scored}
    passes = [
        text
        for text, columns in (
            ("log-probs before the first update", {"old_logprob", "old_entropy"}),
            ("log-probs of the reference", {"reference_logprob"}),
            ("log-probs of the teacher", set(TEACHER_COLUMNS.values())),
        )
        if scored & columns
    ]
    if passes:
        say(f"passes      one forward pass more a step for each of: {', '.join(passes)}")


def _evaluation_text(held_out: HeldOutSet) -> str:
    name = f"{held_out.name}: " if held_out.name else ""
    when = f", every {_counted(held_out.every, 'step')}" if held_out.every else ""
    metrics = f"; {', '.join(held_out.metrics)}" if held_out.metrics else ""
    return (
        f"{name}before the first step{when} and after the last; temperature {held_out.temperature}, "
        f"{_counted(held_out.samples, 'answer')} to each problem{metrics}"
    )


def _updates_text(updates: int, epochs: int) -> str:
    once = _counted(updates, "optimizer update")
    return once if epochs == 1 else f"{epochs} passes over the samples with {once} each"


def _precision_text(run: RunConfig, shape: ModelShape, data: int) -> str:
    training, rollouts = preset(run.precision).training, preset(run.precision).rollouts
    parts = ["training in BF16"]
    if training is not None:
        multiple = packing_layout(shape, run.parallel, data, training).batch_multiple
        parts = [
            f"the trainer's matrix products in {training.number_format} {training.recipe}"
            + (", first and last layer in BF16" if training.first_last_bf16 else ""),
            f"micro-batches padded to multiples of {multiple} tokens",
        ]
    parts.append(f"rollouts {f'quantised by vLLM, {rollouts.quantization}' if rollouts else 'in BF16'}")
    correction = run.resolved_objective().correction
    if rollouts is not None and run.objective.ratio_from == "rollout":
        parts.append("the ratio corrects for it")
    elif rollouts is not None and (correction is None or correction.mode == "none"):
        parts.append("NOT corrected for (objective.correction.mode: none)")
    elif rollouts is not None and correction is not None:
        parts.append(f"corrected for by each {correction.level}'s weight, {correction.mode}")
    return "; ".join(parts)


def _ahead_text(run: RunConfig) -> str:
    rollout = run.rollout
    when = {
        "drain": "answers that are being sampled are finished before new weights are pushed",
        "keep": "answers that are being sampled are continued with new weights",
    }[rollout.in_flight]
    steps = _counted(rollout.max_off_policy_steps, "step")
    return f"rollouts are sampled {steps} ahead; {when}; {_correction_text(run)}"


def _early_stop_text(run: RunConfig) -> str:
    prompts, extra = run.batch.prompts, run.rollout.extra_of(run.batch.prompts)
    what = (
        f"carried over to the next step; {_correction_text(run)}"
        if run.rollout.carries
        else "dropped, so that prompts with long answers are trained on less often (rollout.partial.unfinished: drop)"
    )
    return (
        f"{prompts + extra} prompts are sampled until {prompts} are finished; unfinished answers are {what}"
    )


def _correction_text(run: RunConfig) -> str:
    correction = run.resolved_objective().correction
    if run.objective.ratio_from == "rollout":
        return "older weights are the denominator of the ratio"
    if correction is None or correction.mode == "none":
        return "older weights are NOT corrected for (objective.correction.mode: none)"
    return f"older weights are corrected for by each {correction.level}'s weight, {correction.mode}"


def _denominator(term: Term) -> str:
    return {
        "token-mean": "their number",
        "seq-mean-token-mean": "(sequences x tokens of the own sequence)",
        "seq-mean-token-sum": "sequences",
        "seq-mean-token-sum-norm": f"(sequences x {term.aggregation_length})",
    }[term.aggregation]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


def _weights(sources: Sequence[SourceConfig]) -> dict[str, float]:
    return {source.label: source.weight for source in sources}


def _first_of_each(
    problems: Sequence[Prompt], counts: Mapping[str, int | None], other: int | None
) -> tuple[Prompt, ...]:
    """The first problems of each source. Their number is that of the source in ``counts``, otherwise ``other``; None
    means all."""
    sources = dict.fromkeys(problem.source for problem in problems)
    return tuple(
        problem
        for source in sources
        for problem in [problem for problem in problems if problem.source == source][
            : counts.get(source, other)
        ]
    )
