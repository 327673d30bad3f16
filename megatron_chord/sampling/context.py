"""The service through which a method gets its data in a step: prompts, demonstrations, graded rollouts.

It is used on the coordinator only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_chord.config import BatchConfig, DataConfig, ObjectiveConfig, RunConfig
from megatron_chord.data.cursor import Cursor
from megatron_chord.data.mixed_cursor import MixedCursor
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.records import Demonstration, Grade, GradedRollouts, Prompt, Rollout, RolloutRequest
from megatron_chord.rewards.format import shape_reward
from megatron_chord.rewards.graders import Graders
from megatron_chord.rewards.overlong import overlong_penalty
from megatron_chord.rewards.table import RewardConfig, terms_of
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.routes import RouteShape
from megatron_chord.sampling.recorded import SamplingRound, answers_to, rollout_json, rollout_of
from megatron_chord.sampling.rounds import Grading, Sampling, graded_before, sample, sample_seed
from megatron_chord.schedules import ScheduleInput
from megatron_chord.timing import Timer


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The data of a run and the positions of its cursors. Immutable: drawing makes a new ``Sources``."""

    prompts: Sequence[Prompt]
    demonstrations: Sequence[Demonstration]
    demonstration_of: Mapping[str, Demonstration]
    """The prompts' own demonstrations, by prompt id. With ``data.aligned`` every prompt has one."""
    prompt_cursor: Cursor | MixedCursor
    demonstration_cursor: Cursor | MixedCursor | None
    unfinished: tuple[DrawnPrompt, ...] = ()
    """Prompts drawn earlier whose sampling was stopped. They are sampled again before any new prompt is drawn."""


@dataclass(frozen=True, kw_only=True)
class DrawnPrompt:
    """A prompt with its position in the endless order of prompts. Its sampling seed is a function of the position."""

    prompt: Prompt
    position: int
    partial_rollouts: tuple[Rollout, ...] = ()
    """The finished and unfinished rollouts that exist because its sampling was stopped. Empty if nothing was sampled
    yet."""
    num_stops: int = 0
    """Number of times its sampling was stopped."""


@dataclass(frozen=True, kw_only=True)
class SamplingServices:
    """The clients and graders that a step samples and grades with."""

    clients: Sequence[RolloutClient]
    """One client for each rollout server. Empty in a step that samples nothing."""
    version: int
    """Version of the weights on the rollout servers."""
    template: ChatTemplate
    graders: Graders
    may_advance: bool = False
    """True if newer weights may be pushed to the servers while they sample."""
    routes: RouteShape | None = None
    """The shape of the rollouts' routes; None without router replay."""
    check: Callable[[], None] = lambda: None
    """Called about every second while the step is sampled or graded. Its exception ends the step's collection."""


def unfinished_to_json(sources: Sources) -> list[dict[str, Any]]:
    """The prompts whose sampling was stopped, for a checkpoint (plain JSON, but for ``rollout_json``)."""
    return [
        {
            "prompt": item.prompt.id,
            "position": item.position,
            "partial_rollouts": list(map(rollout_json, item.partial_rollouts)),
            "num_stops": item.num_stops,
        }
        for item in sources.unfinished
    ]


def with_unfinished(sources: Sources, saved: Sequence[Mapping[str, Any]], *, keep: bool) -> Sources:
    """``sources`` with the unfinished prompts that ``unfinished_to_json`` wrote.

    ``keep`` says whether their partial rollouts are kept; otherwise the prompts are sampled from the beginning.
    """
    return replace(
        sources,
        unfinished=tuple(
            DrawnPrompt(
                prompt=sources.prompts[sources.prompt_cursor.index_at(item["position"])],
                position=item["position"],
                partial_rollouts=tuple(map(rollout_of, item["partial_rollouts"])) if keep else (),
                num_stops=item["num_stops"] if keep else 0,
            )
            for item in saved
        ),
    )


