"""The settings of the methods, one dataclass for each. ``name`` chooses which of them the block ``method`` is.

The code of the methods is in ``methods``. This module checks only a method's own settings. Rules that need other
blocks are in the method's ``check``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_chord.config_checks import not_negative, positive, require
from megatron_chord.schedules import Constant, MuSchedule

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]

PRESETS = {
    "alternating": "chord",
    "amft": "chord",
    "chord_both": "chord",
    "chord_mu": "chord",
    "chord_phi": "chord",
    "cispo": "chord",
    "constant_mu": "chord",
    "dapo": "chord",
    "dft": "chord",
    "dpo_mixed_pairs": "dpo",
    "dr_grpo": "chord",
    "gac": "chord",
    "grpo": "chord",
    "gspo": "chord",
    "is_sft": "chord",
    "reward_adaptive": "chord",
    "rloo": "chord",
    "sasr": "chord",
    "sft": "chord",
    "sft_then_rl": "chord",
}
"""Files in examples/methods that are not named after a method, with the method that each of them uses."""


def _named(name: str) -> Any:
    """The dataclass field ``name`` of one method. Its metadata has a hint for each preset that is given as a name."""
    hints = {
        preset: f"{preset!r} is a preset of method {method}: write base: examples/methods/{preset}.yaml"
        for preset, method in PRESETS.items()
    }
    return field(default=name, metadata={"hints": hints})


@dataclass(frozen=True, kw_only=True)
class SimpleWeight:
    """one: weight 1, plain SFT. p: the token's probability p (DFT, or importance-weighted SFT with pi_sample = 1). phi:
    p (1-p), as in CHORD."""

    kind: Literal["one", "p", "phi"]


@dataclass(frozen=True, kw_only=True)
class PowerWeight:
    """The weight is scale p^a (1-p)^b. It is largest at p = a / (a + b). a = b = scale = 1 is phi."""

    kind: Literal["power"] = "power"
    a: float = 1.0
    """Exponent of p."""
    b: float = 1.0
    """Exponent of 1 - p."""
    scale: float = 1.0
    """Constant factor of the weight."""

    def __post_init__(self) -> None:
        not_negative(**{"method.token_weight.a": self.a, "method.token_weight.b": self.b})
        positive(**{"method.token_weight.scale": self.scale})


@dataclass(frozen=True, kw_only=True)
class ClippedISWeight:
    """The weight is p where p <= threshold, otherwise 0 (CHORD, App. B.2)."""

    kind: Literal["clipped_is"] = "clipped_is"
    threshold: float = 0.4
    """Highest p that is trained, in (0, 1]."""

    def __post_init__(self) -> None:
        require(
            0 < self.threshold <= 1, f"method.token_weight.threshold must lie in (0, 1], got {self.threshold}"
        )


@dataclass(frozen=True, kw_only=True)
class TrustRegionWeight:
    """The weight is p / threshold where p is below threshold, otherwise 1 (TrSFT, arXiv 2512.17636)."""

    kind: Literal["trust_region"] = "trust_region"
    threshold: float = 0.1
    """Tokens with at least this p are trained as in plain SFT; tokens below it as with the weight p. In (0, 1]."""

    def __post_init__(self) -> None:
        require(
            0 < self.threshold <= 1, f"method.token_weight.threshold must lie in (0, 1], got {self.threshold}"
        )


@dataclass(frozen=True, kw_only=True)
class FocalWeight:
    """The weight is (1-p)^exponent."""

    kind: Literal["focal"] = "focal"
    exponent: float = 2.0
    """Exponent of 1 - p."""

    def __post_init__(self) -> None:
        not_negative(**{"method.token_weight.exponent": self.exponent})


@dataclass(frozen=True, kw_only=True)
class BernoulliEntropyWeight:
    """The weight is -p ln p - (1-p) ln(1-p), the entropy of "this token or another"."""

    kind: Literal["bernoulli_entropy"] = "bernoulli_entropy"


@dataclass(frozen=True, kw_only=True)
class EntropyTopWeight:
    """The weight is 1 for the `share` of tokens with the highest full-vocabulary entropy, otherwise 0 (CHORD, App.
    B.2).

    This costs one more forward pass, because the threshold depends on all demonstration tokens of the update.
    """

    kind: Literal["entropy_top"] = "entropy_top"
    share: float = 0.05
    """Share of an update's demonstration tokens that have weight 1, in (0, 1]."""

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"method.token_weight.share must lie in (0, 1], got {self.share}")


