"""The numbers that `megatron-chord mu preview` prints, compared with hand arithmetic."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.cli import main
from megatron_chord.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    PartialConfig,
    RolloutConfig,
    RunConfig,
    sources_of,
)
from megatron_chord.config_methods import ChordConfig, LuffyConfig
from megatron_chord.preview import (
    ASCII,
    BLOCKS,
    MOST_ROWS,
    Facts,
    Range,
    Row,
    facts,
    known_mu,
    lines,
    reward_rows,
    rows,
    save_plot,
    schedule_of,
    text_plot,
)
from megatron_chord.schedules import (
    Binary,
    Constant,
    GradientNorm,
    Learned,
    Linear,
    MuSchedule,
    Periodic,
    RewardAdaptive,
    WarmupCosine,
)

EVERY = [
    Constant(),
    WarmupCosine(peak=0.9, valley=0.05, decay_steps=200),
    WarmupCosine(peak=0.5, valley=0.02, warmup_steps=200, decay_steps=400, first_step=1),
    Linear(peak=0.3, valley=0.7, warmup_steps=30, decay_steps=300),
    Binary(switch_step=7, reset_optimizer=True),
    Periodic(sft_steps=1, policy_steps=3),
    RewardAdaptive(tau=0.7),
    GradientNorm(warmup_steps=20),
    Learned(sft_steps=10, rate=0.1, entropy_rate=-0.01, entropy_target=0.3),
]


def a_run(mu: MuSchedule | None, steps: int = 1000, method: str = "chord", **batch: int) -> RunConfig:
    return RunConfig(
        output=Path("out"),
        steps=steps,
        model=ModelConfig(path=Path("policy")),
        data=DataConfig(
            prompts=sources_of(Path("prompts.jsonl")), demonstrations=sources_of(Path("demonstrations.jsonl"))
        ),
        batch=BatchConfig(**{"prompts": 2, "rollouts": 4, "demonstrations": 3, **batch}),
        method=ChordConfig(mu=mu or Constant()) if method == "chord" else LuffyConfig(),
    )


def certain(number: float) -> Range:
    return Range(number, number)


def test_what_is_not_given() -> None:
    assert schedule_of(a_run(None)) == Constant(peak=0.1)
    assert schedule_of(a_run(None, method="luffy")) is None
    assert schedule_of(a_run(Binary(switch_step=2))) == Binary(switch_step=2)
    assert list(lines(a_run(None, method="luffy"))) == [
        "method luffy does not use mu; only method chord does (method.mu)"
    ]
    assert rows(a_run(None, method="luffy")) == []


# Table


def test_few_values_are_all_shown() -> None:
    assert rows(a_run(Constant(), 30)) == [Row(0, 29, 0.1)]
    assert rows(a_run(Binary(switch_step=7), 20)) == [Row(0, 6, 1.0), Row(7, 19, 0.0)]
    linear = Linear(peak=0.5, valley=0.25, warmup_steps=2, decay_steps=2)
    assert rows(a_run(linear, 9)) == [
        Row(0, 0, 0.0),
        Row(1, 1, 0.25),
        Row(2, 2, 0.5),
        Row(3, 3, 0.375),
        Row(4, 8, 0.25),
    ]


def test_a_run_that_ends_before_the_schedule() -> None:
    assert rows(a_run(Binary(switch_step=7), 3)) == [Row(0, 2, 1.0)]
    assert rows(a_run(GradientNorm(warmup_steps=7), 3)) == [Row(0, 2, 1.0)]
    assert rows(a_run(Learned(rate=1.0), 1)) == [Row(0, 0, 0.5)]


def test_of_many_values_the_turns_and_round_steps_are_shown() -> None:
    shown = rows(a_run(WarmupCosine(peak=0.5, valley=0.02, warmup_steps=201, decay_steps=402)))
    assert [row.first for row in shown] == [*range(0, 201, 50), 201, *range(250, 601, 50), 602, 603]
    assert shown[-1] == Row(603, 999, 0.02)
    assert {row.first: row.mu for row in shown}[201] == 0.5


def test_the_kink_of_a_rise_after_the_warmup_is_shown() -> None:
    linear = Linear(peak=0.3, valley=0.7, warmup_steps=33, decay_steps=303)
    assert {0, 33, 336} <= {row.first for row in rows(a_run(linear))}


def test_unknown_steps_are_one_row() -> None:
    assert rows(a_run(RewardAdaptive(), 10)) == [Row(0, 9, None)]
    assert rows(a_run(GradientNorm(warmup_steps=4), 10)) == [Row(0, 3, 1.0), Row(4, 9, None)]
    learned = Learned(sft_steps=4, initial=0.3, rate=0.1)
    assert rows(a_run(learned, 10)) == [Row(0, 3, 1.0), Row(4, 4, 0.3), Row(5, 9, None)]


def test_a_long_period_is_cut_and_says_so() -> None:
    run = a_run(Periodic(sft_steps=1, policy_steps=3))
    shown = rows(run)
    assert len(shown) == MOST_ROWS
    assert shown[:3] == [Row(0, 0, 1.0), Row(1, 3, 0.0), Row(4, 4, 1.0)]
    assert shown[-2:] == [Row(996, 996, 1.0), Row(997, 999, 0.0)]
    printed = list(lines(run))
    assert [line.strip() for line in printed].count("...") == 1
    assert not any(
        "..." in line for line in lines(a_run(WarmupCosine(peak=0.9, valley=0.05, decay_steps=200)))
    )


@pytest.mark.parametrize("mu", EVERY, ids=lambda mu: mu.schedule)
@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 73, 1000])
def test_rows_are_true_and_few(mu: MuSchedule, steps: int) -> None:
    run = a_run(mu, steps)
    shown, values = rows(run), known_mu(mu, steps)
    assert len(values) == steps
    assert 1 <= len(shown) <= MOST_ROWS
    assert shown[0].first == 0
    assert shown[-1].last == steps - 1
    assert all(before.last < after.first for before, after in itertools.pairwise(shown))
    for row in shown:
        assert set(values[row.first : row.last + 1]) == {row.mu}


def test_mu_over_the_mean_reward() -> None:
    table = dict(reward_rows(RewardAdaptive(tau=0.6)))
    assert table[-1.0] == 1.0
    assert table[0.6 - 1] == 1.0
    assert table[0.25] == pytest.approx(0.35)
    assert table[0.6] == table[1.0] == 0.0
    printed = list(lines(a_run(RewardAdaptive(tau=0.6))))
    assert "       0.25  0.35" in printed
    assert " 0 - 999  0 to 1, depends on the run".strip() in [line.strip() for line in printed]


# Facts: 2 prompts x 4 rollouts and 3 demonstrations a step


def test_facts_of_a_known_course() -> None:
    linear = Linear(peak=1.0, valley=0.0, warmup_steps=2, decay_steps=2)  # 0, 0.5, 1, 0.5, 0, 0, ...
    assert facts(a_run(linear, 8), linear) == Facts(
        zero=certain(5), one=certain(1), mean=certain(0.25), demonstrations=certain(9), rollouts=certain(56)
    )


def test_facts_of_a_reward_adaptive_run_which_always_samples() -> None:
    mu = RewardAdaptive()
    assert facts(a_run(mu, 10), mu) == Facts(
        zero=Range(0, 10),
        one=Range(0, 10),
        mean=Range(0, 1),
        demonstrations=Range(0, 30),
        rollouts=certain(80),
    )


def test_facts_of_a_run_by_gradient_norm() -> None:
    mu = GradientNorm(warmup_steps=4)
    assert facts(a_run(mu, 10), mu) == Facts(
        zero=Range(0, 6),
        one=Range(4, 10),
        mean=Range(0.4, 1),
        demonstrations=Range(12, 30),
        rollouts=Range(0, 48),
    )


def test_facts_of_a_learned_run_which_has_both_branches_after_its_warmup() -> None:
    mu = Learned(sft_steps=3, rate=0.1, initial=0.5, low=0.1, high=0.9)
    assert facts(a_run(mu, 10), mu) == Facts(
        zero=certain(0),
        one=certain(3),
        mean=Range(pytest.approx(0.41), pytest.approx(0.89)),  # type: ignore[arg-type]
        demonstrations=certain(30),
        rollouts=certain(56),
    )


def test_facts_and_notes_are_printed() -> None:
    run = a_run(Binary(switch_step=600, reset_optimizer=True), sampling_attempts=3)
    text = "\n".join(lines(run))
    for line in (
        "mu: binary, switch_step 600, reset_optimizer True",
        "1000 steps, the first is 0",
        "steps with mu = 0 (no SFT pass): 400",
        "steps with mu = 1 (no rollouts): 600",
        "mean mu: 0.6",
        "demonstrations over the run: 1,800",
        "rollouts over the run: 3,200",
        "- the optimizer and its learning-rate schedule are reset before step 600",
        "- dynamic sampling may draw up to 3 times as many rollouts",
    ):
        assert line in text.splitlines()
    assert "rollout.partial" not in text
    stopping = replace(run, rollout=RolloutConfig(partial=PartialConfig(extra_prompts=1.0)))
    assert (
        "- up to 2 of a step's prompts are stopped unfinished (rollout.partial) and finished in a later step"
    ) in " ".join(line.strip() for line in lines(stopping))
    dropping = replace(
        run, rollout=RolloutConfig(partial=PartialConfig(extra_prompts=1.0, unfinished="drop"))
    )
    assert ("- up to 2 more prompts a step are sampled and dropped unfinished (rollout.partial)") in " ".join(
        line.strip() for line in lines(dropping)
    )
    unknown = "\n".join(lines(a_run(GradientNorm(warmup_steps=400, gamma=4.0))))
    assert "demonstrations over the run: 1,200 to 3,000" in unknown
    assert "0.2" in unknown.rpartition("G0, that is")[2]
    assert "(their rollouts are not trained on)" in "\n".join(lines(a_run(RewardAdaptive())))


# Plot


def test_a_plot_by_hand() -> None:
    assert text_plot([0.0, 0.25, 0.5, 1.0], width=8, height=2).splitlines() == [
        "    1 ┤      ██",
        "  0.5 ┤  ▄▄████",
        "    0 └────────",
        "       0      3",
    ]
    assert text_plot(
        [0.0, 0.25, 0.5, 1.0], width=4, height=2, glyphs=ASCII, ends=("a", "b")
    ).splitlines() == [
        "    1 |   #",
        "  0.5 | :##",
        "    0 +----",
        "       a  b",
    ]


def test_a_column_of_several_steps_has_their_mean_and_their_greatest() -> None:
    drawn = text_plot([0.0, 1.0, 0.0, 0.0] * 3, width=3, height=4).splitlines()
    assert [line[7:] for line in drawn[:4]] == ["░░░", "░░░", "░░░", "███"]


def test_unknown_values_are_marked() -> None:
    drawn = text_plot([0.5, None], width=2, height=2).splitlines()
    assert [line[7:] for line in drawn[:2]] == [" ·", "█·"]


def test_a_small_mu_gets_its_own_scale_and_the_least_is_seen() -> None:
    assert text_plot([0.1] * 5).splitlines()[0].split() == ["0.1", "┤" + "█" * 70]
    assert text_plot([0.0] * 5).splitlines()[0].split() == ["1", "┤"]
    for glyphs in (BLOCKS, ASCII):
        lowest = text_plot([1.0, 1e-6, 0.0], width=3, glyphs=glyphs).splitlines()[7]
        assert lowest[7:] == glyphs.levels[-1] + glyphs.levels[1]


@pytest.mark.parametrize("mu", EVERY, ids=lambda mu: mu.schedule)
@pytest.mark.parametrize("steps", [1, 72, 73, 100_000])
def test_it_fits_a_terminal_of_80_columns(mu: MuSchedule, steps: int) -> None:
    run = a_run(mu, steps)
    for plain in (False, True):
        text = list(lines(run, plain=plain))
        assert max(len(line) for line in text) <= 80
        assert [line for line in text if line != line.rstrip()] == []
        assert not plain or "\n".join(text).isascii()


# Command line

YAML = """\
output: runs/x
steps: 20
model:
  path: policy
