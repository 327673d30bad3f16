"""What is run: methods, seeds and sizes, and the settings of each run."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_chord.config import RunConfig
from megatron_chord.config_io import load_config

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "examples" / "evidence"
POLICY = "policy"
"""The name of a policy's folder, in ``WORLD`` and in the folder of every run."""

COMPARED = {
    "chord_phi": "CHORD-phi, mu 0.9",
    "chord_mu": "CHORD-mu, mu 0.9 to 0.05",
    "grpo": "GRPO",
    "grpo_low_rate": "GRPO, learning rate 1e-4",
    "sft": "SFT",
    "sft_light_rl": "SFT-light + RL",
    "sft_best_rl": "SFT-best + RL",
    "constant_0.02": "mu 0.02, no token weight",
    "constant_0.1": "mu 0.1, no token weight",
    "constant_0.5": "mu 0.5, no token weight",
    "p_weight": "weight p, mu 0.9",
    "luffy": "LUFFY",
    "sasr": "SASR",
}
"""The methods in the criteria: the file in ``WORLD``, and the name in the tables."""
REPORTED = {
    "phi_decay": "phi, mu 0.9 to 0.05",
    "reward_adaptive": "mu by reward, tau 0.7",
    "bernoulli_entropy": "weight: Bernoulli entropy",
    "entropy_norm": "weight: entropy",
    "focal": "weight: (1-p)^2",
    "margin": "weight: margin",
    "power": "weight: phi with its peak at 1/4",
}
"""Open questions of the paper. They are reported without a criterion."""
NEWER = {
    "gac": "GAC",
    "trapo": "TRAPO",
    "dypo": "DYPO",
    "self_distillation": "self-distillation + GRPO",
    "relift": "ReLIFT",
}
"""Methods of other papers that also mix demonstrations and RL. They are reported without a criterion."""
NAMES = COMPARED | REPORTED | NEWER
FIRST_STAGE = {"sft_light_rl": "sft_light", "sft_best_rl": "sft_best"}
"""The methods that consist of two runs, and the file of the first run. The second run starts from its policy."""
TUNING_SEED = 100
"""The seed on which settings were chosen. It is not reported."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The extent of a plan."""

    name: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...] = ()
    """Settings of every run, as NAME=VALUE."""
    demonstrations: int = 128
    """The number of demonstrations that are drawn for each seed."""

    @property
    def jobs(self) -> list[Job]:
        """Yield jobs seed by seed, so that an interrupted plan has whole seeds. Methods with a criterion come first."""
        compared = [name for name in self.methods if name in COMPARED]
        reported = [name for name in self.methods if name not in COMPARED]
        return [Job(name, seed) for part in (compared, reported) for seed in self.seeds for name in part]


@dataclass(frozen=True)
class Job:
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-{self.seed}"


WHOLE = Size(name="whole", methods=tuple(NAMES), seeds=(0, 1, 2, 3, 4))
QUICK = Size(name="quick", methods=("sft", "grpo", "chord_mu", "chord_phi"), seeds=(0, 1))
SMALLEST = Size(
    name="smallest",
    methods=("grpo", "chord_phi"),
    seeds=(0,),
    settings=(
        "steps=2",
        "batch.prompts=2",
        "batch.rollouts=4",
        "batch.demonstrations=4",
        "evaluation.problems=8",
        "optim.warmup_steps=1",
    ),
    demonstrations=8,
)
"""For the test suite: every part runs, and nothing is learned."""


def draw_demonstrations(size: Size, seed: int, folder: Path) -> Path:
    """Write the demonstrations of this seed. Every method of the seed has the same ones."""
    rows = (WORLD / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    drawn = random.Random(seed).sample(rows, size.demonstrations)
    path = folder / f"demonstrations-{seed}.jsonl"
    path.write_text("".join(f"{row}\n" for row in drawn), encoding="utf-8")
    return path


def load_stages(
    job: Job, size: Size, demonstrations: Path, *, output: Path, server: str
) -> tuple[RunConfig, ...]:
    """The settings of the job's runs, in order: one, or two for those in ``FIRST_STAGE``.

    Raises:
        ValueError: settings are not valid.
    """
    settings = [
        f"seed={job.seed}",
        f"data.demonstrations={demonstrations}",
        f"rollout.servers=[{server}]",
        "reward.workers=1",
        *size.settings,
    ]
    before = FIRST_STAGE.get(job.method)
    if before is not None:
        first_output = output.with_name(f"{output.name}.{before}")
        first = load_config(WORLD / f"{before}.yaml", [*settings, f"output={first_output}"])
        settings.append(f"model.path={first_output / POLICY}")
    path, settings = WORLD / f"{job.method}.yaml", [*settings, f"output={output}"]
    last = load_config(path, settings)
    if last.data.aligned:  # its prompts are the questions of the demonstrations
        last = load_config(path, [*settings, f"data.prompts={demonstrations}"])
    return (last,) if before is None else (first, last)


def checkable(run: RunConfig) -> RunConfig:
    """Return the run with the base policy in place of a policy that a first stage has not trained yet."""
    return replace(run, model=replace(run.model, path=WORLD / POLICY))
