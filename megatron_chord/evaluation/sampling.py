"""Samples and grades the answers to all problems, and writes them to disk. A free server takes the next request."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_chord.config_suite import BenchmarkConfig, ServerConfig
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.evaluation.answers import Answer, AnswerFile, grading_of
from megatron_chord.evaluation.servers import Servers
from megatron_chord.records import Grade, Prompt, Rollout
from megatron_chord.rewards.graders import Graders
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import RewardConfig
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.replies import GenerateRequest, RolloutError
from megatron_chord.rollout.server import ServerError
from megatron_chord.sampling.rounds import response_of

_REQUESTS_GPU, _REQUESTS_CPU = 256, 16
_LOOK_S = 0.2
_SAY_S = 20.0
"""Seconds between two lines about the progress if the output is not a terminal."""
_GRADED_TOGETHER = 256


@dataclass(frozen=True, kw_only=True)
class Question:
    """One answer to sample."""

    benchmark: BenchmarkConfig
    """The benchmark, with the settings that it takes from the suite."""
    prompt: Prompt
    template: ChatTemplate
    sample: int
    request: GenerateRequest
    key: str


class SuiteGraders:
    """The grader processes of each reward of a suite, started when they are first needed."""

    def __init__(self) -> None:
        self._graders: dict[str, Graders] = {}
        self._marks: dict[str, str] = {}
        self._lock = threading.Lock()

    def grade(self, reward: RewardConfig, responses: Sequence[Response]) -> list[Grade]:
        """Grades in the order of ``responses``. May be called from any thread."""
        return self.start(reward).grade_all(responses) if responses else []

    def mark(self, benchmark: BenchmarkConfig) -> str:
        """The value of ``grading_of`` at the first call. Grader processes keep the code that they started with."""
        with self._lock:
            if benchmark.name not in self._marks:
                self._marks[benchmark.name] = grading_of(benchmark)
            return self._marks[benchmark.name]

    def start(self, reward: RewardConfig) -> Graders:
        """Start the grader processes of a reward. Raises RuntimeError if they do not start."""
        name = repr(reward)
        with self._lock:
            if name not in self._graders:
                self._graders[name] = Graders(reward)
            return self._graders[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for graders in self._graders.values():
            graders.close()


def sample_answers(
    questions: Sequence[Question],
    servers: Servers,
    settings: ServerConfig,
    *,
    files: Mapping[str, AnswerFile],
    graders: SuiteGraders,
    meter: Meter,
) -> int:
    """Sample and grade the answers to all questions, and write them into ``files``, by benchmark.

    A server that fails is replaced, at most ``settings.restarts`` times.

    Returns:
        the number of answers that are missing because their requests exceeded the time limit.

    Raises:
        RolloutError, ServerError: servers failed more often. The answers so far are in ``files``.
    """
    for question in questions:
        assert question.benchmark.reward is not None
        graders.mark(question.benchmark)
        graders.start(question.benchmark.reward)
    left = dict(enumerate(questions))
    late: set[int] = set()
    restarts = settings.restarts
    with _Grading(files, graders, meter) as grading:
        while left:
            try:
                _sample_once(left, late, servers, settings, grading)
            except (RolloutError, ServerError) as error:
                if restarts == 0:
                    raise
                restarts -= 1
                meter.say(f"{error}\nsampling the missing answers again, {restarts} restarts left")
    return len(late)


def _sample_once(
    left: dict[int, Question], late: set[int], servers: Servers, settings: ServerConfig, grading: _Grading
) -> None:
    """One attempt. Removes the answered questions from ``left``, and moves those that took too long to ``late``."""
    clients = servers.connect()
    grading.meter.begin()
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in left:
        waiting.put(number)

    has_failed = threading.Event()

    def take() -> tuple[int, GenerateRequest] | None:
        if grading.failure is not None or has_failed.is_set():
            return None
        try:
            number = waiting.get_nowait()
        except queue.Empty:
            return None
        return number, left[number].request

    def on_answer(number: int, rollouts: tuple[Rollout, ...] | None) -> None:
        question = left[number]
        if rollouts is None:
            late.add(number)
            grading.skip()
        else:
            grading.put(question, rollouts[0])
        del left[number]

    per_server = settings.requests or (_REQUESTS_GPU if torch.cuda.is_available() else _REQUESTS_CPU)

    def serve(client: RolloutClient) -> None:
        client.generate_each(
            take,
            version=servers.version,
            at_once=per_server,
            deadline_s=settings.request_s,
            on_answer=on_answer,
        )

    with ThreadPoolExecutor(len(clients)) as pool:
        served = [pool.submit(serve, client) for client in clients]
        try:
            _await(served)
        finally:
            if not all(future.done() for future in served):
                has_failed.set()
                for client in clients:
                    client.cancel()
    grading.check()


def _await(futures: Sequence[Future[None]]) -> None:
    """Wait until all are done. Raises the first exception at once. The wait is interrupted regularly to handle
    signals."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_LOOK_S, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


