"""`megatron-chord evaluate`: a policy answers a suite's benchmarks, and the results are written to files."""

from __future__ import annotations

import contextlib
import glob
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_chord.config_io import dump_config
from megatron_chord.config_suite import BenchmarkConfig, SuiteConfig
from megatron_chord.data.layouts import at_path
from megatron_chord.data.prompts import load_prompts
from megatron_chord.data.rows import Row, RowError, parse_rows
from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.evaluation import results as found_results
from megatron_chord.evaluation.answers import SAMPLES, Answer, AnswerFile, key_of
from megatron_chord.evaluation.policy import Policy, label_of, open_policy
from megatron_chord.evaluation.sampling import Meter, Question, SuiteGraders, grade_again, sample_answers
from megatron_chord.evaluation.servers import ListedServers, Servers, own_servers, servers_of_job
from megatron_chord.evaluation.votes import KINDS, stated_answer, to_compare, votes_of
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.files import lock_if_possible
from megatron_chord.records import Prompt
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import check_sources, needs_of
from megatron_chord.rollout.registry import JobNodes
from megatron_chord.rollout.replies import GenerateRequest
from megatron_chord.sampling.rounds import sample_seed
from megatron_chord.weights.folder import check_copies, open_model

SUITE, LOGS = "suite.yaml", "logs"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A benchmark with its problems."""

    benchmark: BenchmarkConfig
    template: ChatTemplate
    prompts: Sequence[Prompt]
    category_of: Mapping[str, str]
    report: str


def evaluate(
    source: Path,
    suite: SuiteConfig,
    *,
    suite_name: str,
    output: Path,
    servers: Sequence[str] = (),
    server_key: str = "",
    job: JobNodes | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate the policy at ``source`` on ``suite``, and write the results to ``output``.

    Answers that are already in ``output`` are kept if request and weights are the same. Main thread only.

    Args:
        servers: URLs of running servers, which get the policy's weights. Empty: servers are started here.
        server_key: the API key of these servers.
        job: the Slurm job whose nodes start the servers, instead of this process.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: a file is missing, or the policy, the data or the settings cannot be used. Nothing was sampled.
        RolloutError, ServerError: the servers failed too often. The answers so far are kept.
    """
    check_suite(suite)
    with _claimed(output, say):
        policy = open_policy(source, output, say)
        shape = read_shape(policy.folder)
        check_copies(open_model(policy.folder, shape.weights), shape.weights)
        loaded = load_suite_data(policy, suite, shape)
        (output / SUITE).write_text(dump_config(suite), encoding="utf-8")
        for item in loaded:
            say(item.report)
        questions = [question for item in loaded for question in _questions(item, policy, suite)]
        with contextlib.ExitStack() as stack:
            files = {
                item.benchmark.name: stack.enter_context(
                    AnswerFile(output / SAMPLES / f"{item.benchmark.name}.jsonl")
                )
                for item in loaded
            }
            graders = stack.enter_context(SuiteGraders())
            missing = [q for q in questions if q.key not in files[q.benchmark.name].by_key]
            _report_kept(files, questions, missing, say)
            if missing:
                reserve = _servers(policy, suite, shape, output, servers, server_key, job, say)
                stack.callback(reserve.close)
                meter = stack.enter_context(Meter(len(questions), len(questions) - len(missing), say))
                late = sample_answers(
                    missing, reserve, suite.server, files=files, graders=graders, meter=meter
                )
                say(f"{len(missing) - late} answers, {meter.rate()}")
            results = _results(policy, suite, suite_name, loaded, questions, files, graders)
        found_results.write(output, *results)
        if policy.was_converted and not any(item["missing"] for item in results[0]["benchmarks"].values()):
            shutil.rmtree(policy.folder)
        return results[0]


def check_suite(suite: SuiteConfig) -> None:
    """Raises ValueError with all missing files, and all metrics that are impossible with a benchmark's reward."""
    findings: list[str] = []
    for item in suite.resolved():
        assert item.reward is not None
        if not (Path(item.file).exists() or glob.glob(item.file)):
            how = f": make it with `{item.prepare}`" if item.prepare else ""
            findings.append(f"{item.name}: {item.file} does not exist{how}")
        votes = [metric for metric in item.metrics if metric.startswith("maj@")]
        if votes and item.reward.kind not in KINDS:
            findings.append(
                f"{item.name}: {votes[0]} needs a reward whose answers can be compared with each other "
                f"({', '.join(KINDS)}), not {item.reward.kind}"
            )
    if findings:
        place = (
            f"\nThe suite's files must be in {suite.data or Path.cwd()}. data=FOLDER chooses another folder."
        )
        raise ValueError(
            "\n".join(findings) + (place if any("not exist" in text for text in findings) else "")
        )


