"""Suites: settings that are refused or taken from the suite, the limits of a trial, and the suites of the examples."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_chord.config_io import ConfigError, dump_config, load_suite
from megatron_chord.data import recipes
from tests.support.ranks import ROOT
from tools import prepare

SUITE = """\
data: files
system_prompt: Think.
sampling: {samples: 8, temperature: 1.0, max_tokens: 100}
reward: {kind: exact}
benchmarks:
  - name: a
    file: a.jsonl
    prepare: python tools/prepare.py a
    metrics: [avg@8, pass@4, maj@2]
  - name: b
    file: b.jsonl
    system_prompt: ""
    sampling: {samples: 1}
means:
  - {name: both, of: [a, b], metric: avg@8}
"""


def suite_of(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    return load_suite(path, overrides)


def test_a_mean_names_metrics_that_its_benchmarks_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"suite.yaml:1: mean both: b has no metric avg@8, it has avg@1"):
        suite_of(tmp_path, SUITE)


def test_a_part_of_a_suite_has_the_means_over_it(tmp_path: Path) -> None:
    text = SUITE.replace("  - {name: both, of: [a, b], metric: avg@8}", "") + (
        "  - {name: both, of: [a, b], metric: avg@1}\n  - {name: same, of: [b]}\n"
    )
    text = text.replace("metrics: [avg@8,", "metrics: [avg@1, avg@8,")
    part = suite_of(tmp_path, text, "only=[b]")
    assert [item.name for item in part.resolved()] == ["b"]
    assert [mean.name for mean in part.requested_means()] == ["same"]
    whole = suite_of(tmp_path, text)
    assert [item.name for item in whole.resolved()] == ["a", "b"]
    assert [mean.name for mean in whole.requested_means()] == ["both", "same"]
    with pytest.raises(ConfigError, match="only: there is no benchmark c, there are a, b"):
        suite_of(tmp_path, text, "only=[c]")


def test_benchmarks_take_from_the_suite_and_a_trial_limits_them(tmp_path: Path) -> None:
    text = SUITE[: SUITE.index("means:")]
    a, b = suite_of(tmp_path, text).resolved()
    assert a.file == str(tmp_path / "files" / "a.jsonl")
    assert (a.system_prompt, b.system_prompt) == ("Think.", None)
    assert a.sampling is not None
    assert b.sampling is not None
    assert (a.sampling.samples, b.sampling.samples, b.sampling.max_tokens) == (8, 1, 1024)
    assert (a.metrics, b.metrics) == (("avg@8", "pass@4", "maj@2"), ("avg@1",))
    trial, _ = suite_of(tmp_path, text, "samples=2", "max_tokens=50").resolved()
    assert trial.metrics == ("avg@2", "pass@2", "maj@2")
    assert trial.sampling is not None
    assert (trial.sampling.samples, trial.sampling.max_tokens) == (2, 50)


def test_what_is_written_down_reads_back_as_the_same(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, SUITE[: SUITE.index("means:")], "problems=3")
    assert suite_of(tmp_path, dump_config(suite)) == suite


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ("metrics: [avg@9]", "benchmark a: avg@9 needs more answers than sampling.samples, which is 8"),
        ("metrics: [best@8]", "metrics of a: 'best@8' is none of avg@K, pass@K and maj@K"),
        ("sampling: {samples: 2}", "sampling.samples 2 at temperature 0 would be the same answer 2 times"),
        ("sampling: {top_p: 0.5}", "sampling.top_p has no effect at temperature 0"),
        ("name2: x", "unknown setting 'benchmarks.name2'"),
    ],
)
def test_refused(tmp_path: Path, change: str, finding: str) -> None:
    text = SUITE[: SUITE.index("means:")].replace("metrics: [avg@8, pass@4, maj@2]", change)
    with pytest.raises(ConfigError) as error:
        suite_of(tmp_path, text)
    assert finding in str(error.value)


def test_the_paper_s_suite_has_its_protocol() -> None:
    suite = load_suite(ROOT / "examples" / "suites" / "paper.yaml")
    items = {item.name: item for item in suite.resolved()}
    assert {name for name in items if name.startswith("bfcl_")} == {
        f"bfcl_{live}{kind}"
        for live in ("", "live_")
        for kind in ("simple", "multiple", "parallel", "parallel_multiple")
    }
    assert all(item.sampling and item.sampling.temperature == 1.0 for item in items.values())
    assert [items[name].metrics[0] for name in ("aime24", "aime25", "amc")] == ["avg@32", "avg@32", "avg@8"]
    assert {mean.name: len(mean.of) for mean in suite.means} == {
        "bfcl_non_live": 4,
        "bfcl_live": 4,
        "bfcl": 8,
    }


def test_the_commands_of_the_papers_suite_write_its_files() -> None:
    """The commands have the form in which tools/prepare.py reads them, and run in the repository's folder."""
    for item in load_suite(ROOT / "examples" / "suites" / "paper.yaml").resolved():
        assert item.prepare is not None
        python, script, *arguments = shlex.split(item.prepare)
        assert (python, script) == ("python", "tools/prepare.py")
        args = prepare._arguments(arguments)
        names = recipes.BFCL_CATEGORIES if args.recipe == "bfcl" else ("evaluation",)
        assert Path(item.file) in [ROOT / args.out / f"{name}.jsonl" for name in names]


def test_every_example_can_be_read() -> None:
    for path in (ROOT / "examples" / "suites").glob("*.yaml"):
        assert load_suite(path).benchmarks