@dataclass(frozen=True, kw_only=True)
class EntropyNormWeight:
    """The weight is the full-vocabulary entropy divided by its mean over the update's demonstration tokens. This costs
    one more forward pass."""

    kind: Literal["entropy_norm"] = "entropy_norm"


@dataclass(frozen=True, kw_only=True)
class MarginWeight:
    """The weight is 1 - |m|, or exp(-m^2 / (2 width^2)) if width is given. m is p minus the probability of the most
    likely other token."""

    kind: Literal["margin"] = "margin"
    width: float | None = None
    """Width of the bell curve around m = 0. Default: the weight is 1 - |m|."""

    def __post_init__(self) -> None:
        if self.width is not None:
            positive(**{"method.token_weight.width": self.width})


TokenWeight = (
    SimpleWeight
    | PowerWeight
    | ClippedISWeight
    | TrustRegionWeight
    | FocalWeight
    | BernoulliEntropyWeight
    | EntropyTopWeight
    | EntropyNormWeight
    | MarginWeight
)


@dataclass(frozen=True, kw_only=True)
class ChordConfig:
    """CHORD (arXiv 2508.11408): the loss is (1 - mu) x policy loss + mu x SFT loss. SFT, GRPO and DAPO are special
    cases of it."""

    name: Literal["chord"] = _named("chord")
    mu: MuSchedule = field(default_factory=Constant)
    """Weight of the SFT loss at each step. The default is CHORD-phi's constant 0.1."""
    token_weight: TokenWeight = field(default_factory=lambda: SimpleWeight(kind="phi"))
    """Weight of each demonstration token in the SFT loss. No gradient flows through the weight. The default is phi."""
    cutoff: float = 1.0
    """Demonstration tokens with a probability above this are not trained (Trinity-RFT's cutoff_prob). 1: all tokens are
    trained."""
    aggregation: Aggregation = "token-mean"
    """How the SFT loss is averaged over demonstration tokens. The names are explained at objective.aggregation."""
    sft_temperature: float = 1.0
    """Number by which the logits of demonstrations are divided. `rollout.temperature` divides the logits of
    rollouts."""

    def __post_init__(self) -> None:
        require(0 < self.cutoff <= 1, f"method.cutoff must lie in (0, 1], got {self.cutoff}")
        positive(**{"method.sft_temperature": self.sft_temperature})


@dataclass(frozen=True, kw_only=True)
class LuffyConfig:
    """LUFFY (arXiv 2504.14945): each prompt's demonstration joins its group of rollouts and has a shaped ratio."""

    name: Literal["luffy"] = _named("luffy")
    gamma: float = 0.1
    """Constant of the shaping function f(p) = p / (p + gamma). A smaller gamma gives unlikely tokens more weight."""
    shaping: bool = True
    """true: the ratio of a demonstration token is f(p). false: it is p."""

    def __post_init__(self) -> None:
        positive(**{"method.gamma": self.gamma})


@dataclass(frozen=True, kw_only=True)
class RLPlusConfig:
    """RL-PLUS (arXiv 2508.00222): each prompt's demonstration joins its group of rollouts and has a mixture ratio."""

    name: Literal["rl_plus"] = _named("rl_plus")
    gamma: float = 0.5
    """Exponent of the factor (1 - p)^gamma of the advantage. A larger gamma gives likely tokens less weight."""

    def __post_init__(self) -> None:
        not_negative(**{"method.gamma": self.gamma})


@dataclass(frozen=True, kw_only=True)
class SRFTConfig:
    """SRFT (arXiv 2506.19767): SFT and RL losses on demonstrations and rollouts, weighted by the policy's entropy."""

    name: Literal["srft"] = _named("srft")
    sft_coefficient: float = 0.5
    """Weight of the SFT loss on demonstrations."""
    rl_coefficient: float = 0.1
    """Weight of the RL loss on rollouts with a positive reward."""
    positive_reward: float = 0.5
    """A rollout is positive if its reward is above this."""

    def __post_init__(self) -> None:
        not_negative(
            **{
                "method.sft_coefficient": self.sft_coefficient,
                "method.rl_coefficient": self.rl_coefficient,
            }
        )


