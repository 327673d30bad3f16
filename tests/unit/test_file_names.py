"""A unit test in the folder of a package is named after the module that it tests. tests/README.md lists all helpers."""

from __future__ import annotations

from pathlib import Path

import megatron_chord

UNIT = Path(__file__).parent
PACKAGE = Path(megatron_chord.__file__).parent
BEHAVIOURS = {
    "data/test_stock_templates.py": "prompts and demonstrations under the chat templates of published models",
    "families/test_families.py": "every file of families/ is compared with Transformers in the same way",
    "losses/test_broken_tokens.py": "all losses get the same broken tokens",
    "methods/test_authors_formulas.py": "losses of several methods against the code of their authors",
    "methods/test_worked_example.py": "docs/methods.md: its example and its tables",
    "plan/test_published.py": "benchmarks/planner.py: the whole planner against published runs",
    "rewards/test_bfcl.py": "benchmarks/bfcl_agreement.py: the tool-call grader against BFCL's own checker",
    "rewards/test_examples.py": "examples/rewards/ and docs/rewards.md",
    "rewards/test_fuzz.py": "benchmarks/fuzz_graders.py: all graders get the same hostile strings",
    "sampling/test_graded_while_sampled.py": "sampling, grader processes and a server at work at the same time",
    "sampling/test_whole_turns.py": "what a grader reads, from the chat template to the reward",
}
"""Files that are named after a behaviour, because they test several modules or a file outside the package."""


def test_a_file_is_named_after_its_module_or_listed_with_its_behaviour() -> None:
    files = {path.relative_to(UNIT) for path in UNIT.glob("*/**/test_*.py")}
    of_package = {file for file in files if (PACKAGE / file.parts[0]).is_dir()}
    named = {file for file in of_package if (PACKAGE / file.with_name(file.name[len("test_") :])).exists()}
    assert {file.as_posix() for file in of_package - named} == set(BEHAVIOURS)


def test_every_file_of_helpers_is_in_the_table() -> None:
    text = (UNIT.parent / "README.md").read_text()
    helpers = {path.name for path in (UNIT.parent / "support").glob("*.py")} - {"__init__.py"}
    assert {name for name in helpers if f"`support/{name}`" not in text} == set()