class _Grading:
    """A thread that grades answers as they come and puts them into their files."""

    def __init__(self, files: Mapping[str, AnswerFile], graders: SuiteGraders, meter: Meter) -> None:
        self.failure: Exception | None = None
        self._files = files
        self._graders = graders
        self.meter = meter
        self._queue: queue.SimpleQueue[tuple[Question, Rollout] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="grading", daemon=True)

    def put(self, question: Question, rollout: Rollout) -> None:
        self._queue.put((question, rollout))

    def skip(self) -> None:
        self.meter.advance(0)

    def check(self) -> None:
        """Raise the exception that ended the thread, if there is one."""
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self.check()

    def _run(self) -> None:
        ended = False
        try:
            while not ended:
                batch = [self._queue.get()]
                while len(batch) < _GRADED_TOGETHER and not self._queue.empty():
                    batch.append(self._queue.get())
                ended = None in batch
                self._grade([item for item in batch if item is not None])
        except Exception as error:  # ``check`` raises it in the caller's thread
            self.failure = error

    def _grade(self, batch: Sequence[tuple[Question, Rollout]]) -> None:
        groups: dict[str, list[tuple[Question, Rollout]]] = defaultdict(list)
        for question, rollout in batch:
            groups[question.benchmark.name].append((question, rollout))
        for name, group in groups.items():
            reward = group[0][0].benchmark.reward
            assert reward is not None
            texts = [
                question.template.turn(question.prompt.token_ids, rollout.token_ids)
                for question, rollout in group
            ]
            responses = [
                response_of(question.prompt, text, rollout.finish_reason, len(rollout.token_ids))
                for text, (question, rollout) in zip(texts, group, strict=True)
            ]
            mark = self._graders.mark(group[0][0].benchmark)
            grades = self._graders.grade(reward, responses)
            self._files[name].add(
                [
                    _answer(question, rollout, text, grade, mark)
                    for (question, rollout), text, grade in zip(group, texts, grades, strict=True)
                ]
            )
        for _, rollout in batch:
            self.meter.advance(len(rollout.token_ids))


def _answer(question: Question, rollout: Rollout, text: str, grade: Grade, mark: str) -> Answer:
    return Answer(
        key=question.key,
        problem=question.prompt.id,
        sample=question.sample,
        response=text,
        tokens=len(rollout.token_ids),
        finish_reason=rollout.finish_reason,
        score=grade.score,
        error=grade.error,
        graded_by=mark,
    )


def grade_again(
    answers: Sequence[tuple[Answer, Prompt]], benchmark: BenchmarkConfig, graders: SuiteGraders
) -> list[Answer]:
    """Grade answers again that were graded with other settings or other code than those of the benchmark."""
    assert benchmark.reward is not None
    responses = [
        response_of(prompt, answer.response, answer.finish_reason, answer.tokens)
        for answer, prompt in answers
    ]
    mark = graders.mark(benchmark)
    grades = graders.grade(benchmark.reward, responses)
    return [
        replace(answer, score=grade.score, error=grade.error, graded_by=mark)
        for (answer, _), grade in zip(answers, grades, strict=True)
    ]


class Meter:
    """Context manager that shows progress and rate: a bar on a terminal, otherwise a line at intervals."""

    def __init__(self, total: int, kept: int, say: Callable[[str], None]) -> None:
        """
        Args:
            total: number of answers of the whole suite.
            kept: number of these that exist already.
        """
        self.say = say
        self._total, self._kept, self._done, self._tokens = total, kept, 0, 0
        self._begun: float | None = None
        self._said = time.monotonic()
        self._lock = threading.Lock()
        console = Console()
        self._bar = Progress(
            TextColumn("answers"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._is_terminal = console.is_terminal
        self._task = self._bar.add_task("", total=total, completed=kept)

    def begin(self) -> None:
        """Start to measure the rate, because the servers are ready."""
        self._begun = self._begun or time.monotonic()

    def advance(self, tokens: int) -> None:
        """Count one more answer with this number of tokens. May be called from any thread."""
        with self._lock:
            self._done += 1
            self._tokens += tokens
            now = time.monotonic()
            text = self.rate(now)
            self._bar.update(self._task, advance=1, description=text)
            if not self._is_terminal and now - self._said > _SAY_S:
                self._said = now
                self.say(f"{self._kept + self._done} of {self._total} answers, {text}")

    def rate(self, now: float | None = None) -> str:
        now = now or time.monotonic()
        seconds = max(1e-9, now - (self._begun or now))
        return f"{self._done / seconds:.1f} answers/s, {self._tokens / seconds:.0f} tokens/s"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