@dataclass(frozen=True, kw_only=True)
class PrefixRFTConfig:
    """Prefix-RFT (arXiv 2507.01679): some answers begin with a part of the demonstration; the policy continues them."""

    name: Literal["prefix_rft"] = _named("prefix_rft")
    hybrids: int = 1
    """How many of each prompt's batch.rollouts answers begin with a part of the demonstration."""
    high: float = 0.95
    """Longest prefix, as a share of the demonstration."""
    low_start: float = 0.95
    """Shortest prefix at the first step, as a share of the demonstration."""
    low_end: float = 0.05
    """Shortest prefix from step `decay_steps` on, as a share of the demonstration."""
    decay_steps: int = 0
    """Steps in which the shortest prefix falls from `low_start` to `low_end`. 0: all steps of the run."""
    entropy_share: float = 0.2
    """Share of an update's prefix tokens that are trained: those with the highest entropy."""

    def __post_init__(self) -> None:
        require(
            0 <= self.low_end <= self.low_start <= self.high < 1,
            "method prefix_rft needs 0 <= method.low_end <= method.low_start <= method.high < 1 (a whole demonstration "
            f"leaves nothing to sample), got {self.low_end}, {self.low_start} and {self.high}",
        )
        require(
            0 < self.entropy_share <= 1, f"method.entropy_share must lie in (0, 1], got {self.entropy_share}"
        )
        not_negative(**{"method.decay_steps": self.decay_steps})
        require(
            self.hybrids >= 1, f"method.hybrids must be >= 1 (without hybrids it is GRPO), got {self.hybrids}"
        )


@dataclass(frozen=True, kw_only=True)
class GHPOConfig:
    """GHPO (arXiv 2507.10628): prompts whose rollouts are all wrong are sampled again with a hint from the solution."""

    name: Literal["ghpo"] = _named("ghpo")
    stages: int = 3
    """How many times a prompt is sampled again while all of its rollouts are wrong, each time with a longer hint."""
    stage_share: float = 0.25
    """Length that each stage adds to the hint, as a share of the solution."""
    start_step: int = 0
    """First step with hints. The paper's cold start is 20."""
    wrong_at_most: float = 0.0
    """A rollout is wrong if its score is no higher than this."""
    cue: str = "A correct solution begins as follows. Use it to solve the problem:"
    """Text between the problem and the hint."""

    def __post_init__(self) -> None:
        require(self.stages >= 1, f"method.stages must be >= 1 (without hints it is GRPO), got {self.stages}")
        require(
            0 < self.stage_share * self.stages < 1,
            f"method.stages {self.stages} x method.stage_share {self.stage_share} must lie in (0, 1): the last hint "
            "must leave something to solve",
        )
        not_negative(**{"method.start_step": self.start_step})


@dataclass(frozen=True, kw_only=True)
class HPTConfig:
    """HPT (arXiv 2509.04419): each prompt is trained by RL, or by SFT if its rollouts fail."""

    name: Literal["hpt"] = _named("hpt")
    gate: float = 0.0
    """A prompt is trained by SFT if the mean score of its rollouts is at most this."""
    sft_coefficient: float = 1.0
    """Weight of the SFT loss."""
    branch_weights: Literal["prompts", "equal"] = "prompts"
    """prompts: each branch also has the weight of its share of the step's prompts. equal: it does not, as in the
    authors' script."""
    sft_temperature: float = 1.0
    """Number by which the logits of demonstrations are divided. `rollout.temperature` divides the logits of
    rollouts."""

    def __post_init__(self) -> None:
        require(0 <= self.gate < 1, f"method.gate must lie in [0, 1), got {self.gate}")
        positive(
            **{
                "method.sft_coefficient": self.sft_coefficient,
                "method.sft_temperature": self.sft_temperature,
            }
        )


@dataclass(frozen=True, kw_only=True)
class ReLIFTConfig:
    """ReLIFT (arXiv 2506.07527): RL, with SFT updates between RL steps on collected demonstrations of failed
    prompts."""

    name: Literal["relift"] = _named("relift")
    size: int = 128
    """Number of demonstrations of an SFT update. The update follows the step in which this number is reached."""
    sft_lr: float = 1e-6
    """Constant learning rate of the SFT updates. They have an optimizer state of their own, in host memory."""
    entropy_coefficient: float = 0.001
    """Coefficient of the entropy at the tokens of demonstrations, which is subtracted from the SFT loss."""
    wrong_at_most: float = 0.0
    """A prompt has failed if no rollout has a score above this."""
    sft_temperature: float = 1.0
    """Number by which the logits of demonstrations are divided. `rollout.temperature` divides the logits of
    rollouts."""

    def __post_init__(self) -> None:
        require(self.size >= 1, f"method.size must be >= 1, got {self.size}")
        positive(**{"method.sft_lr": self.sft_lr, "method.sft_temperature": self.sft_temperature})
        not_negative(**{"method.entropy_coefficient": self.entropy_coefficient})