def load_suite_data(policy: Policy, suite: SuiteConfig, shape: ModelShape) -> list[Loaded]:
    """The problems of all benchmarks, as the policy reads them.

    Raises:
        ValueError: faulty rows, too long prompts, or lengths beyond the model's positions.
    """
    templates: dict[tuple[Path | None, str | None], ChatTemplate] = {}
    loaded: list[Loaded] = []
    for item in suite.resolved():
        assert item.sampling is not None
        assert item.max_prompt_tokens is not None
        reward = item.reward
        assert reward is not None
        check_sources(reward, [item.name])
        longest = item.max_prompt_tokens + item.sampling.max_tokens
        if longest > shape.max_positions:
            raise ValueError(
                f"{item.name}: max_prompt_tokens {item.max_prompt_tokens} + sampling.max_tokens "
                f"{item.sampling.max_tokens} = {longest} is more than the policy's {shape.max_positions} positions"
            )
        style = (item.chat_template or policy.chat_template, item.system_prompt)
        if style not in templates:
            templates[style] = load_template(
                policy.folder,
                chat_template=style[0],
                arguments={**policy.template_arguments, **suite.template_arguments},
                system_prompt=style[1],
                vocab_size=shape.vocab_size,
                tools_as=suite.tools_as or policy.tools_as,
            )
        prompts, report = load_prompts(
            Path(item.file),
            templates[style],
            max_prompt_tokens=item.max_prompt_tokens,
            overlong="fail",
            fields=item.fields,
            source=item.name,
            needs=partial(needs_of, reward),
        )
        templates[style].renderer.stop_processes()
        kept = prompts[: suite.problems]
        loaded.append(
            Loaded(
                benchmark=item,
                template=templates[style],
                prompts=kept,
                category_of={} if item.category is None else _categories(item, prompts),
                report=f"{item.name}: {report}; {len(kept)} problems x {item.sampling.samples} answers",
            )
        )
    return loaded


def _categories(item: BenchmarkConfig, prompts: Sequence[Prompt]) -> dict[str, str]:
    """The category of each problem, by its id. The rows of the file are the problems, in order."""

    def parse(row: Row) -> str:
        assert item.category is not None
        value = at_path(row.fields, item.category)
        if isinstance(value, dict | list):
            raise RowError(f"`{item.category}` (category of {item.name}) is not a single value")
        return str(value)

    categories = parse_rows(Path(item.file), parse)
    return {prompt.id: category for prompt, category in zip(prompts, categories, strict=True)}


def _questions(item: Loaded, policy: Policy, suite: SuiteConfig) -> Iterator[Question]:
    sampling = item.benchmark.sampling
    assert sampling is not None
    for prompt, sample in itertools.product(item.prompts, range(sampling.samples)):
        request = GenerateRequest(
            prompt_ids=prompt.token_ids,
            num_rollouts=1,
            seed=sample_seed(suite.seed, f"{item.benchmark.name}/{prompt.id}", sample),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=item.template.stop_token_ids,
        )
        yield Question(
            benchmark=item.benchmark,
            prompt=prompt,
            template=item.template,
            sample=sample,
            request=request,
            key=key_of(policy.digest, suite.server.dtype, request),
        )


def _servers(
    policy: Policy,
    suite: SuiteConfig,
    shape: ModelShape,
    output: Path,
    urls: Sequence[str],
    key: str,
    job: JobNodes | None,
    say: Callable[[str], None],
) -> Servers:
    settings = suite.server
    if urls:
        return ListedServers(
            urls, key, policy.folder, shape, silence_s=settings.silence_s, push_s=settings.start_s
        )
    longest = max(
        (item.max_prompt_tokens or 0) + item.sampling.max_tokens
        for item in suite.resolved()
        if item.sampling is not None
    )
    if job is not None:
        return servers_of_job(job, policy.folder, settings, max_model_len=longest, say=say)
    return own_servers(policy.folder, settings, max_model_len=longest, logs=output / LOGS, say=say)


