"""What a run is: every setting, its unit, its default and the rules it must keep.

One frozen dataclass per YAML block. Checks that need nothing but the values stand in ``__post_init__``; checks that
need the model or the number of processes are functions at the end. Nothing derived is stored, and no torch is
imported: a wrong file is refused in milliseconds. ``config_io`` turns YAML into these and names file and line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(**values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{name} must be > 0, got {value}")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        _require(value >= 0, f"{name} must be >= 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: Path
    """Hugging Face folder of the policy: config.json, safetensors, tokenizer."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Parameters and activations; main weights, gradients and the log-prob reductions are fp32 either way."""
    recompute: Literal["none", "full"] = "none"
    """Activation recomputation: none, or every layer."""
    megatron_overrides: dict[str, int | float | bool | str] = field(
        default_factory=dict[str, int | float | bool | str]
    )
    """Fields of Megatron-Core's TransformerConfig to set by hand; unknown names are refused."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    ranks: int = 1
    """Processes that `megatron-chord train` starts on this machine; under torchrun its world size rules."""
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); none means one."""
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    """Shard norms and residuals over the tensor axis along the sequence; needs tensor > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel axis."""
    timeout_s: float = 600.0
    """Deadline of one collective."""

    def __post_init__(self) -> None:
        _positive(
            ranks=self.ranks,
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            expert=self.expert,
            timeout_s=self.timeout_s,
        )
        _require(not self.sequence_parallel or self.tensor > 1, "sequence_parallel needs tensor > 1")
        if self.virtual_pipeline is not None:
            _require(self.virtual_pipeline > 1, "virtual_pipeline must be > 1, or left out")
            _require(self.pipeline > 1, "virtual_pipeline needs pipeline > 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    prompts: Path
    """JSON lines or Parquet: problems with a ground truth, for rollouts."""
    experts: Path | None = None
    """JSON lines or Parquet: demonstrations. May be left out only when mu is 0 throughout."""
    evaluation: Path | None = None
    """JSON lines or Parquet: held-out problems."""
    chat_template: Path | None = None
    """Jinja file that replaces the tokenizer's own chat template."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message of its own, in RL, SFT and evaluation alike."""
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024
    """Limit of a rollout, and of a demonstration's trainable part."""
    overlong: Literal["fail", "drop"] = "drop"
    """Rows beyond a limit: stop before work, or leave out and count."""

    def __post_init__(self) -> None:
        _positive(max_prompt_tokens=self.max_prompt_tokens, max_response_tokens=self.max_response_tokens)


@dataclass(frozen=True, kw_only=True)
class MuConfig:
    """Weight of the expert branch at optimizer step s (the first step is s = 0).

    ``constant`` is ``peak`` at every step. ``warmup_cosine`` rises linearly from 0 to ``peak`` over ``warmup_steps``,
    then falls along a cosine to ``valley`` over ``decay_steps`` and stays there (CHORD-mu: 0.9 -> 0.05).
    """

    schedule: Literal["constant", "warmup_cosine"] = "constant"
    peak: float = 0.1
    valley: float | None = None
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        _require(0.0 <= self.peak <= 1.0, f"mu.peak must lie in [0, 1], got {self.peak}")
        if self.schedule == "constant":
            _require(
                self.valley is None and self.warmup_steps == 0 and self.decay_steps == 0,
                "a constant mu has only `peak`; valley, warmup_steps and decay_steps belong to warmup_cosine",
            )
            return
        _require(self.valley is not None, "warmup_cosine needs `valley`, the value after the decay")
        assert self.valley is not None
        _require(0.0 <= self.valley <= 1.0, f"mu.valley must lie in [0, 1], got {self.valley}")
        _not_negative(**{"mu.warmup_steps": self.warmup_steps, "mu.decay_steps": self.decay_steps})


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    mu: MuConfig = field(default_factory=MuConfig)
    expert_weight: Literal["one", "p", "phi"] = "phi"
    """Weight of an expert token: 1 (SFT), p (importance-weighted SFT, also known as DFT) or p(1-p) (CHORD-phi)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """The surrogate's ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    ratio_from: Literal["rollout", "current"] = "rollout"
    """Denominator of the ratio: the rollout engine's log-probs (the paper's pi_sample), or the trainer's own."""
    advantage_std: bool = True
    """Divide group-centred rewards by the group's standard deviation (unbiased)."""
    advantage_eps: float = 1e-6
    entropy_bonus: float = 0.0
    """Coefficient of the mean entropy over rollout tokens, subtracted from the policy branch."""

    def __post_init__(self) -> None:
        _require(0.0 < self.clip_low <= 1.0, f"clip_low must lie in (0, 1], got {self.clip_low}")
        _positive(clip_high=self.clip_high, advantage_eps=self.advantage_eps)
        _not_negative(entropy_bonus=self.entropy_bonus)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    prompts: int
    """Prompts per optimizer step."""
    rollouts: int
    """Samples per prompt (the group of GRPO)."""
    experts: int
    """Demonstrations per optimizer step."""
    max_tokens: int = 8192
    """Token budget of one packed micro-batch on one data-parallel rank; a longer sample gets a micro-batch alone."""

    def __post_init__(self) -> None:
        _not_negative(**{"batch.prompts": self.prompts, "batch.experts": self.experts})
        _positive(**{"batch.max_tokens": self.max_tokens})
        _require(
            self.rollouts >= 2 or self.prompts == 0,
            f"batch.rollouts must be >= 2 (a group of one has no advantage), got {self.rollouts}",
        )
        _require(
            self.prompts + self.experts > 0, "batch.prompts and batch.experts are both 0: nothing to train on"
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    temperature: float = 1.0
    """Of sampling; the trainer divides its logits by the same number."""
    top_p: float = 1.0
    dtype: Literal["fp32", "bf16"] | None = None
    """Of the rollout server; the model's own where left out."""
    servers: tuple[str, ...] = ()
    """URLs of running vLLM servers (docs/running.md); when empty the trainer starts one on loopback."""
    tensor: int = 1
    """Tensor parallelism of the server the trainer starts."""
    gpu_memory_utilization: float = 0.6
    kv_cache_bytes: int | None = None
    """Size of the server's KV cache; on a CPU 256 MiB where left out, on a GPU what is free."""
    transport: Literal["auto", "file", "broadcast", "ipc"] = "auto"
    """How weights reach the server: shared-memory files, a process group (NCCL or gloo), CUDA IPC. Auto takes files
    without a GPU; with one, CUDA IPC to the trainer's own server and NCCL to those in `servers`."""
    start_timeout_s: float = 600.0
    request_timeout_s: float = 1800.0
    """Deadline of one step's sampling."""
    sync_timeout_s: float = 600.0
    restarts: int = 1
    """How often a dead server is replaced, and the step's sampling repeated, before the run stops."""
    max_logprob_gap: float | None = None
    """Largest mean |trainer - rollout| log-prob of a step's tokens; beyond it the run stops. Left out: 1e-3 in fp32,
    5e-2 in bf16."""

    def __post_init__(self) -> None:
        _positive(
            **{
                "rollout.temperature": self.temperature,
                "rollout.start_timeout_s": self.start_timeout_s,
                "rollout.request_timeout_s": self.request_timeout_s,
                "rollout.tensor": self.tensor,
                "rollout.sync_timeout_s": self.sync_timeout_s,
            }
        )
        _require(
            self.top_p == 1.0,
            f"rollout.top_p must be 1, got {self.top_p}: a cut distribution is not the policy that the loss describes",
        )
        _require(0 < self.gpu_memory_utilization <= 1, "rollout.gpu_memory_utilization must lie in (0, 1]")
        _not_negative(**{"rollout.restarts": self.restarts})
        if self.max_logprob_gap is not None:
            _positive(**{"rollout.max_logprob_gap": self.max_logprob_gap})
        if self.kv_cache_bytes is not None:
            _positive(**{"rollout.kv_cache_bytes": self.kv_cache_bytes})


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    kind: Literal["math", "exact"] = "math"
    """math: the last boxed answer (or number) against the truth with math-verify. exact: equal text after the last
    `answer_marker`."""
    answer_marker: str = "####"
    """For `exact`: the answer is what follows this, up to the line's end."""
    workers: int = 2
    timeout_s: float = 10.0
    """A grading that takes longer is killed and counted as an error, never as a wrong answer."""
    memory_mb: int = 2048
    """Address space of one worker."""
    max_error_rate: float = 0.1
    """Share of gradings that may fail in a step before the run stops."""

    def __post_init__(self) -> None:
        _positive(
            **{
                "reward.workers": self.workers,
                "reward.timeout_s": self.timeout_s,
                "reward.memory_mb": self.memory_mb,
            }
        )
        _require(
            0 <= self.max_error_rate < 1,
            f"reward.max_error_rate must lie in [0, 1), got {self.max_error_rate}",
        )
        _require(self.kind != "exact" or self.answer_marker != "", "reward.answer_marker is empty")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 1e-6
    min_lr: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    """Applied to matrices only, never to norms and biases."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _positive(**{"optim.lr": self.lr, "optim.eps": self.eps})
        for name, beta in {"optim.beta1": self.beta1, "optim.beta2": self.beta2}.items():
            _require(0 <= beta < 1, f"{name} must lie in [0, 1), got {beta}")
        _not_negative(
            **{
                "optim.min_lr": self.min_lr,
                "optim.warmup_steps": self.warmup_steps,
                "optim.weight_decay": self.weight_decay,
                "optim.clip_grad": self.clip_grad,
            }
        )
        _require(self.min_lr <= self.lr, f"optim.min_lr {self.min_lr} is above optim.lr {self.lr}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 0
    """Steps between evaluations; before the first and after the last step there is one as well. 0: only those two."""
    problems: int | None = None
    """The first so many held-out problems; all where left out."""
    temperature: float = 0.0
    samples: int = 1
    """Answers per problem; accuracy is their mean."""

    def __post_init__(self) -> None:
        _not_negative(**{"evaluation.every": self.every, "evaluation.temperature": self.temperature})
        _positive(**{"evaluation.samples": self.samples})
        _require(self.problems is None or self.problems > 0, "evaluation.problems must be > 0, or left out")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """How many of the newest to keep."""

    def __post_init__(self) -> None:
        _not_negative(**{"checkpoint.every": self.every})
        _positive(**{"checkpoint.keep": self.keep})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output: Path = field(metadata={"from_cwd": True})
    """Folder of the run: resolved config, metrics.jsonl, samples, TensorBoard, checkpoints, the exported policy."""
    steps: int
    """Optimizer steps of the whole run."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(steps=self.steps)
        _require(
            self.optim.warmup_steps < self.steps,
            f"optim.warmup_steps {self.optim.warmup_steps} leaves no step of the run's {self.steps} at full rate",
        )
        mu_can_be_positive = self.objective.mu.peak > 0 or (self.objective.mu.valley or 0) > 0
        if mu_can_be_positive:
            _require(self.data.experts is not None, "mu is above 0 but data.experts is not given")
            _require(self.batch.experts > 0, "mu is above 0 but batch.experts is 0")
        mu = self.objective.mu
        always_one = mu.peak == 1 and mu.valley in (None, 1) and mu.warmup_steps == 0
        _require(self.batch.prompts > 0 or always_one, "batch.prompts is 0 but mu is below 1")


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Data-parallel ranks of `world_size` processes; ValueError when the axes do not divide it."""
    product = parallel.tensor * parallel.pipeline * parallel.context
    _require(
        world_size % product == 0,
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = {product} "
        f"does not divide the {world_size} processes of this run",
    )
    return world_size // product
