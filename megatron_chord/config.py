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
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from megatron_chord.config_checks import allowed_temperature, not_negative, positive, require
from megatron_chord.config_methods import Aggregation, ChordConfig, MethodConfig
from megatron_chord.hub import repository_name
from megatron_chord.precision import Precision, preset
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.table import RewardConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: Path = field(metadata={"hub": "model"})
    """The policy: a Hugging Face folder with config.json, safetensors and tokenizer, or a name on the hub such as
    Qwen/Qwen2.5-7B-Instruct (docs/data.md)."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Number format of parameters and activations. The optimizer's main weights, gradients and log-prob sums are always
    fp32."""
    recompute: Literal["none", "mlp", "full"] = "none"
    """Which activations are computed again in the backward pass to save memory: none, those inside MLPs and experts
    (mlp), or those of whole layers (full)."""
    megatron_overrides: dict[str, int | float | bool | str] = field(
        default_factory=dict[str, int | float | bool | str]
    )
    """Fields of Megatron-Core's TransformerConfig to set by hand. An unknown name is an error."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    ranks: int = 1
    """Number of processes that `megatron-chord train` starts on this machine. torchrun and srun start the processes
    themselves; this setting then has no effect."""
    tensor: int = 1
    """Number of ranks that share the matrices of each layer (Megatron's tensor-model-parallel-size)."""
    pipeline: int = 1
    """Number of pipeline stages (Megatron's pipeline-model-parallel-size)."""
    virtual_pipeline: int | None = None
    """Number of model chunks in each pipeline stage (Megatron's interleaved schedule). Default: one."""
    stages: tuple[int, ...] | None = None
    """Number of layers in each pipeline stage, such as [15, 16, 16, 14]. With virtual_pipeline, the number of layers in
    each chunk, in the order of the layers (chunk n belongs to stage n modulo pipeline). Default: all have the same
    number."""
    context: int = 1
    """Number of ranks that share each sequence (Megatron's context-parallel-size)."""
    expert: int = 1
    """Number of ranks that share the experts of a mixture (Megatron's expert-model-parallel-size)."""
    sequence_parallel: bool = False
    """Splits the activations of norms and residuals along the sequence over the tensor-parallel ranks. Needs tensor >
    1."""
    distributed_optimizer: bool = True
    """Splits the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = True
    """Reduces gradients over the data-parallel ranks while the backward pass of the last micro-batch runs."""

    def __post_init__(self) -> None:
        positive(
            **{
                f"parallel.{name}": getattr(self, name)
                for name in ("ranks", "tensor", "pipeline", "context", "expert")
            }
        )
        require(
            not self.sequence_parallel or self.tensor > 1,
            "parallel.sequence_parallel needs parallel.tensor > 1",
        )
        if self.virtual_pipeline is not None:
            require(
                self.virtual_pipeline > 1,
                f"parallel.virtual_pipeline must be > 1, or left out, got {self.virtual_pipeline}",
            )
            require(self.pipeline > 1, "parallel.virtual_pipeline needs parallel.pipeline > 1")
        if self.stages is not None:
            self._check_stages(self.stages)

    @property
    def num_chunks(self) -> int:
        """Number of model chunks of the whole model: pipeline stages x chunks of each stage."""
        return self.pipeline * (self.virtual_pipeline or 1)

    @property
    def waits_in_gathers(self) -> bool:
        """True if ranks wait in a collective while other pipeline stages push their weights: the stages push one after
        the other, and the first gather of each begins with the push."""
        return self.pipeline > 1 and max(self.tensor, self.expert) > 1

    def _check_stages(self, stages: tuple[int, ...]) -> None:
        require(self.pipeline > 1, "parallel.stages needs parallel.pipeline > 1")
        require(
            len(stages) == self.num_chunks,
            f"parallel.stages lists {len(stages)} numbers of layers, expected {self.num_chunks} (parallel.pipeline "
            f"{self.pipeline} x parallel.virtual_pipeline {self.virtual_pipeline or 1})",
        )
        require(min(stages) > 0, f"parallel.stages must each have at least one layer, got {list(stages)}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data source: its rows are read in one way, drawn with one weight and reported under one name."""

    SHORTHAND = "path"

    path: tuple[Path, ...] = field(metadata={"hub": "dataset"})
    """A file, a folder of shards, a pattern such as train-*.parquet, or a list of these, which are read as one data set
    (docs/data.md). hf://datasets/OWNER/NAME/PATH is a file on the hub."""
    weight: float = 1.0
    """Share of the drawn rows that come from this source: weight / (sum of the weights of all sources). The number of
    rows in the source does not matter. `data.evaluation` has no weights."""
    name: str = ""
    """Name of the source in metrics, such as reward/by_source/NAME in trackers. Default: the name of its file, folder
    or repository on the hub."""
    fields: dict[str, str] = field(default_factory=dict[str, str])
    """Names of the columns that hold each field, such as {messages: prompt, answer: reward_model.ground_truth}. By
    default public layouts are recognised by their columns."""
    system_prompt: str | None = None
    """System prompt for the rows of this source, instead of `data.system_prompt`."""

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
    """Problems with a ground truth. The policy samples rollouts for them."""
    demonstrations: tuple[SourceConfig, ...] | None = None
    """Problems with a solution that the policy learns to imitate. May be left out only if mu is 0 at every step."""
    aligned: bool = False
    """Every prompt has its own demonstration in `demonstrations`, which is found by comparing the prompts. Some methods
    need this."""
    unmatched: Literal["fail", "drop"] = "fail"
    """What happens with `aligned` to prompts without a demonstration. fail: the run stops before any work. drop: they
    are left out and counted."""
    evaluation: tuple[SourceConfig, ...] | None = None
    """Held-out problems. Accuracy is measured over all of them and, with several sources, for each source. Default:
    nothing is evaluated."""
    chat_template: Path | None = None
    """Jinja file with a chat template. Default: the tokenizer's own template."""
    template_arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """Variables that the chat template reads, such as {enable_thinking: false}. They hold in RL, SFT and evaluation,
    and are defaults in the template of the exported policy. A name that the template does not read is an error."""
    tools_as: Literal["auto", "system_message", "template"] = "auto"
    """How a row's functions are shown to the policy in RL, SFT and evaluation. system_message: in a system message that
    asks for calls in the form that the tool-call reward reads. template: by the model's own chat template. auto: by the
    template for rows whose messages hold calls or results of calls, otherwise in the system message; it is an error if
    a run has rows of both kinds."""
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """Which assistant turns of a demonstration are trained. last_turn: only the last one; the earlier turns are written
    as in a prompt. Choose it for templates that rewrite earlier turns (Qwen3's removes their thinking)."""
    cache: Path | None = None
    """Folder where tokenised demonstrations are kept, so that the next start of the run does not tokenise them again
    (docs/data.md). Default: .data_cache beside `output`."""
    system_prompt: str | None = None
    """System prompt for every conversation that has no system message of its own, in RL, SFT and evaluation."""
    max_prompt_tokens: int = 1024
    """Maximum number of tokens of a prompt, including its chat template."""
    max_response_tokens: int = 1024
    """Maximum number of tokens of a rollout, and of the trainable part of a demonstration."""
    overlong: Literal["fail", "drop"] = "drop"
    """What happens to rows that are longer than a limit. fail: the run stops before any work. drop: they are left out
    and counted."""
    max_dropped: float = 0.0
    """Share of a file's rows that may be faulty, such as 0.01. Faulty rows are left out and counted. 0: one faulty row
    stops the run before any work."""

    def __post_init__(self) -> None:
        positive(
            **{
                "data.max_prompt_tokens": self.max_prompt_tokens,
                "data.max_response_tokens": self.max_response_tokens,
            }
        )
        require(0 <= self.max_dropped < 1, f"data.max_dropped must lie in [0, 1), got {self.max_dropped}")
        require(self.aligned or self.unmatched == "fail", "data.unmatched has no effect without data.aligned")
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
            f"data.evaluation.weight has no effect on {', '.join(weighted)}: every problem is evaluated",
        )


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """A penalty on the KL divergence from a reference policy, which is added to the policy loss."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the divergence at a token, from d = l_ref - l. k1: -d. k2: d^2 / 2. k3: exp(d) - 1 - d."""
    coefficient: float = 0.001
    """Weight of the penalty in the loss."""
    reference: Path | None = field(default=None, metadata={"hub": "model"})
    """The reference policy: a Hugging Face folder or a name on the hub. Default: `model.path`."""

    def __post_init__(self) -> None:
        positive(**{"objective.kl.coefficient": self.coefficient})


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """The loss of each rollout token is multiplied by an importance weight w = exp(l_old - l_rollout), without
    gradient.

    The weight corrects for differences between the log-probs of the rollout engine and of the trainer. With
    `rollout.asynchronous` or carried answers (`rollout.partial`) it also corrects for sampling by older weights."""

    level: Literal["token", "sequence", "geometric"] = "token"
    """What w is computed from: each token alone, the product over its sequence, or the geometric mean over its
    sequence."""
    mode: Literal["truncate", "clamp", "mask", "reject", "none"] = "truncate"
    """How w is bounded. truncate: min(w, high). clamp: w is clamped to [low, high]. mask: w in [low, high], 0 outside
    (TRL's token_mask and sequence_mask). reject: 1 in [low, high], 0 outside (verl's rollout_rs). none: no importance
    weight, also where it is the default (`rollout.asynchronous`, carried answers, FP8)."""
    low: float = 0.0
    """Lower bound of w for clamp, mask and reject."""
    high: float = 2.0
    """Upper bound of w."""

    def __post_init__(self) -> None:
        require(
            self.mode != "none" or (self.level, self.low, self.high) == ("token", 0.0, 2.0),
            "objective.correction.mode none has no weight: leave level, low and high out",
        )
        require(
            self.mode != "truncate" or self.low == 0,
            "objective.correction.low has no effect with mode `truncate`; leave it out, or set mode: clamp",
        )
        require(
            0 <= self.low < self.high,
            f"objective.correction needs 0 <= low < high, got {self.low} and {self.high}",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    surrogate: Literal["ppo", "gspo", "cispo", "unclipped"] = "ppo"
    """Policy loss of a token with ratio r, advantage A and log-prob l. ppo: -min(r A, clip(r) A). gspo: the same, where
    r is the geometric mean over the sequence. cispo: -sg(clip(r)) A l, where sg stops the gradient. unclipped: -r A."""
    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    dual_clip: float | None = None
    """The loss of a token with A < 0 is at most -A dual_clip. It must be above 1; 3 is usual. Default: no bound."""
    ratio_from: Literal["rollout", "current", "recomputed"] = "rollout"
    """Log-probs in the denominator of the ratio. rollout: the rollout engine's (the paper's pi_sample). current: the
    trainer's from the same forward pass, so that the ratio is 1. recomputed: the trainer's before the first update of
    the step, which costs one more forward pass."""
    aggregation: Aggregation = "token-mean"
    """How the policy loss is averaged over the rollout tokens of an update, by verl's names. token-mean: sum / tokens.
    seq-mean-token-mean: mean over sequences of token means. seq-mean-token-sum: mean over sequences of token sums.
    seq-mean-token-sum-norm: sum / (sequences x aggregation_length)."""
    aggregation_length: int | None = None
    """Number of tokens by which `seq-mean-token-sum-norm` divides (Dr.GRPO). Default: data.max_response_tokens."""
    advantage: Literal["group_std", "group_mean", "batch_std", "leave_one_out"] = "group_std"
    """Advantage of a rollout with reward R. group_std: (R - group mean) / group std. group_mean: R - group mean
    (Dr.GRPO). batch_std: (R - group mean) / std of all rewards of the step. leave_one_out: R - mean of the other
    rewards of the group (RLOO). Standard deviations are unbiased."""
    advantage_eps: float = 1e-6
    """Number that is added to the standard deviation before an advantage is divided by it."""
    equal_groups: Literal["keep", "drop"] = "keep"
    """Groups with equal rewards have advantage 0. keep: their tokens count in the averages. drop: they do not."""
    truncated: Literal["keep", "mask"] = "keep"
    """What happens to rollouts that were cut off at the length limit. keep: they are trained. mask: they are not
    trained, but their rewards still count in their group."""
    entropy_bonus: float = 0.0
    """Coefficient of the entropy, which is averaged and subtracted from the loss."""
    entropy_bonus_on: Literal["rollouts", "all"] = "rollouts"
    """Tokens whose entropy is averaged. rollouts: those of rollouts; the bonus has the weight of the policy loss. all:
    the tokens of demonstrations, too. The bonus is then one average over all these tokens. It is not multiplied by mu
    or 1 - mu."""
    entropy_aggregation: Aggregation | None = None
    """How the entropy is averaged; the names are those of `aggregation`. Default: as the policy loss is averaged."""
    kl: KLConfig | None = None
    """Default: no KL penalty."""
    correction: CorrectionConfig | None = None
    """Default: no correction. If `rollout.asynchronous`, carried answers or an FP8 precision is set and `ratio_from` is
    not `rollout`, the default is min(w, 2) for each token. With `ratio_from: rollout` the ratio is the correction."""

    def __post_init__(self) -> None:
        require(0.0 < self.clip_low <= 1.0, f"objective.clip_low must lie in (0, 1], got {self.clip_low}")
        positive(**{"objective.clip_high": self.clip_high, "objective.advantage_eps": self.advantage_eps})
        not_negative(**{"objective.entropy_bonus": self.entropy_bonus})
        for name, default in {"entropy_bonus_on": "rollouts", "entropy_aggregation": None}.items():
            require(
                self.entropy_bonus > 0 or getattr(self, name) == default,
                f"objective.{name} has no effect without objective.entropy_bonus; leave it out",
            )
        if self.dual_clip is not None:
            require(self.dual_clip > 1, f"objective.dual_clip must be > 1, got {self.dual_clip}")
            require(
                self.surrogate in ("ppo", "gspo"),
                f"objective.dual_clip belongs to ppo and gspo, not {self.surrogate}",
            )
        if self.surrogate == "unclipped":
            require(
                (self.clip_low, self.clip_high) == (0.2, 0.2),
                "objective.clip_low and clip_high have no effect on the surrogate `unclipped`; leave them out",
            )
        if self.advantage in ("group_mean", "leave_one_out"):
            require(
                self.advantage_eps == 1e-6,
                f"objective.advantage_eps has no effect on the advantage `{self.advantage}`; leave it out",
            )
        if self.aggregation_length is not None:
            positive(**{"objective.aggregation_length": self.aggregation_length})
        require(
            self.correction is None or self.ratio_from != "rollout",
            "objective.correction and ratio_from: rollout would correct the same mismatch twice; set ratio_from to "
            "current or recomputed",
        )

    @property
    def averages_entropy_apart(self) -> bool:
        """True if the entropy bonus is an average of its own, and not a part of the policy loss per token."""
        return self.entropy_bonus_on == "all" or self.entropy_aggregation is not None


@dataclass(frozen=True, kw_only=True)
class ResolvedObjective(ObjectiveConfig):
    """`objective` with its defaults that depend on other blocks: `correction` and `aggregation_length`. No file has
    it."""

    aggregation_length: int = field()  # without the default that it would inherit


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    prompts: int
    """Number of prompts per step."""
    rollouts: int
    """Number of rollouts per prompt (the group of GRPO)."""
    demonstrations: int
    """Number of demonstrations per step."""
    updates_per_step: int = 1
    """Number of optimizer updates per step. The samples of the step are divided among them."""
    epochs: int = 1
    """How many times the samples of a step are trained."""
    sampling_attempts: int = 1
    """Above 1: dynamic sampling. Groups whose answers all have the same score (before format and length rules) are
    replaced by groups of further prompts, in at most this many rounds. If groups are still missing then, groups with
    equal scores fill the batch."""
    max_tokens_per_gpu: int = 8192
    """Maximum number of tokens in one packed micro-batch of one data-parallel rank. A longer sample gets a micro-batch
    of its own."""
    share_prompts: bool = True
    """Answers to the same prompt share its pass through the model: same gradient, fewer tokens (docs/performance.md).
    Only without Transformer Engine and context parallelism, and for models without experts and latent attention;
    otherwise it has no effect."""

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
    """Asynchronous sampling: rollouts of later steps are sampled while a step trains (docs/running.md)."""

    max_off_policy_steps: int = 1
    """How many steps ahead rollouts are sampled. The weights that sample are up to this many steps older than the
    weights that are trained."""
    in_flight: Literal["drain", "keep"] = "drain"
    """What happens to unfinished requests when new weights are ready. drain: they are finished before the push. keep:
    they continue with the new weights. With keep, two runs with the same seed differ, because the timing determines
    which weights sample which token."""

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
    """How many prompts are sampled in addition, as a share of the step's prompts. 0.25 is a quarter more, rounded
    up."""
    unfinished: Literal["carry", "drop"] = "carry"
    """What happens to prompts whose answers were stopped. carry: the next step continues their answers, and each token
    keeps the log-prob and the version of the weights that sampled it. drop: they are skipped until the next epoch, so
    that prompts with long answers are trained less often."""
    max_carries: int | None = None
    """How many times a prompt is carried over at most. After that, sampling does not stop before the prompt is
    finished. Default: no limit except the length limit of answers."""

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
                "rollout.partial.max_carries has no effect with unfinished: drop, which continues no answer; leave it "
                "out",
            )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    temperature: float = 1.0
    """Sampling temperature, at most 2 (vLLM's limit). The trainer divides the logits of rollouts by the same number.
    The logits of demonstrations are divided by `method.sft_temperature`."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Number format of weights and activations in the rollout server. Default: `model.dtype`."""
    servers: tuple[str, ...] = ()
    """URLs of running vLLM servers (docs/running.md). Default: the trainer starts servers on loopback, and a Slurm job
    starts servers on its nodes."""
    tensor: int = 1
    """Number of GPUs of one server that the trainer or the job starts (tensor parallelism)."""
    count: int | None = None
    """Number of servers that the trainer starts on its machine. Default: as many as fit on its GPUs, with `tensor`
    GPUs each; one server without a GPU. A Slurm job has CHORD_SERVERS_PER_NODE instead (docs/cluster.md)."""
    gpu_memory_utilization: float = 0.6
    """Share of a GPU's memory that a server uses, in (0, 1]."""
    kv_cache_bytes: int | None = None
    """Size of the server's KV cache. Default: 256 MiB on a CPU; on a GPU, all free memory within
    `gpu_memory_utilization`."""
    transport: Literal["auto", "file", "gloo", "broadcast", "ipc", "relay"] = "auto"
    """How weights reach the servers. file: files in shared memory. gloo: main memory and gloo. broadcast: a process
    group (NCCL with GPUs). ipc: CUDA IPC. relay: a process group with one rank of each node, and from there CUDA IPC
    or files to the servers of the node. auto: files without a GPU; with GPUs, CUDA IPC to the trainer's own servers
    and NCCL to those in `servers`; in a Slurm job, the transport that fits the nodes of its servers
    (docs/cluster.md)."""
    sleep: bool | None = None
    """Servers free their GPU memory while the ranks train, and take it back when new weights arrive. Default: true
    with GPUs if servers and ranks share them and sampling is not `asynchronous`. Servers in `servers` must be started
    with --enable-sleep-mode."""
    offload: bool | None = None
    """Optimizer state, gradients and reference policy are moved from GPU memory to main memory while servers sample.
    Main memory must have room for them (docs/cluster.md). Default: true with GPUs if servers and ranks share them and
    sampling is not `asynchronous`."""
    asynchronous: AsynchronousConfig | None = None
    """Default: every step samples first, with its own weights, and then trains."""
    partial: PartialConfig | None = None
    """Default: every step waits for all of its answers."""
    repeatable: bool = False
    """Log-probs of a rollout do not depend on the other requests that the server processes at the same time, so that
    two runs with the same seed are equal bit for bit. Sampling is slower: on a GPU, vLLM uses its batch-invariant
    kernels (VLLM_BATCH_INVARIANT); on a CPU, it processes one request at a time."""
    router_replay: bool | None = None
    """For mixtures of experts: the trainer's routers choose for the tokens of rollouts the experts that the servers
    chose, so that both compute the same log-probs (docs/megatron.md). Default: true if servers return routes. true: a
    run that cannot replay routes is refused."""
    restarts: int = 1
    """How many times a dead server is replaced, and the sampling of the step repeated, before the run stops."""
    max_logprob_gap: float | None = None
    """Limit of |trainer's log-prob - rollout's log-prob|, averaged over the tokens of a step, in nats. The run stops
    when the mean is above it by more than three standard errors. Default: 1e-3 in fp32, 5e-2 in bf16, 0.1 in FP8, and
    0.5 in a step whose rollouts have tokens of older weights (`asynchronous`, carried answers). In bf16 and FP8 the
    rounding of the logits is added: their mean absolute value divided by 384."""
    max_probability_error: float | None = None
    """Limit of the factor by which the probabilities of trainer and rollout differ: exp|difference of log-probs|, at
    most 10 for each token, averaged over the tokens of a step. The run stops when the mean is above it by more than
    three standard errors. Default: 1.01 in fp32, 1.1 in bf16 and FP8 (up to 1.05 is healthy), with the rounding of the
    logits added as above; no limit in a step whose rollouts have tokens of older weights."""

    def __post_init__(self) -> None:
        positive(
            **{
                "rollout.temperature": self.temperature,
                "rollout.tensor": self.tensor,
                **({} if self.count is None else {"rollout.count": self.count}),
            }
        )
        require(
            self.count is None or not self.servers,
            "rollout.count is the number of servers that the trainer starts; with rollout.servers it starts none: "
            "leave one of the two out",
        )
        allowed_temperature(**{"rollout.temperature": self.temperature})
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
            "rollout.repeatable is impossible with rollout.asynchronous.in_flight: keep, because the progress of a "
            "request when new weights arrive depends on timing; set in_flight to drain",
        )
        require(
            not (self.repeatable and self.partial is not None),
            "rollout.repeatable is impossible with rollout.partial, because the prompts that finish first depend on "
            "timing; leave one of the two settings out",
        )

    @property
    def max_off_policy_steps(self) -> int:
        """How many steps ahead rollouts are sampled. It is 0 without ``asynchronous``."""
        return 0 if self.asynchronous is None else self.asynchronous.max_off_policy_steps

    @property
    def in_flight(self) -> Literal["drain", "keep"]:
        """The value of ``asynchronous.in_flight``. Without ``asynchronous`` no request is unfinished when weights are
        pushed."""
        return "drain" if self.asynchronous is None else self.asynchronous.in_flight

    @property
    def carries(self) -> bool:
        """True if unfinished answers are continued by later weights."""
        return self.partial is not None and self.partial.unfinished == "carry"

    @property
    def max_carries(self) -> int | None:
        """The value of ``partial.max_carries``."""
        return None if self.partial is None else self.partial.max_carries

    @property
    def has_older_tokens(self) -> bool:
        """True if tokens that a step trains may have been sampled by older weights than its own."""
        return self.asynchronous is not None or self.carries

    def extra_of(self, count: int) -> int:
        """Return how many prompts are sampled in addition to ``count``. It is 0 without ``partial``."""
        return 0 if self.partial is None else math.ceil(round(self.partial.extra_prompts * count, 6))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 1e-6
    """Learning rate after the warm-up, which is the highest of the run."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedules linear and cosine."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up. linear and cosine fall from `lr` to `min_lr`, which they reach at step
    `decay_steps`."""
    decay_steps: int | None = None
    """Step at which linear and cosine reach `min_lr`, counted from the start of the run. Later steps use `min_lr`.
    Default: `steps`. Set it if the run may later be resumed with more steps; the learning rates then stay the same."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises linearly to `lr`."""
    weight_decay: float = 0.0
    """Weight decay of AdamW. It is applied to matrices, not to norms and biases."""
    beta1: float = 0.9
    """Adam's decay rate of the mean of the gradients."""
    beta2: float = 0.999
    """Adam's decay rate of the mean of the squared gradients."""
    eps: float = 1e-8
    """Number that Adam adds to its denominator."""
    clip_grad: float = 1.0
    """Largest global norm of the gradient. A larger gradient is scaled down to it. 0: no clipping."""
    skip_nonfinite: int = 2
    """How many updates in a row may be skipped because their loss or gradient is NaN or infinite. One more stops the
    run. The batch of a skipped update is saved in `nonfinite/` of the run's folder. 0: the first such update stops the
    run."""

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
                "optim.decay_steps has no effect with optim.schedule constant; leave it out",
            )
            require(
                self.decay_steps > self.warmup_steps,
                f"optim.decay_steps {self.decay_steps} must be above optim.warmup_steps {self.warmup_steps}",
            )

    def horizon(self, steps: int) -> int:
        """The step at which the learning rate of a run of ``steps`` steps reaches its end value."""
        return steps if self.decay_steps is None else self.decay_steps


