"""What an evaluation is: benchmarks with their files, sampling, reward and metrics (`megatron-chord evaluate`).

One frozen dataclass per YAML block, as in ``config``. What a benchmark leaves out is the suite's own.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_chord.config_checks import not_negative, positive, require
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.table import RewardConfig

METRIC = re.compile(r"(avg|pass|maj)@([1-9][0-9]*)")
"""Name of a metric: its kind, and of how many answers."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    samples: int = 1
    """Answers to each problem."""
    temperature: float = 0.0
    """Of sampling, at most 2; 0 takes the most likely token, and all answers of a problem are then the same."""
    top_p: float = 1.0
    """Only the most likely tokens whose probabilities add up to this are sampled, in (0, 1]."""
    max_tokens: int = 1024
    """Limit of an answer."""

    def __post_init__(self) -> None:
        positive(**{"sampling.samples": self.samples, "sampling.max_tokens": self.max_tokens})
        not_negative(**{"sampling.temperature": self.temperature})
        require(
            self.temperature <= 2,
            f"sampling.temperature must be <= 2, got {self.temperature}: vLLM refuses to sample at a higher one",
        )
        require(0 < self.top_p <= 1, f"sampling.top_p must lie in (0, 1], got {self.top_p}")
        require(
            self.temperature > 0 or self.samples == 1,
            f"sampling.samples {self.samples} at temperature 0 would be the same answer {self.samples} times: set "
            "sampling.temperature, or samples to 1",
        )
        require(
            self.temperature > 0 or self.top_p == 1,
            "sampling.top_p means nothing at temperature 0; leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    name: str
    """Of its results, such as aime24."""
    file: str
    """Problems with their truths: a file, a folder of shards or a pattern (docs/data.md), relative to the suite's
    `data`."""
    fields: dict[str, str] = field(default_factory=dict[str, str])
    """Where a row has what is read, as `data.prompt_fields` of a run: {problem: question, answer: answer.value}."""
    category: str | None = None
    """Field of a row with the problem's category, such as subject: accuracy is then also told by category."""
    prepare: str | None = None
    """Command that makes the file; named where the file is missing."""
    system_prompt: str | None = None
    """Put before every conversation without a system message. Left out: the suite's. An empty text: none."""
    chat_template: Path | None = None
    """Jinja file that replaces the policy's own chat template. Left out: the suite's."""
    max_prompt_tokens: int | None = None
    """Longest prompt; a longer one is an error, as without it the benchmark would be another one. Left out: the
    suite's."""
    sampling: SamplingConfig | None = None
    """Left out: the suite's."""
    reward: RewardConfig | None = None
    """How an answer is graded. Left out: the suite's."""
    metrics: tuple[str, ...] = ()
    """avg@K: mean grade of the first K answers. pass@K: probability that one of K answers is right. maj@K: probability
    that the truth wins the vote of K answers. Left out: avg@samples."""

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
    """A mean over benchmarks, such as the overall of a leaderboard."""

    name: str
    """Of its results, such as bfcl."""
    of: tuple[str, ...]
    """Names of benchmarks."""
    metric: str = "avg@1"
    """The metric of these benchmarks that is averaged."""
    weigh: Literal["problems", "benchmarks"] = "problems"
    """problems: every problem counts the same (instance-weighted). benchmarks: every benchmark does."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """vLLM servers that `megatron-chord evaluate` starts on this machine."""

    count: int | None = None
    """Servers. Left out: as many as the GPUs hold; without a GPU one."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations."""
    tensor: int = 1
    """GPUs of one server (tensor parallelism)."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that a server takes, in (0, 1]."""
    kv_cache_bytes: int | None = None
    """Size of a server's KV cache; on a CPU 256 MiB where left out, on a GPU what is free."""
    requests: int | None = None
    """Requests that a server gets at a time. Left out: 256; without a GPU 16."""
    request_s: float = 1800.0
    """Deadline of one request. The answer is then missing, and counted; the rest of the suite goes on."""
    start_s: float = 1800.0
    """From a server's start until it answers."""
    silence_s: float = 300.0
    """A server that has requests, and neither finishes one nor computes a token for so long, is frozen."""
    restarts: int = 3
    """How often servers are replaced before the evaluation stops. Answers so far are kept."""
    repeatable: bool = False
    """An answer does not depend on the other requests that the server processes: two evaluations are equal bit for
    bit. Slower."""

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
    """What is evaluated, in the order of the tables."""
    means: tuple[MeanConfig, ...] = ()
    """Means over several benchmarks."""
    data: Path | None = None
    """Folder of the benchmarks' files; the current one where left out."""
    system_prompt: str | None = None
    """Of benchmarks that leave theirs out."""
    chat_template: Path | None = None
    """Of benchmarks that leave theirs out; the policy's own where this is left out, too."""
    template_arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """Variables that the chat template reads, such as {enable_thinking: false}, as `data.template_arguments` of a
    run."""
    tools_as: Literal["auto", "system_message", "template"] | None = None
    """Who shows a row's functions, as `data.tools_as` of a run. Left out: as in the run that the policy lies in; auto
    where it lies in none."""
    max_prompt_tokens: int = 4096
    """Of benchmarks that leave theirs out."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=MathReward)
    server: ServerConfig = field(default_factory=ServerConfig)
    only: tuple[str, ...] = ()
    """Names of the benchmarks that are asked. Left out: all. Means over others are not taken."""
    problems: int | None = None
    """For a trial: at most the first so many problems of each benchmark."""
    samples: int | None = None
    """For a trial: at most so many answers to each problem. A metric with a larger k gets this one: avg@32 is avg@2."""
    max_tokens: int | None = None
    """For a trial: limit of an answer, where it is lower than the benchmark's."""
    resamples: int = 2000
    """How often the bootstrap draws the problems again; the intervals hold 95 % of the means."""
    seed: int = 0
    """Of sampling and of the bootstrap. Every policy gets the same prompts with the same seeds."""

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
            require(bool(mean.of), f"mean {mean.name}: `of` names no benchmark")
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
        """The benchmarks that are asked, with everything that they leave out, and with the limits of a trial."""
        return tuple(
            self._resolved(item) for item in self.benchmarks if not self.only or item.name in self.only
        )

    def asked_means(self) -> tuple[MeanConfig, ...]:
        """The means all of whose benchmarks are asked."""
        return tuple(mean for mean in self.means if not self.only or set(mean.of) <= set(self.only))

    def metric_here(self, metric: str) -> str:
        """The metric under the limits of a trial."""
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
