"""The parts of a run that its steps use, on one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_chord.config import RunConfig
from megatron_chord.losses.terms import Term
from megatron_chord.methods.base import Method
from megatron_chord.train.best import Best
from megatron_chord.train.coordinator import Coordinator
from megatron_chord.train.engine import RolloutEngine
from megatron_chord.train.health import Health
from megatron_chord.train.learned_mu import MuGradient
from megatron_chord.train.saver import Saver
from megatron_chord.train.state import TrainState
from megatron_chord.train.step_queue import StepQueue


@dataclass(frozen=True, kw_only=True)
class RunContext:
    run: RunConfig
    method: Method
    terms: Mapping[str, Term]
    state: TrainState
    engine: RolloutEngine
    queue: StepQueue
    saver: Saver
    coordinator: Coordinator | None
    """Rank 0's coordinator; None on the other ranks."""
    mu_gradient: MuGradient | None
    """None unless mu is learned."""
    health: Health
    best: Best = field(default_factory=Best)

    def say(self, text: str) -> None:
        """Print ``text`` on the console; on the coordinator only."""
        if self.coordinator is not None:
            self.coordinator.log.say(text)

    def doing(self, what: str) -> None:
        """Show on the console what the run is doing now; on the coordinator only."""
        if self.coordinator is not None:
            self.coordinator.log.doing(what)
