"""Compare Megatron-Core's logits of random models with Transformers', or print the reason why a model is refused.

    python benchmarks/random_models.py --first 1000 --count 250

The exit code is 1 if a logit differs by more than 1e-4 (FP32, one rank). The models are tiny and drawn from the seed
(tests/support/random_models.py); 250 of them take some minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.random_logits import TOLERANCE, compare
from tests.support.ranks import run_ranks


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=1000, help="the first seed (default 1000)")
    parser.add_argument("--count", type=int, default=250, help="seeds, one model each (default 250)")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.count)
    with tempfile.TemporaryDirectory() as folder:
        (outcomes,) = run_ranks(compare, 1, seeds, Path(folder), timeout_s=20.0 * args.count)
    different = [one for one in outcomes if one.difference is not None and not one.difference < TOLERANCE]
    computed = [one.difference for one in outcomes if one.difference is not None]
    print(
        f"seeds {seeds.start} to {seeds.stop - 1}: {len(computed)} computed, largest difference of a logit "
        f"{max(computed):.1e}; {sum(one.refused is not None for one in outcomes)} refused; "
        f"{sum(one.failed is not None for one in outcomes)} that Transformers does not take; "
        f"{len(different)} different"
    )
    for one in outcomes:
        what = f"{one.difference:.1e} of {one.largest:.1f}" if one.difference is not None else None
        print(
            f"{one.seed:6} {one.family:12} "
            + (what or (f"refused: {one.refused}" if one.refused else f"Transformers: {one.failed}"))
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
