"""The settings of an evaluation suite: benchmarks with files, sampling, reward and metrics (`megatron-chord evaluate`).

One frozen dataclass per YAML block, as in ``config``. Settings that a benchmark leaves out are taken from the suite.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_chord.config_checks import allowed_temperature, not_negative, positive, require
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.table import RewardConfig

METRIC = re.compile(r"(avg|pass|maj)@([1-9][0-9]*)")
"""Name of a metric: its kind and its number of answers."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    samples: int = 1
    """Number of answers to each problem."""
    temperature: float = 0.0
    """Sampling temperature, at most 2. 0: always the most likely token, so that all answers to a problem are the
    same."""
    top_p: float = 1.0
    """Nucleus sampling: only the most likely tokens whose probabilities add up to this are sampled. In (0, 1]."""
    max_tokens: int = 1024
    """Maximum number of tokens of an answer."""

    def __post_init__(self) -> None:
        positive(**{"sampling.samples": self.samples, "sampling.max_tokens": self.max_tokens})
        not_negative(**{"sampling.temperature": self.temperature})
        allowed_temperature(**{"sampling.temperature": self.temperature})
        require(0 < self.top_p <= 1, f"sampling.top_p must lie in (0, 1], got {self.top_p}")
        require(
            self.temperature > 0 or self.samples == 1,
            f"sampling.samples {self.samples} at temperature 0 would be the same answer {self.samples} times: set "
            "sampling.temperature, or samples to 1",
        )
        require(
            self.temperature > 0 or self.top_p == 1,
            "sampling.top_p has no effect at temperature 0; leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    name: str
    """Name of the benchmark in the results, such as aime24."""
    file: str
    """Problems with ground truths: a file, a folder of shards or a pattern (docs/data.md), relative to `data` of the
    suite."""
    fields: dict[str, str] = field(default_factory=dict[str, str])
    """Names of the columns that hold each field, as `fields` of a source in `data.prompts` of a run: {problem:
    question, answer: answer.value}."""
    category: str | None = None
    """Column with the category of a problem, such as subject. Accuracy is then also reported for each category."""
    prepare: str | None = None
    """Command that makes the file. It is shown if the file is missing."""
    system_prompt: str | None = None
    """System prompt for every conversation that has no system message. An empty text: none. Default: the suite's."""
    chat_template: Path | None = None
    """Jinja file that replaces the policy's own chat template. Default: the suite's."""
    max_prompt_tokens: int | None = None
    """Maximum number of tokens of a prompt. A longer prompt is an error, because leaving it out would change the
    benchmark. Default: the suite's."""
    sampling: SamplingConfig | None = None
    """How answers are sampled. Default: the suite's."""
    reward: RewardConfig | None = None
    """How an answer is graded. Default: the suite's."""
    metrics: tuple[str, ...] = ()
    """avg@K: mean grade of the first K answers. pass@K: probability that at least one of K answers is right. maj@K:
    probability that the most frequent of K answers is right. Default: avg@samples."""

    def __post_init__(self) -> None:
        require(
            _NAME.fullmatch(self.name) is not None,
            f"a benchmark's name has letters, digits, `_`, `-` and `.`, got {self.name!r}",
        )
        for metric in self.metrics:
            require(
                METRIC.fullmatch(metric) is not None,
                f"metrics of {self.name}: {metric!r} is none of avg@K, pass@K and maj@K, such as avg@32",
            )


@dataclass(frozen=True, kw_only=True)
class MeanConfig:
    """A mean over several benchmarks, such as the overall score of a leaderboard."""

    name: str
    """Name of the mean in the results, such as bfcl."""
    of: tuple[str, ...]
    """Names of the benchmarks that are averaged."""
    metric: str = "avg@1"
    """Metric of these benchmarks that is averaged."""
    weigh: Literal["problems", "benchmarks"] = "problems"
    """problems: every problem has the same weight. benchmarks: every benchmark has the same weight."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """vLLM servers that `megatron-chord evaluate` starts on this machine, or on each node of a Slurm job."""

    count: int | None = None
    """Number of servers of a machine. Default: as many as fit on the GPUs; one without a GPU."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Number format of weights and activations."""
    tensor: int = 1
    """Number of GPUs of one server (tensor parallelism)."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that a server uses, in (0, 1]."""
    kv_cache_bytes: int | None = None
    """Size of a server's KV cache. Default: 256 MiB on a CPU; on a GPU, all free memory within
    `gpu_memory_utilization`."""
    requests: int | None = None
    """Number of requests that a server gets at a time. Default: 256 with a GPU, 16 without."""
    request_s: float = 1800.0
    """Longest time of one request. After it the answer counts as missing, and the evaluation continues."""
    start_s: float = 1800.0
    """Longest time from the start of a server until it answers."""
    silence_s: float = 300.0
    """A server is frozen if it has requests but neither finishes one nor computes a token for this long."""
    restarts: int = 3
    """How many times servers are replaced before the evaluation stops. It keeps the answers that it has."""
    repeatable: bool = False
    """An answer does not depend on the other requests that the server processes at the same time, so that two
    evaluations are equal bit for bit. Sampling is slower."""

    def __post_init__(self) -> None:
        positive(
            **{
                "server.tensor": self.tensor,
                "server.request_s": self.request_s,
                "server.start_s": self.start_s,
                "server.silence_s": self.silence_s,
            }
        )
        not_negative(**{"server.restarts": self.restarts})
        optional = {
            "server.count": self.count,
            "server.requests": self.requests,
            "server.kv_cache_bytes": self.kv_cache_bytes,
        }
        positive(**{name: value for name, value in optional.items() if value is not None})
        require(0 < self.gpu_memory_utilization <= 1, "server.gpu_memory_utilization must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    benchmarks: tuple[BenchmarkConfig, ...]
    """The benchmarks that are evaluated, in the order of the tables."""
    means: tuple[MeanConfig, ...] = ()
    """Means over several benchmarks."""
    data: Path | None = None
    """Folder of the benchmarks' files. Default: the current folder."""
    system_prompt: str | None = None
    """System prompt for benchmarks that have none of their own."""
    chat_template: Path | None = None
    """Chat template for benchmarks that have none of their own. Default: the policy's own."""
    template_arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """Variables that the chat template reads, such as {enable_thinking: false}, as `data.template_arguments` of a
    run."""
    tools_as: Literal["auto", "system_message", "template"] | None = None
    """How a row's functions are shown to the policy, as `data.tools_as` of a run. Default: as in the run whose folder
    the policy is in; auto if it is in none."""
    max_prompt_tokens: int = 4096
    """Maximum number of tokens of a prompt, for benchmarks that have no limit of their own."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are sampled, for benchmarks without `sampling` of their own."""
    reward: RewardConfig = field(default_factory=MathReward)
    """How answers are graded, for benchmarks without a `reward` of their own."""
    server: ServerConfig = field(default_factory=ServerConfig)
    only: tuple[str, ...] = ()
    """Names of the benchmarks that are evaluated. Means that need other benchmarks are then left out. Default: all."""
    problems: int | None = None
    """For a trial: use at most this many problems of each benchmark, from the first on."""
    samples: int | None = None
    """For a trial: at most this many answers to each problem. Metrics over more answers are reduced: with 2, avg@32
    becomes avg@2."""
    max_tokens: int | None = None
    """For a trial: maximum number of tokens of an answer, if this is lower than the benchmark's own limit."""
    resamples: int = 2000
    """Number of bootstrap resamples of the problems. They give the 95 % intervals."""
    seed: int = 0
    """Seed of sampling and of the bootstrap. Every policy gets the same prompts with the same seeds."""

    def __post_init__(self) -> None:
        require(bool(self.benchmarks), "benchmarks is empty: nothing to evaluate")
        positive(resamples=self.resamples, max_prompt_tokens=self.max_prompt_tokens)
        trial = {"problems": self.problems, "samples": self.samples, "max_tokens": self.max_tokens}
        positive(**{name: value for name, value in trial.items() if value is not None})
        names = [item.name for item in (*self.benchmarks, *self.means)]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"two benchmarks or means have the same name: {', '.join(twice)}")
        listed = [item.name for item in self.benchmarks]
        for name in self.only:
            require(name in listed, f"only: there is no benchmark {name}, there are {', '.join(listed)}")
        metrics = {item.name: self._checked_metrics(item) for item in self.benchmarks}
        for mean in self.means:
            require(bool(mean.of), f"mean {mean.name}: `of` must name at least one benchmark")
            for name in mean.of:
                require(name in metrics, f"mean {mean.name}: there is no benchmark {name}")
                require(
                    mean.metric in metrics[name],
                    f"mean {mean.name}: {name} has no metric {mean.metric}, it has {', '.join(metrics[name])}",
                )

    def _checked_metrics(self, item: BenchmarkConfig) -> tuple[str, ...]:
        samples = (item.sampling or self.sampling).samples
        metrics = item.metrics or (f"avg@{samples}",)
        for metric in metrics:
            require(
                int(metric.partition("@")[2]) <= samples,
                f"benchmark {item.name}: {metric} needs more answers than sampling.samples, which is {samples}",
            )
        return metrics

    def resolved(self) -> tuple[BenchmarkConfig, ...]:
        """The benchmarks that are evaluated, with the suite's settings filled in and the limits of a trial applied."""
        return tuple(
            self._resolved(item) for item in self.benchmarks if not self.only or item.name in self.only
        )

    def requested_means(self) -> tuple[MeanConfig, ...]:
        """The means whose benchmarks are all evaluated."""
        return tuple(mean for mean in self.means if not self.only or set(mean.of) <= set(self.only))

    def metric_here(self, metric: str) -> str:
        """The name of the metric with the limits of a trial applied."""
        kind, _, k = metric.partition("@")
        return metric if self.samples is None else f"{kind}@{min(int(k), self.samples)}"

    def _resolved(self, item: BenchmarkConfig) -> BenchmarkConfig:
        sampling = item.sampling or self.sampling
        metrics = item.metrics or (f"avg@{sampling.samples}",)
        system_prompt = self.system_prompt if item.system_prompt is None else item.system_prompt
        return dataclasses.replace(
            item,
            file=os.path.normpath((self.data or Path()) / item.file),
            system_prompt=system_prompt or None,
            chat_template=item.chat_template or self.chat_template,
            max_prompt_tokens=item.max_prompt_tokens or self.max_prompt_tokens,
            sampling=dataclasses.replace(
                sampling,
                samples=min(sampling.samples, self.samples or sampling.samples),
                max_tokens=min(sampling.max_tokens, self.max_tokens or sampling.max_tokens),
            ),
            reward=item.reward or self.reward,
            metrics=tuple(dict.fromkeys(self.metric_here(metric) for metric in metrics)),
        )