data:
  prompts: train.jsonl
  demonstrations: demonstrations.jsonl
batch: {prompts: 4, rollouts: 8, demonstrations: 16}
method:
  mu:
    schedule: warmup_cosine
    peak: 0.9
    valley: 0.05
    decay_steps: 10
"""


def run_file(folder: Path, text: str = YAML) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_reads_a_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mu", "preview", run_file(tmp_path), "method.mu.decay_steps=5", "steps=12"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("mu: warmup_cosine, peak 0.9, valley 0.05, warmup_steps 0, decay_steps 5")
    assert " 5 - 11  0.05".strip() in [line.strip() for line in printed]
    assert "demonstrations over the run: 192" in printed


def test_a_wrong_run_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mu", "preview", run_file(tmp_path, YAML.replace("0.9", "1.9"))]) == 2
    assert "run.yaml:12: method.mu.peak must lie in [0, 1], got 1.9" in capsys.readouterr().err


@pytest.mark.parametrize(("encoding", "mark"), [("ascii", "|"), ("utf-8", "┤")])
def test_it_starts_without_torch_and_prints_what_the_terminal_can_show(
    tmp_path: Path, encoding: str, mark: str
) -> None:
    path = run_file(tmp_path, YAML.partition("objective")[0])
    code = (
        "import sys\nfrom megatron_chord.cli import main\n"
        f"code = main(['mu', 'preview', {path!r}])\n"
        "print(sorted({'torch', 'vllm', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code],
        capture_output=True,
        encoding="utf-8",
        env={"PYTHONIOENCODING": encoding},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert mark in done.stdout
    assert done.stdout.isascii() == (encoding == "ascii")


# Image


@pytest.mark.parametrize("mu", EVERY, ids=lambda mu: mu.schedule)
def test_an_image_is_drawn(tmp_path: Path, mu: MuSchedule) -> None:
    pytest.importorskip("matplotlib")
    save_plot(a_run(mu, 60), tmp_path / "mu.png")
    assert (tmp_path / "mu.png").read_bytes().startswith(b"\x89PNG")


def test_the_image_shows_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    save_plot(a_run(GradientNorm(warmup_steps=3), 12), tmp_path / "mu.png")
    (axes,) = drawn[0].axes
    assert [list(part) for part in axes.lines[0].get_data()] == [[0, 1, 2], [1.0, 1.0, 1.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["depends on the run"]


def test_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, image = run_file(tmp_path, YAML.partition("objective")[0]), tmp_path / "mu.png"
    assert main(["mu", "preview", path, "--plot", str(image)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"plot: {image}"
    assert image.is_file()
    assert main(["mu", "preview", path, "--plot", str(tmp_path / "mu.nonsense")]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["mu", "preview", path, "--plot", str(tmp_path / "missing" / "mu.png")]) == 2
    assert "missing" in capsys.readouterr().err


def test_without_matplotlib_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = run_file(tmp_path, YAML.partition("objective")[0])
    assert main(["mu", "preview", path, "--plot", str(tmp_path / "mu.png")]) == 2
    assert "pip install 'matplotlib>=3.9'" in capsys.readouterr().err


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="luffy does not use mu"):
        save_plot(a_run(None, method="luffy"), tmp_path / "mu.png")
