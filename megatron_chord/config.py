"""What a run is: every setting, its unit, its default and the rules it must keep.

One frozen dataclass per YAML block. Those of the block ``method`` are in ``config_methods``, those of the block
``reward`` in ``rewards.kinds``. Checks that need only the values of one block are in its ``__post_init__``, checks that
need several blocks in ``RunConfig``'s. Checks that need the model or the number of processes are functions at the end.
No torch is imported: a wrong file is refused in milliseconds. ``config_io`` reads these dataclasses from YAML and names
file and line of what is wrong.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_chord.config_checks import not_negative, positive, require
from megatron_chord.config_methods import Aggregation, ChordConfig, MethodConfig
from megatron_chord.hub import repository_name
from megatron_chord.precision import Precision, preset
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.table import RewardConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: Path = field(metadata={"hub": "model"})
    """Hugging Face folder of the policy: config.json, safetensors, tokenizer; or a name on the hub, such as
    Qwen/Qwen2.5-7B-Instruct (docs/data.md)."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Parameters and activations; main weights, gradients and the log-prob reductions are fp32 either way."""
    recompute: Literal["none", "mlp", "full"] = "none"
    """Activations computed again in the backward pass: none, those inside MLPs and experts, or whole layers."""
    megatron_overrides: dict[str, int | float | bool | str] = field(
        default_factory=dict[str, int | float | bool | str]
    )
    """Fields of Megatron-Core's TransformerConfig to set by hand; unknown names are refused."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    ranks: int = 1
    """Processes that `megatron-chord train` starts on this machine; under torchrun or srun their number rules."""
    tensor: int = 1
    """Ranks that share each layer's matrices (Megatron's tensor-model-parallel-size)."""
    pipeline: int = 1
    """Pipeline stages (pipeline-model-parallel-size)."""
    virtual_pipeline: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); none means one."""
    stages: tuple[int, ...] | None = None
    """Layers of each pipeline stage, such as [15, 16, 16, 14]; with virtual_pipeline of each chunk, in the order in
    which a token passes them (chunk n belongs to stage n modulo pipeline). Left out: equally many."""
    context: int = 1
    """Ranks that share each sequence (context-parallel-size)."""
    expert: int = 1
    """Ranks that share the experts of a mixture (expert-model-parallel-size)."""
    sequence_parallel: bool = False
    """Shard norms and residuals over the tensor axis along the sequence; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel axis."""
    overlap_grad_reduce: bool = True
    """Reduce gradients over the data-parallel axis while the last micro-batch's backward pass runs."""

    def __post_init__(self) -> None:
        positive(
            ranks=self.ranks,
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            expert=self.expert,
        )
        require(not self.sequence_parallel or self.tensor > 1, "sequence_parallel needs tensor > 1")
        if self.virtual_pipeline is not None:
            require(self.virtual_pipeline > 1, "virtual_pipeline must be > 1, or left out")
            require(self.pipeline > 1, "virtual_pipeline needs pipeline > 1")
        if self.stages is not None:
            self._check_stages(self.stages)

    @property
    def num_chunks(self) -> int:
        """Of the whole model: pipeline stages x model chunks of each."""
        return self.pipeline * (self.virtual_pipeline or 1)

    def _check_stages(self, stages: tuple[int, ...]) -> None:
        require(self.pipeline > 1, "stages needs pipeline > 1")
        require(
            len(stages) == self.num_chunks,
            f"stages lists {len(stages)} numbers of layers, expected {self.num_chunks} (pipeline {self.pipeline} x "
            f"virtual_pipeline {self.virtual_pipeline or 1})",
        )
        require(min(stages) > 0, f"stages must each have at least one layer, got {list(stages)}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Rows that are read in one way, drawn with one weight and reported under one name."""

    SHORTHAND = "path"

    path: tuple[Path, ...] = field(metadata={"hub": "dataset"})
    """A file, a folder of shards or a pattern such as train-*.parquet; or a list of them, which are one data set
    (docs/data.md). hf://datasets/OWNER/NAME/PATH is on the hub."""
    weight: float = 1.0
    """Of what is drawn, this source has the share weight / (sum of all sources' weights), whatever its number of rows.
    Means nothing to `evaluation`."""
    name: str = ""
    """Of its metrics, such as reward/NAME; the name of its file, folder or repository on the hub where left out."""
    fields: dict[str, str] = field(default_factory=dict[str, str])
    """Where a row has what is read, such as {messages: prompt, answer: reward_model.ground_truth}. Left out: public
    layouts are recognised by their columns."""
    system_prompt: str | None = None
    """In place of `data.system_prompt` for the rows of this source."""

    def __post_init__(self) -> None:
        require(bool(self.path), "a source needs a path")
        require(
            math.isfinite(self.weight) and self.weight > 0,
            f"{self.path[0]}: weight must be > 0, got {self.weight}; leave the source out instead of weight 0",
        )
        require(
            re.fullmatch(r"[\w.+-]*", self.name) is not None,
            f"{self.path[0]}: name must consist of letters, digits and . _ + -, got {self.name!r}",
        )
        for own, place in self.fields.items():
            require(
                place == str(place),
                f"{self.path[0]}: fields.{own} must be a text such as answer.text, got {place!r}",
            )

    @property
    def label(self) -> str:
        """``name``, or what the first path is called: train for train.parquet, gsm8k for gsm8k/*.jsonl and for all
        paths of the hub's openai/gsm8k."""
        if self.name:
            return self.name
        path = self.path[0]
        called = repository_name(path)
        if called is None:
            folders = (parent.name for parent in path.parents if not glob.has_magic(parent.name))
            called = next(folders, "") if glob.has_magic(path.name) else path.name.partition(".")[0]
        return re.sub(r"[^\w.+-]", "_", called) or "rows"


def sources_of(*paths: Path) -> tuple[SourceConfig, ...]:
    """One source of these files, as a path or a list of paths in YAML."""
    return (SourceConfig(path=paths),)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    prompts: tuple[SourceConfig, ...]
    """Problems with a ground truth, for rollouts."""
    demonstrations: tuple[SourceConfig, ...] | None = None
    """Questions with an answer to imitate. May be left out only when mu is 0 throughout."""
    aligned: bool = False
    """Every prompt has its own demonstration in `demonstrations`, found by the prompt itself. Some methods need it."""
    unmatched: Literal["fail", "drop"] = "fail"
    """With `aligned`, prompts without a demonstration: stop before work, or leave out and count."""
    evaluation: tuple[SourceConfig, ...] | None = None
    """Held-out problems; left out: nothing is evaluated. Accuracy is over all of them, and with several sources also
    of each."""
    chat_template: Path | None = None
    """Jinja file that replaces the tokenizer's own chat template."""
    template_arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """Variables that the chat template reads, such as {enable_thinking: false}, in RL, SFT and evaluation alike. The
    exported policy's template has them as its defaults. Names that the template does not read are refused."""
    tools_as: Literal["auto", "system_message", "template"] = "auto"
    """Who shows a row's functions, in RL, SFT and evaluation alike. system_message: a text that asks for calls as the
    tool-call reward reads them. template: the model's own chat template. auto: the template for rows whose messages
    hold calls or their results, else the system message; a run with both is refused."""
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """Which assistant turns of a demonstration are trained. last_turn: the last one alone, after the others as a prompt
    shows them; for templates that rewrite earlier turns (Qwen3 cuts their thinking out)."""
    cache: Path | None = None
    """Folder of tokenised demonstrations, from which a run that starts again takes them at once (docs/data.md). Left
    out: .data_cache beside `output`."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message of its own, in RL, SFT and evaluation alike."""
    max_prompt_tokens: int = 1024
    """Limit of a prompt, its chat template included."""
    max_response_tokens: int = 1024
    """Limit of a rollout, and of a demonstration's trainable part."""
    overlong: Literal["fail", "drop"] = "drop"
    """Rows beyond a limit: stop before work, or leave out and count."""
    max_dropped: float = 0.0
    """Share of a file's rows that may be faulty, such as 0.01: they are left out and counted. Left out: one faulty row
    stops the run before any work."""

    def __post_init__(self) -> None:
        positive(max_prompt_tokens=self.max_prompt_tokens, max_response_tokens=self.max_response_tokens)
        require(0 <= self.max_dropped < 1, f"data.max_dropped must lie in [0, 1), got {self.max_dropped}")
        require(self.aligned or self.unmatched == "fail", "data.unmatched means nothing without data.aligned")
        for role in ("prompts", "demonstrations", "evaluation"):
            sources: tuple[SourceConfig, ...] | None = getattr(self, role)
            require(sources != (), f"data.{role} lists no source")
            labels = [source.label for source in sources or ()]
            twice = sorted({label for label in labels if labels.count(label) > 1})
            require(
                not twice,
                f"data.{role} has several sources named {', '.join(twice)}: give each its own `name`",
            )
        weighted = [source.label for source in self.evaluation or () if source.weight != 1]
        require(
            not weighted,
            f"data.evaluation: every problem is evaluated, so weight means nothing to {', '.join(weighted)}",
        )


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """A penalty for leaving a reference policy, added to the policy branch."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = l_ref - l per token: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d."""
    coefficient: float = 0.001
    """Weight of the penalty."""
    reference: Path | None = field(default=None, metadata={"hub": "model"})
    """Hugging Face folder, or name on the hub, of the reference; the run's own starting point where left out."""

    def __post_init__(self) -> None:
        positive(**{"objective.kl.coefficient": self.coefficient})


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Importance weight of a rollout's token, w = exp(l_old - l_rollout), constant, times the loss.

    It corrects for what the rollout engine computes otherwise than the trainer and, with `rollout.asynchronous`
    or carried answers (`rollout.partial`), for the older weights that sampled."""

    level: Literal["token", "sequence", "geometric"] = "token"
    """w of each token, the product over its sequence, or that product's geometric mean."""
    mode: Literal["truncate", "clamp", "mask", "reject", "none"] = "truncate"
    """truncate: min(w, high). clamp: to [low, high]. mask: w within [low, high], 0 outside (TRL's token_mask and
    sequence_mask). reject: 1 within [low, high], 0 outside (verl's rollout_rs). none: no weight, which turns off the
    default of `rollout.asynchronous`, of carried answers and of FP8."""
    low: float = 0.0
    """Lower bound of w, for clamp, mask and reject."""
    high: float = 2.0
    """Upper bound of w."""

    def __post_init__(self) -> None:
        require(
            self.mode != "none" or (self.level, self.low, self.high) == ("token", 0.0, 2.0),
            "objective.correction.mode none has no weight: leave level, low and high out",
        )
        require(
            self.mode != "truncate" or self.low == 0,
            "objective.correction.low means nothing to the mode `truncate`; leave it out, or clamp",
        )
        require(
            0 <= self.low < self.high,
            f"objective.correction needs 0 <= low < high, got {self.low} and {self.high}",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    surrogate: Literal["ppo", "gspo", "cispo", "unclipped"] = "ppo"
    """ppo: -min(r A, clip(r) A) per token. gspo: the same with the sequence's geometric-mean ratio. cispo: -sg(clip(r))
    A l. unclipped: -r A."""
    clip_low: float = 0.2
    """The ratio is not clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    dual_clip: float | None = None
    """Bounds the loss of tokens with A < 0 by -A dual_clip (> 1; usually 3)."""
    ratio_from: Literal["rollout", "current", "recomputed"] = "rollout"
    """Denominator of the ratio: the rollout engine's log-probs (the paper's pi_sample), the trainer's own of this very
    pass (ratio 1 in value), or the trainer's own before the step's first update (a forward pass more)."""
    aggregation: Aggregation = "token-mean"
    """Of policy tokens over the whole step. verl's names. token-mean: sum / tokens. seq-mean-token-mean: mean over
    sequences of token means. seq-mean-token-sum: mean over sequences of token sums. seq-mean-token-sum-norm: sum /
    (sequences x aggregation_length)."""
    aggregation_length: int | None = None
    """For `seq-mean-token-sum-norm` (Dr.GRPO); data.max_response_tokens where left out."""
    advantage: Literal["group_std", "group_mean", "batch_std", "leave_one_out"] = "group_std"
    """group_std: (R - group mean) / group std. group_mean: R - group mean (Dr.GRPO). batch_std: divided by the std of
    the step's rewards. leave_one_out: R - mean of the others (RLOO). Standard deviations are unbiased."""
    advantage_eps: float = 1e-6
    """Added to the standard deviation that an advantage is divided by."""
    equal_groups: Literal["keep", "drop"] = "keep"
    """Groups of equal rewards have no advantage; keep: they count in the denominators. drop: they do not."""
    truncated: Literal["keep", "mask"] = "keep"
    """mask: rollouts cut off at the length limit are not trained on; their rewards still count in their group."""
    entropy_bonus: float = 0.0
    """Coefficient of the entropy at rollout tokens, averaged as the policy loss is and subtracted from it."""
    kl: KLConfig | None = None
    correction: CorrectionConfig | None = None
    """Left out: none, but with `rollout.asynchronous`, where unfinished answers are carried over or `precision` is one
    of FP8, and `ratio_from` is not `rollout`, the block's own defaults, min(w, 2) of each token. With `ratio_from:
    rollout` the ratio itself corrects."""

    def __post_init__(self) -> None:
        require(0.0 < self.clip_low <= 1.0, f"objective.clip_low must lie in (0, 1], got {self.clip_low}")
        positive(**{"objective.clip_high": self.clip_high, "objective.advantage_eps": self.advantage_eps})
        not_negative(**{"objective.entropy_bonus": self.entropy_bonus})
        if self.dual_clip is not None:
            require(self.dual_clip > 1, f"objective.dual_clip must be > 1, got {self.dual_clip}")
            require(
                self.surrogate in ("ppo", "gspo"),
                f"objective.dual_clip belongs to ppo and gspo, not {self.surrogate}",
            )
        if self.surrogate == "unclipped":
            require(
                (self.clip_low, self.clip_high) == (0.2, 0.2),
                "objective.clip_low and clip_high mean nothing to the surrogate `unclipped`; leave them out",
            )
        if self.advantage in ("group_mean", "leave_one_out"):
            require(
                self.advantage_eps == 1e-6,
                f"objective.advantage_eps means nothing to the advantage `{self.advantage}`; leave it out",
            )
        if self.aggregation_length is not None:
            positive(**{"objective.aggregation_length": self.aggregation_length})
        require(
            self.correction is None or self.ratio_from != "rollout",
            "objective.correction and ratio_from: rollout would correct the same mismatch twice; set ratio_from to "
            "current or recomputed",
        )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    prompts: int
    """Prompts per optimizer step."""
    rollouts: int
    """Samples per prompt (the group of GRPO)."""
    demonstrations: int
    """Demonstrations per optimizer step."""
    updates_per_step: int = 1
    """Optimizer updates that share a step's samples, each its own part of them."""
    epochs: int = 1
    """How often a step's samples are used."""
    sampling_attempts: int = 1
    """Above 1: dynamic sampling. Groups of equal rewards are replaced by those of further prompts, in at most so many
    rounds; what is missing then is filled with groups of equal rewards."""
    max_tokens_per_gpu: int = 8192
    """Token budget of one packed micro-batch on one data-parallel rank; a longer sample gets a micro-batch alone."""

    def __post_init__(self) -> None:
        not_negative(**{"batch.prompts": self.prompts, "batch.demonstrations": self.demonstrations})
        positive(
            **{
                "batch.max_tokens_per_gpu": self.max_tokens_per_gpu,
                "batch.updates_per_step": self.updates_per_step,
                "batch.epochs": self.epochs,
                "batch.sampling_attempts": self.sampling_attempts,
            }
        )
        reason = "all rewards are equal" if self.sampling_attempts > 1 else "no answer has an advantage"
        require(
            self.rollouts >= 2 or self.prompts == 0,
            f"batch.rollouts must be >= 2, got {self.rollouts}: in a group of one {reason}",
        )
        require(
            self.prompts + self.demonstrations > 0,
            "batch.prompts and batch.demonstrations are both 0: nothing to train on",
        )


@dataclass(frozen=True, kw_only=True)
class AsynchronousConfig:
    """Sampling ahead: rollouts of later steps are sampled while a step trains (docs/running.md)."""

    max_off_policy_steps: int = 1
    """How many steps ahead are sampled. A step's rollouts come from weights that are up to so many steps older than
    those that the step trains."""
    in_flight: Literal["drain", "keep"] = "drain"
    """What becomes of unfinished requests when new weights are there. drain: they are finished first. keep: they go on
    with the new weights; how far they had got is chance, so two runs are no longer equal."""

    def __post_init__(self) -> None:
        positive(**{"rollout.asynchronous.max_off_policy_steps": self.max_off_policy_steps})
        require(
            self.max_off_policy_steps == 1 or self.in_flight == "keep",
            f"rollout.asynchronous.max_off_policy_steps {self.max_off_policy_steps} with in_flight: drain would only "
            "make rollouts older: all sampling is finished before every push, so nothing more overlaps than with 1; "
            "set max_off_policy_steps to 1, or in_flight to keep",
        )


@dataclass(frozen=True, kw_only=True)
class PartialConfig:
    """Early stop: more prompts are sampled than a step trains, and sampling stops when enough of them are finished, so
    that a step does not wait for the longest answers (docs/running.md)."""

    extra_prompts: float = 0.25
    """Share of the step's prompts that are sampled in addition: 0.25 is a quarter more, rounded up."""
    unfinished: Literal["carry", "drop"] = "carry"
    """What becomes of prompts that were stopped. carry: the next step goes on with them and with what there is of their
    answers; each token keeps the log-prob and version of the weights that sampled it. drop: they are passed over until
    their next epoch, which trains less on prompts with long answers."""
    max_carries: int | None = None
    """How often a prompt is carried over at most; then sampling does not stop before it is finished. Left out: no bound
    but the answers' length."""

    def __post_init__(self) -> None:
        require(
            0 < self.extra_prompts <= 4,
            f"rollout.partial.extra_prompts must lie in (0, 4], got {self.extra_prompts}: it is a share of the step's "
            "prompts, 0.25 for a quarter more; without early stop leave rollout.partial out",
        )
        if self.max_carries is not None:
            positive(**{"rollout.partial.max_carries": self.max_carries})
            require(
                self.unfinished == "carry",
                "rollout.partial.max_carries means nothing with unfinished: drop, which carries nothing over; leave it "
                "out",
            )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    temperature: float = 1.0
    """Of sampling, at most 2 (vLLM's limit); the trainer divides the logits of rollouts by the same number, those of an
    SFT branch by `method.sft_temperature`."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Of the rollout server; the model's own where left out."""
    servers: tuple[str, ...] = ()
    """URLs of running vLLM servers (docs/running.md); when empty the trainer starts one on loopback, and a Slurm job
    its own on its nodes."""
    tensor: int = 1
    """Tensor parallelism of a server that the trainer or the job starts."""
    gpu_memory_utilization: float = 0.6
    """Share of a GPU's memory that a server takes, in (0, 1]."""
    kv_cache_bytes: int | None = None
    """Size of the server's KV cache; on a CPU 256 MiB where left out, on a GPU what is free."""
    transport: Literal["auto", "file", "gloo", "broadcast", "ipc"] = "auto"
    """How weights reach the server: shared-memory files, main memory and gloo, a process group (NCCL with GPUs),
    CUDA IPC. Auto takes files without a GPU; with one, CUDA IPC to the trainer's own server and NCCL to those in
    `servers`; in a Slurm job what fits where its servers run (docs/cluster.md)."""
    sleep: bool | None = None
    """Servers free their GPU memory while the ranks train, and get it back with the next weights. Left out: with GPUs,
    where the servers share the ranks' and sampling is not `asynchronous`. Servers in `servers` must be started with
    --enable-sleep-mode."""
    offload: bool | None = None
    """Optimizer state, gradients and a reference policy free their GPU memory while servers sample: they wait in the
    host's memory, which must have room for them (docs/cluster.md). Left out: with GPUs, where the servers share the
    ranks' and sampling is not `asynchronous`."""
    asynchronous: AsynchronousConfig | None = None
    """Left out: every step samples first, with its own weights, and then trains."""
    partial: PartialConfig | None = None
    """Left out: every step waits for all of its answers."""
    repeatable: bool = False
    """Log-probs of a rollout do not depend on which other requests the server processes at the same time, so that two
    runs with the same seed are equal bit for bit. Sampling is slower: on a GPU vLLM's batch-invariant kernels are used
    (VLLM_BATCH_INVARIANT), on a CPU one request is processed at a time."""
    restarts: int = 1
    """How often a dead server is replaced, and the step's sampling repeated, before the run stops."""
    max_logprob_gap: float | None = None
    """Largest mean |trainer - rollout| log-prob of a step's tokens; beyond it by more than three standard errors of the
    mean the run stops. Left out: 1e-3 in fp32, 5e-2 in bf16, 0.1 in FP8; 0.5 where older weights sampled some of them
    (`asynchronous`, carried answers), which differ as the policy has moved. In bf16 and FP8 a 384th of the logits' mean
    size is added, which is what rounding them makes."""
    max_probability_error: float | None = None
    """Largest mean exp|trainer - rollout| log-prob of a step's tokens, the factor by which probabilities differ, each
    token's at most 10; beyond it by more than three standard errors the run stops. Left out: 1.01 in fp32, 1.1 in bf16
    and FP8, where up to 1.05 is healthy, and the logits' rounding as above; no limit for rollouts of older weights."""

    def __post_init__(self) -> None:
        positive(
            **{
                "rollout.temperature": self.temperature,
                "rollout.tensor": self.tensor,
            }
        )
        require(
            self.temperature <= 2,
            f"rollout.temperature must be <= 2, got {self.temperature}: vLLM refuses to sample at a higher one",
        )
        require(0 < self.gpu_memory_utilization <= 1, "rollout.gpu_memory_utilization must lie in (0, 1]")
        not_negative(**{"rollout.restarts": self.restarts})
        require(
            not self.sleep or self.asynchronous is None,
            "rollout.sleep: with rollout.asynchronous servers sample while the ranks train, and cannot sleep",
        )
        require(
            not self.offload or self.asynchronous is None,
            "rollout.offload: with rollout.asynchronous the ranks train while servers sample, and need their optimizer "
            "state",
        )
        if self.max_logprob_gap is not None:
            positive(**{"rollout.max_logprob_gap": self.max_logprob_gap})
        require(
            self.max_probability_error is None or self.max_probability_error > 1,
            f"rollout.max_probability_error must be > 1, got {self.max_probability_error}: equal probabilities have an "
            "error of 1",
        )
        if self.kv_cache_bytes is not None:
            positive(**{"rollout.kv_cache_bytes": self.kv_cache_bytes})
        require(
            not (self.repeatable and self.servers),
            "rollout.repeatable cannot change running servers (rollout.servers): start them with "
            "VLLM_BATCH_INVARIANT=1 in their environment, and leave rollout.repeatable out",
        )
        require(
            not (self.repeatable and self.in_flight == "keep"),
            "rollout.repeatable cannot hold with rollout.asynchronous.in_flight: keep: how far a request has got when "
            "new weights arrive is chance; set in_flight to drain",
        )
        require(
            not (self.repeatable and self.partial is not None),
            "rollout.repeatable cannot hold with rollout.partial: which prompts finish first is chance; leave one of "
            "them out",
        )

    @property
    def max_off_policy_steps(self) -> int:
        """How many steps ahead are sampled; 0 without ``asynchronous``."""
        return 0 if self.asynchronous is None else self.asynchronous.max_off_policy_steps

    @property
    def in_flight(self) -> Literal["drain", "keep"]:
        """As ``asynchronous.in_flight``; without it no request is unfinished when weights are pushed."""
        return "drain" if self.asynchronous is None else self.asynchronous.in_flight

    @property
    def carries(self) -> bool:
        """Whether unfinished answers are continued by later weights."""
        return self.partial is not None and self.partial.unfinished == "carry"

    @property
    def max_carries(self) -> int | None:
        """As ``partial.max_carries``."""
        return None if self.partial is None else self.partial.max_carries

    @property
    def has_older_tokens(self) -> bool:
        """Whether tokens that a step trains may have been sampled by older weights than its own."""
        return self.asynchronous is not None or self.carries

    def extra_of(self, count: int) -> int:
        """How many prompts are sampled beyond ``count``; 0 without ``partial``."""
        return 0 if self.partial is None else math.ceil(round(self.partial.extra_prompts * count, 6))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 1e-6
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of linear and cosine."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up, down to `min_lr` at step `decay_steps`."""
    decay_steps: int | None = None
    """Step at which linear and cosine reach `min_lr`, counted from the run's start; later steps have `min_lr`. Left
    out: `steps`. It keeps the course of the rate when a resumed run is given more steps."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly to `lr`."""
    weight_decay: float = 0.0
    """Applied to matrices only, never to norms and biases."""
    beta1: float = 0.9
    """Of Adam."""
    beta2: float = 0.999
    """Of Adam."""
    eps: float = 1e-8
    """Of Adam."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    skip_nonfinite: int = 2
    """An update whose loss or gradient is NaN or infinite is left out, its batch saved in `nonfinite/` of the run's
    folder. So many in a row are; one more stops the run. 0: the first stops it."""

    def __post_init__(self) -> None:
        positive(**{"optim.lr": self.lr, "optim.eps": self.eps})
        for name, beta in {"optim.beta1": self.beta1, "optim.beta2": self.beta2}.items():
            require(0 <= beta < 1, f"{name} must lie in [0, 1), got {beta}")
        not_negative(
            **{
                "optim.min_lr": self.min_lr,
                "optim.warmup_steps": self.warmup_steps,
                "optim.weight_decay": self.weight_decay,
                "optim.clip_grad": self.clip_grad,
                "optim.skip_nonfinite": self.skip_nonfinite,
            }
        )
        require(self.min_lr <= self.lr, f"optim.min_lr {self.min_lr} is above optim.lr {self.lr}")
        if self.decay_steps is not None:
            require(
                self.schedule != "constant",
                "optim.decay_steps means nothing to optim.schedule constant; leave it out",
            )
            require(
                self.decay_steps > self.warmup_steps,
                f"optim.decay_steps {self.decay_steps} must be above optim.warmup_steps {self.warmup_steps}",
            )

    def horizon(self, steps: int) -> int:
        """The step at which the rate of a run of ``steps`` has come down."""
        return steps if self.decay_steps is None else self.decay_steps


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 0
    """Steps between evaluations; before the first and after the last step there is one as well. 0: only those two."""
    problems: int | None = None
    """The first so many held-out problems of each source; all where left out."""
    temperature: float = 0.0
    """Of sampling; 0 takes the most likely token."""
    samples: int = 1
    """Answers per problem; accuracy is their mean."""
    patience: int | None = None
    """The run ends early when so many evaluations in a row were no better than the best one, by what
    `checkpoint.keep_best` names. Left out: it takes all of its steps."""

    def __post_init__(self) -> None:
        not_negative(**{"evaluation.every": self.every, "evaluation.temperature": self.temperature})
        positive(**{"evaluation.samples": self.samples})
        if self.patience is not None:
            positive(**{"evaluation.patience": self.patience})
        require(self.problems is None or self.problems > 0, "evaluation.problems must be > 0, or left out")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; 0: none but those of `every_minutes` and the last."""
    every_minutes: float = 30.0
    """A checkpoint is also written before the next step when the last one is so many minutes old; 0: never."""
    keep: int = 2
    """How many of the newest to keep."""
    keep_best: str | None = None
    """Keeps the checkpoint of the best evaluation beside the newest: the best by `accuracy`, or by the accuracy of the
    source of `data.evaluation` with this name. A checkpoint is then written after each evaluation that is the best."""
    export: Literal["last", "best"] = "last"
    """Which weights `policy/` gets at the run's end. best: those of `keep_best`."""

    def __post_init__(self) -> None:
        require(
            self.export == "last" or self.keep_best is not None,
            "checkpoint.export: best needs checkpoint.keep_best, which says by what the best is chosen",
        )
        not_negative(**{"checkpoint.every": self.every, "checkpoint.every_minutes": self.every_minutes})
        positive(**{"checkpoint.keep": self.keep})


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a process counts as frozen: the run then names it, keeps the stacks and ends with exit code 79. Sampling,
    grading and pushes of weights have deadlines of their own (`timeouts`, `reward`)."""

    beat_s: float = 5.0
    """Between two signs of life of every rank; 0 turns the watchdog off, for a debugger."""
    silence_s: float = 120.0
    """A rank that shows none for so long is frozen: stopped, hung in the kernel, or its node is lost."""
    loading_s: float = 3600.0
    """From a rank's start to its first step: data, model, a checkpoint."""
    computing_s: float | None = None
    """A rank's computing without finishing a micro-batch. Left out: nine tenths of timeouts.collective_s; for a run of
    one rank, which nobody waits for, no limit."""
    saving_s: float = 3600.0
    """A checkpoint, or the export of the policy."""
    server_s: float = 300.0
    """A rollout server that has requests, and neither finishes one nor computes a token for so long, is frozen: it is
    replaced as one that died."""

    def __post_init__(self) -> None:
        not_negative(**{"watchdog.beat_s": self.beat_s})
        positive(
            **{
                "watchdog.loading_s": self.loading_s,
                "watchdog.saving_s": self.saving_s,
                "watchdog.server_s": self.server_s,
            }
        )
        if self.computing_s is not None:
            positive(**{"watchdog.computing_s": self.computing_s})
        require(
            self.silence_s >= 2 * self.beat_s,
            f"watchdog.silence_s must be at least two beats, 2 x beat_s = {2 * self.beat_s:g}, got {self.silence_s:g}",
        )


@dataclass(frozen=True, kw_only=True)
class TimeoutsConfig:
    """How long a run waits for others before it counts them as lost. `watchdog` finds processes that are frozen."""

    collective_s: float = 600.0
    """For one collective operation of the ranks."""
    server_start_s: float = 600.0
    """From a rollout server's start until it answers."""
    sampling_s: float = 1800.0
    """For the answers to one request for rollouts: all that a step, or an evaluation, samples at once."""
    weight_push_s: float = 600.0
    """For one push of weights to the servers."""

    def __post_init__(self) -> None:
        positive(
            **{
                "timeouts.collective_s": self.collective_s,
                "timeouts.server_start_s": self.server_start_s,
                "timeouts.sampling_s": self.sampling_s,
                "timeouts.weight_push_s": self.weight_push_s,
            }
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output: Path = field(metadata={"from_cwd": True})
    """Folder of the run: resolved config, metrics.jsonl, samples, TensorBoard, checkpoints, the exported policy."""
    steps: int
    """Optimizer steps of the whole run."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    precision: Precision | None = None
    """Number formats, with a `model.dtype` of bf16 (docs/fp8.md). Left out, or bf16: no FP8. fp8_rollout: training in
    BF16; vLLM quantises in blocks of 128 x 128. fp8_e2e: the trainer's matrix products in such blocks, too.
    fp8_tensorwise: both with one scale for each tensor, the first and last layer in BF16."""
    method: MethodConfig = field(default_factory=ChordConfig)
    """How a step mixes rollouts and demonstrations; docs/methods.md explains each method."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=MathReward)
    """How answers are graded: a `kind` and its settings."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    tracking: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"], ...] = ("tensorboard",)
    """Where the numbers go beside metrics.jsonl (docs/report.md#trackers); an empty list: nowhere."""
    trace_steps: int = 0
    """How many steps to trace with torch's profiler, after the first two of every start: `traces/` in the run's folder,
    one file a rank. Tracing slows these steps down."""
    seed: int = 0
    """Of the order of data, of sampling and of all random choices."""

    def __post_init__(self) -> None:
        positive(steps=self.steps)
        not_negative(trace_steps=self.trace_steps)
        require(
            self.optim.warmup_steps < self.steps,
            f"optim.warmup_steps {self.optim.warmup_steps} leaves no step of the run's {self.steps} at full rate",
        )
        require(
            self.optim.min_lr > 0 or self.optim.horizon(self.steps) >= self.steps,
            f"optim.decay_steps {self.optim.decay_steps} is below steps {self.steps}, and optim.min_lr is 0: the steps "
            "after it would change nothing; set optim.min_lr, or raise optim.decay_steps",
        )
        if self.reward.overlong is not None:
            require(
                self.reward.overlong.cache <= self.data.max_response_tokens,
                f"reward.overlong.cache {self.reward.overlong.cache} is above data.max_response_tokens "
                f"{self.data.max_response_tokens}",
            )
        aggregations = [self.objective.aggregation]
        if isinstance(self.method, ChordConfig):
            aggregations.append(self.method.aggregation)
        require(
            self.objective.aggregation_length is None or "seq-mean-token-sum-norm" in aggregations,
            "objective.aggregation_length belongs to the aggregation seq-mean-token-sum-norm; leave it out",
        )
        correction = self.objective.correction
        require(
            self.rollout.has_older_tokens
            or preset(self.precision).rollouts is not None
            or correction is None
            or correction.mode != "none",
            "objective.correction.mode none turns off the correction that rollout.asynchronous, rollout.partial with "
            "unfinished: carry, or an FP8 precision brings; without any leave objective.correction out",
        )
        if self.precision is not None:
            self._check_precision()
        self._check_best()
        require(
            self.evaluation.every == 0 or self.data.evaluation is not None,
            f"evaluation.every {self.evaluation.every}: there is nothing to evaluate; give held-out problems in "
            "data.evaluation, or set evaluation.every to 0",
        )

    def _check_best(self) -> None:
        name = self.checkpoint.keep_best
        if name is None:
            require(
                self.evaluation.patience is None,
                "evaluation.patience needs checkpoint.keep_best, which says by what evaluations are compared",
            )
            return
        sources = self.data.evaluation or ()
        require(
            bool(sources) and self.evaluation.every > 0,
            "checkpoint.keep_best needs data.evaluation and evaluation.every: there is nothing to choose from",
        )
        known = ["accuracy", *(source.label for source in sources)]
        require(
            name in known,
            f"checkpoint.keep_best: {name!r} is none of {', '.join(dict.fromkeys(known))}",
        )

    def _check_precision(self) -> None:
        for name, dtype in {"model.dtype": self.model.dtype, "rollout.dtype": self.rollout.dtype}.items():
            require(
                dtype in ("bf16", None), f"precision {self.precision} needs {name} to be bf16, got {dtype}"
            )


def check_lengths(data: DataConfig, max_positions: int) -> None:
    """ValueError when a sample could be longer than the model's positions."""
    longest = data.max_prompt_tokens + data.max_response_tokens
    require(
        longest <= max_positions,
        f"data.max_prompt_tokens {data.max_prompt_tokens} + data.max_response_tokens {data.max_response_tokens} = "
        f"{longest} is beyond the model's {max_positions} positions",
    )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Data-parallel ranks of `world_size` processes; ValueError when the axes do not divide it."""
    product = parallel.tensor * parallel.pipeline * parallel.context
    require(
        world_size % product == 0,
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = {product} "
        f"does not divide the {world_size} processes of this run",
    )
    stage = world_size // parallel.pipeline
    require(
        stage % parallel.expert == 0,
        f"expert {parallel.expert} does not divide the {stage} processes of a pipeline stage",
    )
    return world_size // product


def hub_paths(run: RunConfig) -> Iterator[tuple[str, Path]]:
    """The settings that may be names on the Hugging Face hub, with their paths."""
    yield "model.path", run.model.path
    if run.objective.kl is not None and run.objective.kl.reference is not None:
        yield "objective.kl.reference", run.objective.kl.reference
    for role in ("prompts", "demonstrations", "evaluation"):
        sources: tuple[SourceConfig, ...] | None = getattr(run.data, role)
        for source in sources or ():
            yield from ((f"data.{role}", path) for path in source.path)
