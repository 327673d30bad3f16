"""Every link in the documentation leads somewhere, and every command in a code block is valid.

A comment above a block says why its commands are not run, if this test does not know them::

    <!-- not run: needs a container engine -->
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from megatron_chord import cli
from megatron_chord.config_io import load_config, load_suite
from tools import convert, plan, prepare

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("**/README.md")),
]
OWN = ("make", "megatron-chord", "python", "sbatch", "grep", "source", "export")
"""Commands that this test knows. It also knows the programs of the environment."""
PROGRAMS = {
    "megatron-chord": cli.main,
    "tools/convert.py": convert.main,
    "tools/plan.py": plan.main,
    "tools/prepare.py": prepare.main,
}
FOLDERS = ("examples", "slurm", "tools", "benchmarks", "docker", "megatron_chord", "tests")
"""A word of a command that begins with one of these folders is a path in the repository."""
NAME_OF_PAGE = {path: path.relative_to(ROOT).as_posix() for path in PAGES}


# ---- links


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def dead_links(page: Path) -> Iterator[str]:
    text = re.sub(r"`[^`\n]*`(?!\])", "", without_code(page.read_text()))
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            yield f"{link}: there is no {name}"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{link}: {target.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=NAME_OF_PAGE.get)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(dead_links(page)) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title, here\n[a](none.md) [b](#a-title-here) [c](#another) [d](https://e.f/g)\n")
    assert [link.partition(":")[0] for link in dead_links(page)] == ["none.md", "#another"]


# ---- commands


def commands(page: Path) -> list[str]:
    """Return the commands in the page's code blocks as strings, without their comments."""
    text = page.read_text()
    found: list[str] = []
    for comment, block in re.findall(
        r"(<!-- not run: .+? -->\n\s*)?^ *```(?:bash|sh|console)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL
    ):
        if not comment:
            found += commands_of(block)
    for block in re.findall(r"\n\n((?: {4}\S.*\n)+)", without_code(text)):
        if block.split()[0] in OWN:
            found += commands_of(block)
    return found


def commands_of(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        for command in re.split(r" && |; ", re.sub(r"(^|\s)#.*", "", line)):
            if command.strip():
                yield " ".join(command.split())


CASES = [
    pytest.param(command, id=f"{NAME_OF_PAGE[page]}: {command[:60]}")
    for page in PAGES
    for command in commands(page)
]


@pytest.mark.parametrize("command", CASES)
def test_a_command_could_be_given(command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make test NO_VARIABLE=1",
        "megatron-chord trian RUN.yaml",
        "megatron-chord train RUN.yaml --no-option",
        "megatron-chord train examples/none.yaml",
        "megatron-chord train examples/arithmetic/chord_phi.yaml optim.learning_rate=1",
        "python tools/plan.py RUN.yaml --no-option",
        "python tools/none.py",
        "python benchmarks/methods.py --no-option",
        "python -m benchmarks.none",
        "sbatch slurm/none.sh",
        "sbatch slurm/chord_qwen7b.sh data.prompt=x",
        "no-program --at-all",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(command)


def check(command: str) -> None:
    """Raise an error if something is wrong with the command."""
    words = [word for word in shlex.split(command.replace("[", "").replace("]", "")) if word != "..."]
    for word in words:
        path = word.rpartition("=")[2].partition(" ")[0]
        if path.partition("/")[0] in FOLDERS and "/" in path:
            assert (ROOT / path).exists(), f"there is no {path}"
    program, *arguments = words
    if program == "make":
        check_make(arguments)
    elif program == "megatron-chord":
        check_parse(PROGRAMS[program], arguments)
        check_settings(arguments)
    elif program == "python":
        check_python(arguments)
    elif program == "sbatch":
        config = f"examples/cluster/{Path(arguments[0]).stem}.yaml"
        check_settings([config, *arguments[1:]])
    else:
        known = program in OWN or (Path(sys.executable).parent / program).exists()
        assert known, f"{program}: unknown here; say in a comment above the block why it is not run"


def check_make(arguments: Sequence[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, text, re.MULTILINE), f"the Makefile has no {name}"


def check_python(arguments: Sequence[str]) -> None:
    if arguments[0] == "-m":
        path, rest = f"{arguments[1].replace('.', '/')}", arguments[2:]
        (source,) = [file for file in (f"{path}.py", f"{path}/__main__.py") if (ROOT / file).is_file()]
    else:
        source, rest = arguments[0], arguments[1:]
        assert (ROOT / source).is_file(), f"there is no {source}"
    if source in PROGRAMS:
        check_parse(PROGRAMS[source], rest)
        check_settings(rest)
    else:
        # A benchmark imports what it measures. Its options are searched in its text and in its folder's helpers.
        texts = [file.read_text() for file in [ROOT / source, *(ROOT / source).parent.glob("*.py")]]
        shared = [text for text in texts[1:] if "if __name__" not in text]
        for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
            assert any(f'"{option}"' in text for text in [texts[0], *shared]), f"{source} has no {option}"


def check_parse(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> None:
    """Ask the program for its help with the command's words. argparse refuses unknown words, and nothing runs."""
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    words = [*itertools.takewhile(lambda word: not word.startswith("-"), arguments), "--help"]
    shown, refused = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(refused),
        pytest.raises(SystemExit) as end,
    ):
        main(words)
    assert end.value.code == 0, refused.getvalue()
    for option in options:
        assert re.search(rf"{option}\b", shown.getvalue()), f"no {option} in:\n{shown.getvalue()}"


def check_settings(arguments: Sequence[str]) -> None:
    """If the run's file exists, read it with the settings that the command changes."""
    files = [word for word in arguments if word.endswith(".yaml") and (ROOT / word).is_file()]
    for file in files:
        load = load_suite if file.startswith("examples/suites/") else load_config
        load(ROOT / file, [word for word in arguments if re.match(r"[a-z_.]+=", word)])