def _report_kept(
    files: Mapping[str, AnswerFile],
    questions: Sequence[Question],
    missing: Sequence[Question],
    say: Callable[[str], None],
) -> None:
    kept = len(questions) - len(missing)
    other = sum(len(file.by_key) for file in files.values()) - kept
    if kept:
        say(f"{kept} of {len(questions)} answers exist already")
    if other:
        say(f"{other} kept answers are not used, because they have another policy or other sampling settings")


def _results(
    policy: Policy,
    suite: SuiteConfig,
    suite_name: str,
    loaded: Sequence[Loaded],
    questions: Sequence[Question],
    files: Mapping[str, AnswerFile],
    graders: SuiteGraders,
) -> tuple[dict[str, Any], list[found_results.ProblemResult]]:
    problems: list[found_results.ProblemResult] = []
    benchmarks: dict[str, Any] = {}
    for item in loaded:
        mine = [question for question in questions if question.benchmark.name == item.benchmark.name]
        _grade_again_where_needed(item, mine, files[item.benchmark.name], graders)
        by_key = files[item.benchmark.name].by_key
        answers: dict[str, list[Answer]] = {prompt.id: [] for prompt in item.prompts}
        for question in mine:
            if question.key in by_key:
                answers[question.prompt.id].append(by_key[question.key])
        votes = _votes(item.benchmark, answers, graders)
        here = [
            found_results.problem_result(
                item.benchmark,
                prompt,
                item.category_of.get(prompt.id),
                answers[prompt.id],
                votes[prompt.id],
            )
            for prompt in item.prompts
        ]
        benchmarks[item.benchmark.name] = found_results.benchmark_result(
            item.benchmark,
            here,
            [answer for group in answers.values() for answer in group],
            resamples=suite.resamples,
            seed=suite.seed,
        )
        problems += here
    results: dict[str, Any] = {
        "suite": suite_name,
        "policy": {
            "name": label_of(policy.source),
            "path": str(policy.source.resolve()),
            "digest": policy.digest,
        },
        "seed": suite.seed,
        "benchmarks": benchmarks,
        "means": found_results.means(suite, problems),
    }
    return results | {"row": found_results.row_of(results)}, problems


def _grade_again_where_needed(
    item: Loaded, questions: Sequence[Question], file: AnswerFile, graders: SuiteGraders
) -> None:
    """Grade kept answers again that were graded with other settings or other code."""
    mark = graders.mark(item.benchmark)
    stale = [
        (answer, question.prompt)
        for question in questions
        if (answer := file.by_key.get(question.key)) is not None and answer.graded_by != mark
    ]
    if stale:
        file.add(grade_again(stale, item.benchmark, graders))


def _votes(
    benchmark: BenchmarkConfig, answers: Mapping[str, Sequence[Answer]], graders: SuiteGraders
) -> dict[str, list[int | None]]:
    """For each problem the votes of the answers that have a score. Empty if no metric needs votes."""
    scored = {
        problem: [(answer, answer.score) for answer in group if answer.score is not None]
        for problem, group in answers.items()
    }
    if not any(metric.startswith("maj@") for metric in benchmark.metrics):
        return {problem: [None] * len(group) for problem, group in scored.items()}
    reward = benchmark.reward
    assert reward is not None
    scores = {problem: [score for _, score in group] for problem, group in scored.items()}
    stated = {
        problem: [stated_answer(answer.response, reward) for answer, _ in group]
        for problem, group in scored.items()
    }
    pairs = [(problem, pair) for problem in scored for pair in to_compare(scores[problem], stated[problem])]
    grades = graders.grade(
        reward,
        [
            Response(
                text=scored[problem][i][0].response, truth=stated[problem][j] or "", source=benchmark.name
            )
            for problem, (i, j) in pairs
        ],
    )
    equal: dict[str, list[tuple[int, int]]] = {problem: [] for problem in scored}
    for (problem, pair), grade in zip(pairs, grades, strict=True):
        if grade.score is not None and grade.score >= 1:
            equal[problem].append(pair)
    return {problem: votes_of(scores[problem], stated[problem], equal[problem]) for problem in scored}


@contextlib.contextmanager
def _claimed(output: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock the folder of an evaluation. ``say`` gets a line if the file system has no locks.

    Raises:
        ValueError: another process is writing to it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            if not lock_if_possible(lock.fileno()):
                say(f"{output} has no file locks: a second evaluation that writes there is not noticed")
        except BlockingIOError:
            raise ValueError(f"another evaluation is writing to {output}") from None
        yield
