"""The CHORD paper's findings in a small world: every method, several seeds, criteria that were fixed before the runs.

    python benchmarks/paper_in_small.py                # the whole: see docs/evidence.md for how long it takes
    python benchmarks/paper_in_small.py --quick        # two seeds of four methods: about 10 minutes on two cores
    python benchmarks/paper_in_small.py --only-tables  # of the runs that have finished

Every run is a training by the real trainer (Megatron-Core, vLLM) on the world of ``examples/evidence``. Two runs go at
a time. A finished run is kept in ``OUTPUT/results``. The same command continues where an earlier one ended: it trains
what is missing, and what was trained with other settings, another base policy or other data. ``--publish`` puts tables
and figures into ``docs/evidence.md``, and all numbers into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the workers
    from paper.plan import QUICK, SMALLEST, WHOLE, Job, checkable
    from paper.work import Incomplete, Place, finished, train_all

    from megatron_chord.train.setup import check_run

    chosen = parse(arguments)
    size = SMALLEST if chosen.smallest else QUICK if chosen.quick else WHOLE
    size = dataclasses.replace(
        size,
        methods=tuple(chosen.methods or size.methods),
        seeds=tuple(chosen.seeds or size.seeds),
        settings=(*size.settings, *chosen.settings),
    )
    place = Place(chosen.output / size.name)
    place.prepare(size)
    for method in size.methods:  # check all before the first trains
        try:
            for run in place.load(Job(method, size.seeds[0]), size):
                check_run(checkable(run), world_size=1)
        except ValueError as error:
            raise SystemExit(f"{method}: {error}") from error
    done = finished(place, size)
    left = [job for job in size.jobs if job not in done]
    say(f"{len(size.jobs)} runs, {len(done)} of them finished; results in {place.folder / 'results'}")
    begun, failure, minutes = time.monotonic(), None, None
    if left and not chosen.only_tables:
        try:
            train_all(place, size, left, workers=chosen.workers, say=say)
        except Incomplete as error:
            failure = str(error)
        except KeyboardInterrupt:
            failure = "interrupted: the same command goes on, and keeps the runs that have finished"
        minutes = (time.monotonic() - begun) / 60 if len(left) == len(size.jobs) else None
        done = finished(place, size)
    report([done[job] for job in size.jobs if job in done], place.folder, minutes, publish=chosen.publish)
    if failure:
        say(failure)
    return 1 if failure else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from paper.plan import NAMES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0))
    add("--quick", action="store_true", help="two seeds of four methods")
    add("--smallest", action="store_true", help="two steps of two methods, for the tests: nothing is learned")
    add("--methods", nargs="+", choices=list(NAMES), metavar="NAME", help=f"methods among {', '.join(NAMES)}")
    add("--seeds", nargs="+", type=int, metavar="N", help="seeds (default: those of the plan)")
    add(
        "--settings",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of every run, such as optim.lr=1e-3",
    )
    add("--workers", type=int, default=cores, help="runs at a time (default: the number of cores)")
    add("--output", type=Path, default=Path("runs/paper_in_small"), help="folder (default: %(default)s)")
    add("--only-tables", action="store_true", help="train nothing")
    add("--publish", action="store_true", help="write the results into docs/ and benchmarks/results/")
    chosen = parser.parse_args(arguments)
    if chosen.publish and (chosen.quick or chosen.smallest or chosen.settings):
        parser.error("--publish is for the whole plan: leave --quick, --smallest and --settings out")
    if chosen.workers < 1:
        parser.error(f"--workers must be at least 1, got {chosen.workers}")
    return chosen


def report(results: Sequence[dict[str, Any]], folder: Path, minutes: float | None, *, publish: bool) -> None:
    """Write tables to the console and into ``folder``, and with ``publish`` also into the documentation."""
    from paper import page

    records: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        records.setdefault(result["method"], {})[result["seed"]] = result
    parts = {
        "provenance": page.provenance(records, minutes),
        "criteria": page.criteria_table(records),
        "methods": page.methods_table(records),
    }
    text = "\n\n".join(parts.values())
    (folder / "tables.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    if publish and not results:
        say("nothing was published: no run has finished")
    elif publish:
        from paper.figures import draw

        page.fill(
            DOCS / "evidence.md", parts | {"figures": page.figures(draw(records, DOCS / "evidence"), DOCS)}
        )
        kept = RESULTS / f"paper_in_small-{max(result['finished'] for result in results)[:10]}.json.gz"
        kept.write_bytes(gzip.compress(json.dumps(results).encode(), mtime=0))
        say(f"wrote {DOCS / 'evidence.md'}, its figures and {kept}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