@dataclass(frozen=True, kw_only=True)
class ReMixConfig:
    """ReMix (arXiv 2507.06892): in the first stage, a part of every batch is rollouts of earlier steps."""

    name: Literal["remix"] = _named("remix")
    stale_share: float = 0.4
    """Probability that a group of the batch comes from an earlier step (p in the paper)."""
    lag: int = 2
    """Maximum age of such a group in steps (N in the paper). The rollouts of this many steps are kept."""
    mix_steps: int = 50
    """Number of steps of the first stage (T in the paper). Later steps use only their own rollouts."""

    def __post_init__(self) -> None:
        require(0 <= self.stale_share <= 1, f"method.stale_share must lie in [0, 1], got {self.stale_share}")
        require(self.lag >= 1, f"method.lag must be >= 1, got {self.lag}")
        not_negative(**{"method.mix_steps": self.mix_steps})


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """DPO on on-policy and off-policy pairs (arXiv 2305.18290, 2505.02363). The reference policy is `model.path`."""

    name: Literal["dpo"] = _named("dpo")
    beta: float = 0.1
    """The paper's beta: a larger one keeps the policy closer to the reference."""
    offpolicy_share: float = 0.5
    """Share of prompts whose pair is off-policy: the demonstration is preferred to the worst rollout."""

    def __post_init__(self) -> None:
        positive(**{"method.beta": self.beta})
        require(
            0 <= self.offpolicy_share <= 1,
            f"method.offpolicy_share must lie in [0, 1], got {self.offpolicy_share}",
        )


@dataclass(frozen=True, kw_only=True)
class SelfDistillationConfig:
    """Self-distillation (SDFT, OPSD, SDPO: arXiv 2601.19897, 2601.18734, 2601.20802): the policy whose prompt shows a
    solution teaches the policy whose prompt does not, on the policy's own rollouts."""

    name: Literal["self_distillation"] = _named("self_distillation")
    shows: Literal["right_rollout", "demonstration", "rollout_or_demonstration", "verdict"] = "right_rollout"
    """What the teacher's prompt shows. right_rollout: another rollout of the group that is right. demonstration: the
    prompt's own demonstration. rollout_or_demonstration: such a rollout, or the demonstration if the group has none.
    verdict: the rollout itself, whether it is right, and the true result."""
    template: str = ""
    """The last message of the teacher's prompt. {problem}, {solution}, {attempt}, {verdict} and {truth} are replaced.
    Empty: a text that fits `shows`."""
    teacher: Literal["present", "initial", "averaged"] = "present"
    """Weights of the teacher. present: those of the policy before the step. initial: those of `model.path`, or of
    `objective.kl.reference`. averaged: a moving average of the policy's weights (SDPO, SDFT)."""
    teacher_rate: float = 0.05
    """How far the averaged weights move towards the policy's after every update, in (0, 1]. Only `teacher: averaged`
    uses it."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """What is minimised at each token. reverse_kl: KL(policy || teacher). forward_kl: KL(teacher || policy). jsd: the
    Jensen-Shannon divergence."""
    weight: float = 1.0
    """Weight of the distillation in the loss, in (0, 1]; that of the RL loss is 1 - weight."""
    teaches: Literal["all", "wrong"] = "all"
    """Which rollouts are taught. wrong: only those whose reward is at most `positive_reward`."""
    positive_reward: float = 0.5
    """A rollout is right if its reward is above this."""
    drop_thinking: bool = False
    """true: the thinking block of a shown solution is left out."""
    teacher_prompt_tokens: int = 0
    """Maximum number of tokens of a teacher's prompt; a rollout with a longer teacher's prompt is not taught. 0:
    data.max_prompt_tokens + data.max_response_tokens."""
    max_ratio: float = 2.0
    """Upper limit of the importance weight of a token that other weights sampled."""
    max_log_ratio: float = 20.0
    """Upper limit of the difference of a token's two log-probs, teacher and policy."""

    def __post_init__(self) -> None:
        require(0 < self.weight <= 1, f"method.weight must lie in (0, 1], got {self.weight}")
        require(
            0 < self.teacher_rate <= 1, f"method.teacher_rate must lie in (0, 1], got {self.teacher_rate}"
        )
        positive(**{"method.max_ratio": self.max_ratio, "method.max_log_ratio": self.max_log_ratio})
        not_negative(**{"method.teacher_prompt_tokens": self.teacher_prompt_tokens})
        shown = ("attempt", "verdict", "truth") if self.shows == "verdict" else ("solution",)
        require(
            not self.template or any(f"{{{name}}}" in self.template for name in shown),
            f"method.template must have {' or '.join(f'{{{name}}}' for name in shown)} with method.shows {self.shows}: "
            "without it the teacher sees no more than the policy does",
        )