@dataclass(frozen=True, kw_only=True)
class EvaluationSetConfig:
    """One set of held-out problems with an interval and metrics of its own."""

    name: str
    """Name of the set in its metrics, such as reward/evaluation/NAME/avg@8 in trackers."""
    path: tuple[Path, ...] = field(metadata={"hub": "dataset"})
    """A file, a folder of shards, a pattern or a list of these, as in `data.evaluation.path`."""
    fields: dict[str, str] = field(default_factory=dict[str, str])
    """Names of the columns that hold each field, as in `data.evaluation.fields`."""
    system_prompt: str | None = None
    """System prompt for the rows of this set. Default: `data.system_prompt`."""
    every: int | None = None
    """Number of steps between evaluations of this set. Default: `evaluation.every`."""
    problems: int | None = None
    """How many problems of the set are used, from the first on. Default: `evaluation.problems`."""
    temperature: float | None = None
    """Sampling temperature of this set. Default: `evaluation.temperature`."""
    samples: int | None = None
    """Number of answers per problem of this set. Default: `evaluation.samples`."""
    metrics: tuple[str, ...] = ()
    """Metrics of this set. avg@K is the mean score of the first K answers. pass@K is the probability that at least one
    of K answers is right. Default: avg@samples."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][\w.+-]*", self.name) is not None,
            f"a set's name must consist of letters, digits and . _ + -, got {self.name!r}",
        )
        require(
            self.name not in ("accuracy", "truncated"),
            f"a set must not be named {self.name}, which is the name of a metric; choose another",
        )
        require(bool(self.path), f"{self.name}: a set needs a path")
        for metric in self.metrics:
            require(
                re.fullmatch(r"(avg|pass)@[1-9][0-9]*", metric) is not None,
                f"metrics of {self.name}: {metric!r} is neither avg@K nor pass@K, such as avg@8",
            )

    @property
    def source(self) -> SourceConfig:
        """Where the set's problems are read."""
        return SourceConfig(
            path=self.path, name=self.name, fields=self.fields, system_prompt=self.system_prompt
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 0
    """Number of steps between evaluations. There is always one before the first step and one after the last step. 0:
    only these two."""
    problems: int | None = None
    """How many held-out problems of each source are used, from the first on. Default: all."""
    temperature: float = 0.0
    """Sampling temperature. 0: always the most likely token."""
    samples: int = 1
    """Number of answers per problem. Accuracy is the mean over them."""
    patience: int | None = None
    """The run ends early after this many evaluations in a row without a new best accuracy. `checkpoint.keep_best` says
    which accuracy is compared. Default: the run does all of its steps."""
    sets: tuple[EvaluationSetConfig, ...] | None = field(default=None, metadata={"from_list": True})
    """Several sets of problems instead of `data.evaluation`, each with its own interval and metrics. If `evaluation`
    itself is a list, the list is this setting."""

    def __post_init__(self) -> None:
        not_negative(**{"evaluation.every": self.every, "evaluation.temperature": self.temperature})
        positive(**{"evaluation.samples": self.samples})
        allowed_temperature(**{"evaluation.temperature": self.temperature})
        if self.patience is not None:
            positive(**{"evaluation.patience": self.patience})
        require(self.problems is None or self.problems > 0, "evaluation.problems must be > 0, or left out")
        if self.sets is None:
            return
        require(bool(self.sets), "evaluation.sets lists no set")
        names = [item.name for item in self.sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"evaluation.sets has several sets named {', '.join(twice)}")
        for item in self.resolved():
            assert item.every is not None
            assert item.samples is not None
            assert item.temperature is not None
            not_negative(**{f"{item.name}: every": item.every, f"{item.name}: temperature": item.temperature})
            positive(**{f"{item.name}: samples": item.samples})
            allowed_temperature(**{f"{item.name}: temperature": item.temperature})
            require(item.problems is None or item.problems > 0, f"{item.name}: problems must be > 0")
            require(
                item.temperature > 0 or item.samples == 1,
                f"{item.name}: {item.samples} samples at temperature 0 would be the same answer {item.samples} times: "
                "set temperature, or samples to 1",
            )
            for metric in item.metrics:
                require(
                    int(metric.partition("@")[2]) <= item.samples,
                    f"{item.name}: {metric} needs more answers than samples, which is {item.samples}",
                )

    def resolved(self) -> tuple[EvaluationSetConfig, ...]:
        """Return the sets, each with the settings that it leaves out."""

        def whole(item: EvaluationSetConfig) -> EvaluationSetConfig:
            samples = self.samples if item.samples is None else item.samples
            return replace(
                item,
                every=self.every if item.every is None else item.every,
                problems=self.problems if item.problems is None else item.problems,
                temperature=self.temperature if item.temperature is None else item.temperature,
                samples=samples,
                metrics=item.metrics or (f"avg@{samples}",),
            )

        return tuple(whole(item) for item in self.sets or ())


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0
    """Number of steps between checkpoints. 0: only those of `every_minutes` and the one after the last step."""
    every_minutes: float = 30.0
    """A checkpoint is also written between two steps when the last one is this many minutes old. 0: never."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""
    asynchronous: bool | None = None
    """Training goes on while a checkpoint is written, from a copy in main memory: 14 bytes for each bf16 parameter,
    distributed over the ranks. Where too little memory is free, training waits. Default: true on GPUs."""
    keep_best: str | None = None
    """Also keeps the checkpoint of the best evaluation. `accuracy` compares the accuracy over all held-out problems;
    the name of a source in `data.evaluation` compares the accuracy on that source; `amc.avg@8` compares this metric of
    the set amc in `evaluation.sets`. A checkpoint is written after each evaluation that is the best so far."""
    export: Literal["last", "best"] = "last"
    """Which weights are exported to `policy/` at the end of the run. best: those of `keep_best`."""

    def __post_init__(self) -> None:
        require(
            self.export == "last" or self.keep_best is not None,
            "checkpoint.export: best needs checkpoint.keep_best, which names the number that decides which "
            "checkpoint is the best",
        )
        not_negative(**{"checkpoint.every": self.every, "checkpoint.every_minutes": self.every_minutes})
        positive(**{"checkpoint.keep": self.keep})


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Limits after which a process counts as frozen. The run then names the process, saves the stacks of all threads
    and ends with exit code 79. Sampling, grading and weight pushes have deadlines of their own (`timeouts`,
    `reward`)."""

    beat_s: float = 5.0
    """Time between two heartbeats of a rank. 0 turns the watchdog off, for example for a debugger."""
    silence_s: float = 120.0
    """A rank without a heartbeat for this long is frozen: it is stopped, it hangs in the kernel, or its node is
    lost."""
    loading_s: float = 3600.0
    """Longest time from the start of a rank to its first step. In this time the rank reads data, model and
    checkpoint."""
    computing_s: float | None = None
    """Longest time that a rank computes without finishing a micro-batch. Default: nine tenths of
    timeouts.collective_s; no limit for a run of one rank, because no other rank waits for it."""
    saving_s: float = 3600.0
    """Longest time to write a checkpoint, a step's metrics or the exported policy."""
    server_s: float = 300.0
    """A rollout server is frozen if it has requests but neither finishes one nor computes a token for this long. It is
    then replaced."""

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
    """How long a run waits for other processes before it gives up. `watchdog` finds processes that are frozen."""

    collective_s: float = 600.0
    """Longest time of one collective operation of the ranks."""
    server_start_s: float = 600.0
    """Longest time from the start of a rollout server until it answers."""
    sampling_s: float = 1800.0
    """Longest time to sample all rollouts that a step or an evaluation requests at once."""
    weight_push_s: float = 600.0
    """Longest time to push weights to the servers once. With parallel.pipeline above 1, and parallel.tensor or
    parallel.expert above 1, at most timeouts.collective_s: ranks wait in a collective while other stages push."""

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
    """Folder of the run. It gets the resolved config, metrics.jsonl, samples, TensorBoard files, checkpoints and the
    exported policy."""
    steps: int
    """Number of steps of the whole run."""
    model: ModelConfig
    """The policy and its number format."""
    data: DataConfig
    """Prompts, demonstrations, held-out problems, and how they are read."""
    batch: BatchConfig
    """How many prompts, rollouts and demonstrations a step has, and how they are divided."""
    precision: Precision | None = None
    """FP8 preset; each needs `model.dtype: bf16` (docs/fp8.md). Default, or bf16: no FP8. fp8_rollout: training is in
    BF16, and vLLM quantises weights in blocks of 128 x 128. fp8_e2e: the trainer's matrix products use such blocks,
    too. fp8_tensorwise: trainer and vLLM use one scale for each tensor; the first and the last layer stay in BF16."""
    method: MethodConfig = field(default_factory=ChordConfig)
    """How a step mixes rollouts and demonstrations; docs/methods.md explains each method."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model and the batch are divided among ranks."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The policy loss on rollouts: advantage, clipping, average, KL penalty."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How vLLM samples rollouts, and how it gets the weights."""
    reward: RewardConfig = field(default_factory=MathReward)
    """How answers are graded: a `kind` and its settings."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and its learning rate."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """When and how held-out problems are evaluated during the run."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written, and which are kept."""
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    """How long the run waits for other processes."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """When a process counts as frozen."""
    tracking: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"], ...] = ("tensorboard",)
    """Trackers that get the metrics in addition to metrics.jsonl (docs/report.md#trackers). An empty list: none."""
    trace_steps: int = 0
    """How many steps torch's profiler traces after each start of the run, from the third step on. Each rank writes one
    file to `traces/` in the run's folder. Traced steps are slower."""
    seed: int = 0
    """Seed of the order of data, of sampling and of all random choices."""

    def __post_init__(self) -> None:
        positive(steps=self.steps)
        not_negative(trace_steps=self.trace_steps)
        require(
            self.optim.warmup_steps < self.steps,
            f"optim.warmup_steps {self.optim.warmup_steps} must be below steps {self.steps}: no step would have the "
            "full learning rate",
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
        aggregations = [self.objective.aggregation, self.objective.entropy_aggregation]
        if isinstance(self.method, ChordConfig):
            aggregations.append(self.method.aggregation)
        require(
            self.objective.aggregation_length is None or "seq-mean-token-sum-norm" in aggregations,
            "objective.aggregation_length belongs to the aggregation seq-mean-token-sum-norm; leave it out",
        )
        correction = self.objective.correction
        require(
            self.needs_correction or correction is None or correction.mode != "none",
            "objective.correction.mode none turns off a correction that is on by default only with "
            "rollout.asynchronous, with rollout.partial and unfinished: carry, or with an FP8 precision; this run "
            "has none of these, so leave objective.correction out",
        )
        if self.precision is not None:
            self._check_precision()
        push_s, collective_s = self.timeouts.weight_push_s, self.timeouts.collective_s
        require(
            push_s <= collective_s or not self.parallel.waits_in_gathers,
            f"timeouts.weight_push_s {push_s:g} is above timeouts.collective_s {collective_s:g}: with "
            f"parallel.pipeline {self.parallel.pipeline}, parallel.tensor {self.parallel.tensor} and parallel.expert "
            f"{self.parallel.expert}, ranks wait in a collective while other pipeline stages push their weights; raise "
            "timeouts.collective_s, or lower timeouts.weight_push_s",
        )
        self._check_best()
        require(
            self.evaluation.sets is None or self.data.evaluation is None,
            "data.evaluation and evaluation.sets both list held-out problems; give one of them",
        )
        require(
            self.evaluation.every == 0 or bool(self.held_out()),
            f"evaluation.every {self.evaluation.every}: there is nothing to evaluate; give held-out problems in "
            "data.evaluation or evaluation.sets, or set evaluation.every to 0",
        )

    def _check_best(self) -> None:
        name = self.checkpoint.keep_best
        if name is None:
            require(
                self.evaluation.patience is None,
                "evaluation.patience needs checkpoint.keep_best, which names the number by which evaluations are "
                "compared",
            )
            return
        sets = self.evaluation.resolved()
        sources = self.data.evaluation or ()
        require(
            bool(sets) or (bool(sources) and self.evaluation.every > 0),
            "checkpoint.keep_best needs evaluations during the run: set data.evaluation and evaluation.every, or "
            "evaluation.sets",
        )
        intervals = {f"{item.name}.{metric}": item.every for item in sets for metric in item.metrics}
        known = [*intervals] if sets else ["accuracy", *(source.label for source in sources)]
        require(
            name in known,
            f"checkpoint.keep_best: {name!r} is none of {', '.join(dict.fromkeys(known))}",
        )
        require(
            intervals.get(name) != 0,
            f"checkpoint.keep_best: {name} is never measured during the run; give its set `every`",
        )

    @property
    def needs_correction(self) -> bool:
        """True if older or quantised weights may sample the rollouts."""
        return self.rollout.has_older_tokens or preset(self.precision).rollouts is not None

    def resolved_objective(self) -> ResolvedObjective:
        """`objective` with the length by which sums are divided, and with the importance correction.

        Correction is added if the rollouts need it. The user's own `objective.correction` has priority. With
        `ratio_from: rollout` no correction is added, because the ratio already is the importance weight.
        """
        objective = self.objective
        settings = {setting.name: getattr(objective, setting.name) for setting in fields(objective)}
        if objective.correction is None and self.needs_correction and objective.ratio_from != "rollout":
            settings["correction"] = CorrectionConfig()
        settings["aggregation_length"] = objective.aggregation_length or self.data.max_response_tokens
        return ResolvedObjective(**settings)

    def held_out(self) -> tuple[SourceConfig, ...]:
        """The sources of held-out problems: those of `data.evaluation`, or one for each of `evaluation.sets`."""
        if self.evaluation.sets is not None:
            return tuple(item.source for item in self.evaluation.sets)
        return self.data.evaluation or ()

    def _check_precision(self) -> None:
        for name, dtype in {"model.dtype": self.model.dtype, "rollout.dtype": self.rollout.dtype}.items():
            require(
                dtype in ("bf16", None), f"precision {self.precision} needs {name} to be bf16, got {dtype}"
            )


def check_lengths(data: DataConfig, max_positions: int) -> None:
    """Raise ValueError if a sample could be longer than the model's number of positions."""
    longest = data.max_prompt_tokens + data.max_response_tokens
    require(
        longest <= max_positions,
        f"data.max_prompt_tokens {data.max_prompt_tokens} + data.max_response_tokens {data.max_response_tokens} = "
        f"{longest} is more than the model's {max_positions} positions",
    )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of data-parallel ranks of `world_size` processes. Raise ValueError if the axes do not divide
    it."""
    product = parallel.tensor * parallel.pipeline * parallel.context
    require(
        world_size % product == 0,
        f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline} x parallel.context "
        f"{parallel.context} = {product} does not divide the {world_size} processes of this run",
    )
    stage = world_size // parallel.pipeline
    require(
        stage % parallel.expert == 0,
        f"parallel.expert {parallel.expert} does not divide the {stage} processes of a pipeline stage",
    )
    return world_size // product


def hub_paths(run: RunConfig) -> Iterator[tuple[str, Path]]:
    """The settings that may be names on the Hugging Face hub, with their paths."""
    yield "model.path", run.model.path
    if run.objective.kl is not None and run.objective.kl.reference is not None:
        yield "objective.kl.reference", run.objective.kl.reference
    for setting, sources in sources_by_setting(run).items():
        for source in sources:
            yield from ((setting, path) for path in source.path)


def sources_by_setting(run: RunConfig) -> dict[str, tuple[SourceConfig, ...]]:
    """All data sources of a run, by the setting that lists them."""
    return {
        "data.prompts": run.data.prompts,
        "data.demonstrations": run.data.demonstrations or (),
        "evaluation.sets" if run.evaluation.sets is not None else "data.evaluation": run.held_out(),
    }
