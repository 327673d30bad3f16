"""The pages for contributors are true: paths exist, commands find an answer, examples run. CITATION.cff is valid."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")
ANSWERS = {
    "Where is phi?": r'"phi": lambda p',
    "Where are weights pushed to vLLM?": r"(?s)loop\.py.*push_weights\(.*_sync\.push\(",
    "Where does a reward come from?": r"TermConfig =",
}
"""For each question in CONTRIBUTING.md, what must be among the lines that its command finds."""
LONGEST_ANSWER = 10
"""The largest number of lines of an answer. Nobody reads a longer one."""


@pytest.mark.parametrize("question", ANSWERS)
def test_grep_alone_answers_the_question(question: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    command = re.search(re.escape(question) + r"[^`]*(?:`[^`\n]+`[^`]*)*?```bash\n(.+)\n```", text)
    assert command is not None, f"CONTRIBUTING.md does not ask {question!r}"
    words = shlex.split(command[1])
    assert words[0] == "grep"
    found = subprocess.run(
        [*words[:1], "--include=*.py", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.search(ANSWERS[question], found), found
    assert len(found.splitlines()) <= LONGEST_ANSWER, found


@pytest.mark.parametrize("page", PAGES)
def test_every_path_on_a_page_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:megatron_chord|tests|tools|docs|examples|benchmarks|slurm)/[\w/.*-]*)", text)
    if page == "tests/README.md":
        named += [f"tests/{name}" for name in re.findall(r"`((?:support|\w+)/[\w/]*(?:\.py)?)`", text)]
    assert named or page == "CHANGELOG.md"
    missing = [path for path in named if not path.startswith("tests/tests/") and not any_of(path)]
    assert not missing


def any_of(path: str) -> bool:
    candidates = (path, path.removeprefix("tests/"))
    return any(list(ROOT.glob(name)) if "*" in name else (ROOT / name).exists() for name in candidates)


@pytest.mark.parametrize(
    ("name", "path"),
    re.findall(
        r"`(\w+)`[^`|]*? (?:in|of) `((?:megatron_chord|tests)/[\w/]+\.py)`",
        " ".join((ROOT / "CONTRIBUTING.md").read_text().split()),
    ),
)
def test_a_name_is_in_the_file_that_the_page_names(name: str, path: str) -> None:
    assert re.search(rf"\b{name}\b", (ROOT / path).read_text())


def test_the_example_of_a_rank_test_is_a_test() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "tests/README.md").read_text(), re.DOTALL)
    assert example in (ROOT / "tests/distributed/test_ranks.py").read_text()


def test_every_folder_and_helper_of_the_tests_is_listed() -> None:
    text = (ROOT / "tests/README.md").read_text()
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert {name for name in folders if f"| `{name}/` |" not in text} == set()


# ---- CITATION.cff, by https://github.com/citation-file-format/citation-file-format/blob/1.2.0/schema-guide.md


def test_the_citation_has_what_the_format_demands() -> None:
    citation: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    for work in (citation, *citation["references"]):
        assert work["authors"]
        for author in work["authors"]:
            assert author.keys() in ({"name"}, {"given-names", "family-names"}), author


def test_the_citation_is_of_this_project_and_of_chords_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["title"] == project["name"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2508.11408"
    assert "arXiv:2508.11408" in [item["value"] for item in paper["identifiers"]]