@dataclass(frozen=True, kw_only=True)
class TRAPOConfig:
    """TRAPO (arXiv 2512.17636): answers are sampled in rounds, and those of hard prompts begin with a part of the
    demonstration. That part is trained by SFT with a limited gradient (TrSFT), the rest by RL."""

    name: Literal["trapo"] = _named("trapo")
    counts: tuple[int, ...] = (4, 2, 1, 1)
    """Answers that each round samples to a prompt. They add up to batch.rollouts."""
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """Share of the demonstration with which a round's answers begin if the prompt needs help. The first round's is
    0. 1: the demonstration itself is the answer."""
    thresholds: tuple[float, ...] = (0.5, 0.66, 1.0)
    """For each round after the first: a prompt is helped if the mean score of its answers so far is below this."""
    threshold: float = 0.1
    """Tokens of a prefix with at least this probability are trained as in SFT; those below it have the weight
    p / threshold (TrSFT)."""
    sft_coefficient: float = 1.0
    """Weight of the SFT loss on prefixes."""
    sft_temperature: float = 1.0
    """Number by which the logits of prefixes are divided. `rollout.temperature` divides the logits of rollouts."""

    def __post_init__(self) -> None:
        rounds = len(self.counts)
        require(
            rounds == len(self.shares) == len(self.thresholds) + 1,
            "method trapo needs a number in method.counts and method.shares for each round, and one less in "
            f"method.thresholds; got {rounds}, {len(self.shares)} and {len(self.thresholds)}",
        )
        require(rounds >= 2, "method.counts has one round: without help it is GRPO")
        require(
            min(self.counts) >= 1 and self.counts[0] >= 2,
            f"method.counts must have at least 2 answers in the first round and 1 in the others, got "
            f"{list(self.counts)}",
        )
        require(
            self.shares[0] == 0 and all(0 < share <= 1 for share in self.shares[1:]),
            f"method.shares must be 0 and then lie in (0, 1], got {list(self.shares)}",
        )
        for count, share in zip(self.counts, self.shares, strict=True):
            require(
                share < 1 or count == 1,
                f"method.shares 1 needs a round of one answer, because all would be the same; got {count}",
            )
        require(0 < self.threshold <= 1, f"method.threshold must lie in (0, 1], got {self.threshold}")
        positive(
            **{
                "method.sft_coefficient": self.sft_coefficient,
                "method.sft_temperature": self.sft_temperature,
            }
        )


@dataclass(frozen=True, kw_only=True)
class DYPOConfig:
    """DYPO (arXiv 2604.08926): prompts whose rollouts are all wrong are trained by SFT, those whose rollouts are all
    right are skipped. The others are trained by RL and by DPO's loss on all pairs of a right and a wrong rollout."""

    name: Literal["dypo"] = _named("dypo")
    positive_reward: float = 0.5
    """A rollout is right if its reward is above this."""
    alignment_coefficient: float = 0.001
    """Weight of the loss on pairs (the group alignment loss) beside the RL loss."""
    beta: float = 0.1
    """DPO's beta in the loss on pairs."""
    reference: bool = False
    """true: the log-probs in the loss on pairs are relative to those of `model.path`, or of
    `objective.kl.reference`."""
    sft_coefficient: float = 1.0
    """Weight of the SFT loss."""
    sft_temperature: float = 1.0
    """Number by which the logits of demonstrations are divided. `rollout.temperature` divides the logits of
    rollouts."""

    def __post_init__(self) -> None:
        positive(
            **{
                "method.beta": self.beta,
                "method.sft_coefficient": self.sft_coefficient,
                "method.sft_temperature": self.sft_temperature,
            }
        )
        not_negative(**{"method.alignment_coefficient": self.alignment_coefficient})


MethodConfig = (
    ChordConfig
    | LuffyConfig
    | RLPlusConfig
    | SRFTConfig
    | PrefixRFTConfig
    | GHPOConfig
    | HPTConfig
    | ReLIFTConfig
    | ReMixConfig
    | DPOConfig
    | SelfDistillationConfig
    | TRAPOConfig
    | DYPOConfig
)
