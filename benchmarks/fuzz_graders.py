"""Send hostile text through every grader: nothing may hang, run or be left behind, and no worker may be lost for ever.

The strings are of kinds that have broken graders: code, ten thousands of brackets, powers of powers, incomplete tags,
odd Unicode, repeated pieces of every form that is read, and mutations of right answers. Each is graded in the real
worker processes. The code in the strings would write a canary file if it ran.

    python benchmarks/fuzz_graders.py [--count 10000] [--seed 0]           # 10 minutes on two cores
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megatron_chord.records import Grade
from megatron_chord.rewards.pool import GraderPool
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import KINDS

TRUTHS = {
    "math": [
        "18",
        r"\frac{3}{4}",
        "(-1,6)",
        r"(-\infty, 2) \cup (3, \infty)",
        "2516_8",
        r"\text{east}",
        "3, 5, 7",
        "x^2+1",
    ],
    "exact": ["18"],
    "tool_calls": ["[]", '[{"name": "mail", "arguments": {"to": "Bob", "lines": [1, {"a": null}]}}]'],
}
CODE = [
    "__import__('os').system('touch {c}')",
    "open('{c}','w')",
    "exec(\"open('{c}','w')\")",
    "(lambda: __import__('subprocess').run(['touch','{c}']))()",
    "{{7*7}}${{7*7}}#{{open('{c}','w')}}",
    "\\write18{{touch {c}}}\\input{{|touch {c}}}",
    "'+str(open('{c}','w'))+'",
    "$(touch {c})`touch {c}`;touch {c}",
    "!!python/object/apply:os.system ['touch {c}']",
    "[mail(to=open('{c}','w'))]",
    "globals()['__builtins__']['open']('{c}','w')",
    "().__class__.__base__.__subclasses__()",
]
_PIECES = r"""
{ } ( ) [ ] \{ \} \boxed{ \frac{ \frac \sqrt{ \text{ \left( \right) \begin{pmatrix} \end{pmatrix} \\ & ^ _ ^{ _{ \cup
\infty \pm \emptyset \% $ $$ \( \) \[ \] \overline{3} ° √ − ½ ² , ; : . = < > \le \ne ! - + * / \, \! ~ ' " \"
<think> </think> <answer> </answer> #### <tool_call> </tool_call> answer is Answer: option (B) and or base cm \$
{"name": "arguments": "mail" [mail( to= "Bob" null NaN 1e999 \ud800 true
"""
PIECES = _PIECES.split()
ATOMS = [
    "x",
    "18",
    "3/4",
    "9",
    "0.5",
    "1,000",
    "2516_8",
    "e",
    "i",
    r"\pi",
    "1e9",
    "99999999",
    "\x00",
    "\u202e",
    "😀",
    " ",
    "\n",
]
WRAPPERS: list[Callable[[str], str]] = [
    lambda text: text,
    lambda text: f"\\boxed{{{text}}}",
    lambda text: f"#### {text}",
    lambda text: f"<think>{text}</think>{text}",
    lambda text: f"<answer>{text}</answer>",
    lambda text: f"The answer is ${text}$.",
    lambda text: f"<tool_call>{text}</tool_call>",
    lambda text: f'<tool_call>{{"name": "mail", "arguments": {{"to": "{text}"}}}}</tool_call>',
    lambda text: f"[mail(to='{text}')]",
]


def hostile(rng: random.Random, canary: str, truth: str) -> str:
    """Return one string. Equal states of `rng` give equal strings."""
    kind = rng.randrange(6)
    if kind == 0:
        text = rng.choice(CODE).format(c=canary)
    elif kind == 1:
        text = rng.choice(PIECES + ATOMS) * int(10 ** rng.uniform(1, 4.5))
    elif kind == 2:
        text = "".join(
            rng.choice(PIECES + ATOMS) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 60))
        )
    elif kind == 3:
        pattern = "".join(rng.choice(PIECES + ATOMS) for _ in range(rng.randrange(2, 5)))
        text = pattern * int(10 ** rng.uniform(0.5, 3.5))
    elif kind == 4:
        base, sign = rng.choice(ATOMS), rng.choice(["^", "^{", "!", "*", "/", "-", "+", ","])
        text = (
            base
            + "".join(f"{sign}{rng.choice(ATOMS)}" for _ in range(rng.randrange(1, 12)))
            + "}" * rng.randrange(12)
        )
    else:
        letters = list(truth * rng.randrange(1, 4))
        for _ in range(rng.randrange(1, 8)):
            letters.insert(
                rng.randrange(len(letters) + 1),
                rng.choice(PIECES + ATOMS + [chr(rng.randrange(0x20, 0x3000))]),
            )
        text = "".join(letters)
    for _ in range(rng.randrange(1, 3)):
        text = rng.choice(WRAPPERS)(text)
    return text


def fuzz(
    kind: str, *, count: int, seed: int, timeout_s: float, workers: int
) -> tuple[list[Grade], float, list[Path]]:
    """Send `count` strings through the grader `kind`. Return grades in order, seconds, and the canaries that were
    found."""
    rng = random.Random(f"{seed} {kind}")
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary"
        items = [
            Response(text=hostile(rng, str(canary), truth), truth=truth)
            for truth in rng.choices(TRUTHS[kind], k=count)
        ]
        start = time.monotonic()
        with GraderPool(KINDS[kind](workers=workers, timeout_s=timeout_s, memory_mb=2000)) as pool:
            grades = pool.grade_all(items)
            pids = pool.worker_pids()
        seconds = time.monotonic() - start
        left = [Path(f"/proc/{pid}") for pid in pids if Path(f"/proc/{pid}").exists()]
        return grades, seconds, [*Path(folder).iterdir(), *left]


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--count", type=int, default=10_000, help="strings for each grader")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--timeout-s", type=float, default=5.0, help="time limit of one grading")
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = options.parse_args()
    faults = 0
    for kind in TRUTHS:
        grades, seconds, found = fuzz(
            kind,
            count=arguments.count,
            seed=arguments.seed,
            timeout_s=arguments.timeout_s,
            workers=arguments.workers,
        )
        scores = Counter("error" if grade.score is None else f"{grade.score:g}" for grade in grades)
        errors = Counter(
            (grade.error or "").partition(":")[0][:60] for grade in grades if grade.score is None
        )
        faults += len(found) + (len(grades) != arguments.count)
        print(
            f"{kind}: {len(grades)} strings in {seconds:.0f} s; scores {dict(scores)}; "
            f"canaries and workers left: {found}"
        )
        for error, times in errors.most_common():
            print(f"  {times} x {error}")
        sys.stdout.flush()
    print("PASS" if not faults else f"FAIL: {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