class StepContext:
    """Draws, samples and grades for one step. Holds the advanced cursors and, for the log, all rollouts of the step.

    Methods read the run's settings from ``batch``, ``data``, ``objective``, ``seed`` and ``num_steps``.
    """

    def __init__(
        self,
        run: RunConfig,
        services: SamplingServices,
        sources: Sources,
        *,
        now: ScheduleInput,
        memory: Any,
        timer: Timer,
        notify: Callable[[str], None],
        recorded: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """``recorded`` is this step's sampling rounds from a checkpoint. With it nothing is sampled or graded."""
        self.now = now
        self.memory = memory
        """``Collected.memory`` of the previous step; None in the first step."""
        self.sources = sources
        self.graded: list[GradedRollouts] = []
        """All finished rollouts of the step, whether they are used or not."""
        self.stopped: list[DrawnPrompt] = []
        """Prompts whose sampling was stopped in this step, and which this step did not continue."""
        self.num_continued = 0
        """Number of prompts in ``graded`` whose sampling began in an earlier step."""
        self.rounds: list[SamplingRound] = []
        """All sampling rounds of the step, in order. A checkpoint saves them as ``recorded``."""
        self._recorded = None if recorded is None else list(recorded)
        self._run = run
        self._services = services
        self._timer = timer
        self._notify = notify

    @property
    def batch(self) -> BatchConfig:
        return self._run.batch

    @property
    def data(self) -> DataConfig:
        return self._run.data

    @property
    def objective(self) -> ObjectiveConfig:
        """As in the run's file. ``Method.terms`` gets it with its defaults filled in."""
        return self._run.objective

    @property
    def seed(self) -> int:
        return self._run.seed

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole run."""
        return self._run.steps

    @property
    def template(self) -> ChatTemplate:
        return self._services.template

    @property
    def version(self) -> int:
        return self._services.version

    def has_more_recorded(self) -> bool:
        """True if recorded sampling rounds are left that were not requested yet."""
        return bool(self._recorded)

    def prompts(self, count: int) -> list[DrawnPrompt]:
        """Draw the next ``count`` prompts."""
        cursor = self.sources.prompt_cursor
        indices, after = cursor.take(count)
        self.sources = replace(self.sources, prompt_cursor=after)
        return [
            DrawnPrompt(prompt=self.sources.prompts[index], position=cursor.position + offset)
            for offset, index in enumerate(indices)
        ]

    def demonstrations(self, count: int) -> list[Demonstration]:
        """Draw the next ``count`` demonstrations of ``data.demonstrations``."""
        cursor = self.sources.demonstration_cursor
        if cursor is None or count == 0:
            return []
        indices, after = cursor.take(count)
        self.sources = replace(self.sources, demonstration_cursor=after)
        return [self.sources.demonstrations[index] for index in indices]

    def demonstration(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of the prompt's own demonstration, including the stop token. Needs ``data.aligned``."""
        return response_ids(self.sources.demonstration_of[prompt.id], prompt)

    def groups(self, count: int, *, num_rollouts: int) -> list[tuple[DrawnPrompt, GradedRollouts]]:
        """Draw the next ``count`` prompts, and sample and grade ``num_rollouts`` rollouts of each.

        With ``rollout.partial`` more than ``count`` prompts are sampled. Sampling stops when ``count`` are complete,
        and these are returned in the order in which they were drawn. Prompts whose sampling was stopped in an earlier
        step are continued first.
        """
        run, waiting = self._run, self.sources.unfinished
        total = count + run.rollout.extra_of(count)
        asked = [*waiting[:total], *self.prompts(max(0, total - len(waiting)))]
        self.sources = replace(self.sources, unfinished=waiting[total:])
        if other := {len(item.partial_rollouts) for item in asked} - {0, num_rollouts}:
            raise ValueError(
                f"unfinished prompts have {other.pop()} rollouts each, but {num_rollouts} are requested"
            )
        requests = [
            RolloutRequest(
                prompt=item.prompt,
                seed=sample_seed(run.seed, "rollout", item.position),
                partial_rollouts=item.partial_rollouts,
                is_awaited=run.rollout.max_carries is not None and item.num_stops >= run.rollout.max_carries,
            )
            for item in asked
        ]
        sampling = self._sampling(num_rollouts)
        graded = self._answered(
            requests,
            sampling,
            lambda grading: self._sample(
                requests, sampling, grading, stop_after=count if total > count else None
            ),
            max_error_rate=run.reward.max_error_rate,
            count=count,
        )
        self._put_back(
            [
                replace(asked[i], partial_rollouts=partial, num_stops=asked[i].num_stops + 1)
                for i, partial in enumerate(self.rounds[-1].sampled)
                if i not in graded
            ]
        )
        self.graded += graded.values()
        self.num_continued += sum(bool(asked[i].partial_rollouts) for i in graded)
        return [
            (replace(asked[i], partial_rollouts=(), num_stops=0), answers) for i, answers in graded.items()
        ]

    def _put_back(self, left: Sequence[DrawnPrompt]) -> None:
        """Put stopped prompts back into ``sources.unfinished``, ordered by their position: the oldest comes first."""
        if self._run.rollout.carries:
            self.sources = replace(self.sources, unfinished=(*left, *self.sources.unfinished))
            self.stopped = list(self.sources.unfinished)
        else:
            self.stopped += left

    def rollouts(
        self,
        drawn: Sequence[DrawnPrompt],
        *,
        num_rollouts: int,
        attempt: str = "",
        prefixes: Sequence[tuple[int, ...]] | None = None,
    ) -> list[GradedRollouts]:
        """Sample and grade ``num_rollouts`` rollouts of every prompt.

        Args:
            attempt: a name for this sampling of the prompts. Samplings with different names have different seeds.
            prefixes: for each prompt the token ids with which all of its answers begin.
        """
        run = self._run
        name = f"rollout/{attempt}" if attempt else "rollout"
        requests = [
            RolloutRequest(
                prompt=item.prompt,
                seed=sample_seed(run.seed, name, item.position),
                prefix=prefixes[index] if prefixes is not None else (),
            )
            for index, item in enumerate(drawn)
        ]
        sampling = self._sampling(num_rollouts)
        graded = self._answered(
            requests,
            sampling,
            lambda grading: self._sample(requests, sampling, grading),
            max_error_rate=run.reward.max_error_rate,
        )
        self.graded += graded.values()
        return list(graded.values())

    def graded_demonstrations(self, drawn: Sequence[DrawnPrompt]) -> list[GradedRollouts]:
        """Grade every prompt's own demonstration like a rollout of the policy. It has no log-probs.

        Any number of these gradings may fail; the method decides what to do with a demonstration without a grade.
        """
        requests = [RolloutRequest(prompt=item.prompt, seed=0) for item in drawn]
        answers = [
            (
                Rollout(
                    token_ids=self.demonstration(item.prompt),
                    logprobs=(),
                    finish_reason="stop",
                    weight_version=self.version,
                ),
            )
            for item in drawn
        ]
        return list(self._answered(requests, None, lambda _: answers, max_error_rate=1.0).values())

    def _answered(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling | None,
        answers: Callable[[Grading], Sequence[tuple[Rollout, ...]]],
        *,
        max_error_rate: float,
        count: int | None = None,
    ) -> dict[int, GradedRollouts]:
        """The graded rollouts by index in ``requests``, in order.

        They are sampled and graded now, or taken from the recorded rounds. With ``count``, only the first ``count``
        requests that are complete are returned. ``answers`` may add answers to the grading while others are sampled.
        """
        run = self._run

        def shaping(grade: Grade, text: str, rollout: Rollout, length: int) -> float:
            truncated = rollout.finish_reason == "length"
            limit = run.data.max_response_tokens
            return reward_of(grade, text, length=length, truncated=truncated, reward=run.reward, limit=limit)

        def complete(sampled: Sequence[tuple[Rollout, ...]]) -> list[int]:
            return [
                index
                for index, request in enumerate(requests)
                if count is None or replace(request, partial_rollouts=sampled[index]).is_answered
            ][:count]

        if self._recorded is None:
            takes_all = count is None or count == len(requests)
            with Grading(
                requests,
                template=self.template,
                graders=self._services.graders,
                max_error_rate=max_error_rate,
                num_answers=len(requests) * sampling.num_rollouts if sampling and takes_all else None,
            ) as grading:
                sampled = list(answers(grading))
                taken = complete(sampled)
                with self._timer.phase("grade"):
                    self._notify("grading")
                    graded = grading.finish(taken, sampled, shaping, check=self._services.check)
        else:
            if not self.has_more_recorded():
                raise ValueError("the step requests more sampling rounds than the checkpoint has recorded")
            sampled, recorded = answers_to(requests, sampling, self._recorded.pop(0))
            taken = complete(sampled)
            graded = graded_before(
                [requests[i] for i in taken],
                [sampled[i] for i in taken],
                [grade for i in taken for grade in recorded[i]],
                template=self.template,
                shaping=shaping,
            )
        found = dict(zip(taken, graded, strict=True))
        grades = [found[i].grades if i in found else () for i in range(len(requests))]
        self.rounds.append(
            SamplingRound(sampling=sampling, requests=requests, sampled=sampled, grades=grades)
        )
        return found

    def _sampling(self, num_rollouts: int) -> Sampling:
        run = self._run
        return Sampling(
            num_rollouts=num_rollouts,
            temperature=run.rollout.temperature,
            max_tokens=run.data.max_response_tokens,
            stop_token_ids=self.template.stop_token_ids,
            routes=self._services.routes,
            step=self.now.step,
        )

    def _sample(
        self,
        requests: Sequence[RolloutRequest],
        sampling: Sampling,
        grading: Grading,
        *,
        stop_after: int | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """Sample the requests, and start to grade the answers as they arrive.

        Of more than ``stop_after`` complete requests some are not used. So those that are complete late are not graded
        before it is known which are.
        """
        wanted = len(requests) if stop_after is None else stop_after

        def add(index: int, rollouts: tuple[Rollout, ...], num_complete: int) -> None:
            if num_complete <= wanted:
                grading.add(index, rollouts)
            self._notify(f"sampling {num_complete}/{wanted} prompts")

        with self._timer.phase("sample"):
            for index in [i for i, request in enumerate(requests) if request.is_answered][:wanted]:
                grading.add(index, requests[index].partial_rollouts)
            return sample(
                self._services.clients,
                requests,
                sampling,
                version=self.version,
                deadline_s=self._run.timeouts.sampling_s,
                may_advance=self._services.may_advance,
                on_group=add,
                stop_after=stop_after,
                check=self._services.check,
            )


def reward_of(
    grade: Grade, text: str, *, length: int, truncated: bool, reward: RewardConfig, limit: int
) -> float:
    """The training reward of an answer: the weighted sum of its terms, changed by the rules for form and length.

    Args:
        grade: a grade that has a score.
        length: number of tokens of the answer; ``limit`` is data.max_response_tokens.
    """
    terms, total = terms_of(reward), 0.0
    for name, term in terms.items():
        score = grade.score if len(terms) == 1 else grade.parts.get(name)
        if score is None:  # not a term of this prompt's source
            continue
        if term.format != "none":
            answered = term.has_answer(text)
            score = shape_reward(score, text=text, truncated=truncated, answered=answered, rule=term.format)
        total += term.weight * score
    if reward.overlong is None:
        return total
    return total + overlong_penalty(
        length, limit=limit, cache=reward.overlong.cache, factor=reward.overlong.penalty
    )


def response_ids(demonstration: Demonstration, prompt: Prompt) -> tuple[int, ...]:
    """The token ids with which a demonstration answers ``prompt``.

    Raises:
        ValueError: the demonstration does not begin with the prompt, or not all of its answer is trainable.
    """
    start = len(prompt.token_ids)
    stop = max((i + 1 for i, trainable in enumerate(demonstration.trainable) if trainable), default=0)
    if demonstration.token_ids[:start] != prompt.token_ids or any(demonstration.trainable[:start]):
        raise ValueError(f"demonstration {demonstration.id} does not answer prompt {prompt.id}")
    if not all(demonstration.trainable[start:stop]):
        raise ValueError(
            f"demonstration {demonstration.id} is a conversation of several turns; one answer is needed"
        )
    return demonstration.token_ids[start:stop]
