#!/usr/bin/env python
"""Converts downloaded public data sets to the files that a run reads, and prints what was left out and why.

    python tools/prepare.py openr1 data/train-*.parquet --tokenizer Qwen2.5-7B-Instruct/ --out openr1
    python tools/prepare.py toolace data.json --out toolace
    python tools/prepare.py gsm8k main/train-*.parquet --sft 2000 --out gsm8k
    python tools/prepare.py math MATH/train.parquet --exclude MATH-500/test.jsonl --out math
    python tools/prepare.py bfcl bfcl_eval/data --out bfcl
    python tools/prepare.py aime train.parquet --url-has 2024 --out aime24      # also: amc, math500, minerva, olympiad
    python tools/prepare.py mmlu_pro data/test-*.parquet --out mmlu_pro         # also: gpqa

Every random draw has a seed. The files of a recipe have no problem in common. docs/data.md lists the filters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_chord.data import recipes
from megatron_chord.data.rows import DataError

SPLITS = {"openr1": (5000, 20000), "toolace": (500, 5000), "gsm8k": (2000, None), "math": (2000, None)}
"""The default numbers of demonstrations and of RL prompts (None: all that are left). The first two are the paper's."""
EVALUATIONS = ("aime", "amc", "math500", "minerva", "olympiad")
LICENCES = {
    "openr1": "OpenR1-Math-220k: Apache-2.0",
    "toolace": "ToolACE: Apache-2.0",
    "gsm8k": "GSM8K: MIT",
    "math": "MATH: MIT",
    "bfcl": "BFCL: Apache-2.0",
    "mmlu_pro": "MMLU-Pro: MIT",
    "gpqa": "GPQA: its authors ask that it is not published in plain text",
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        prepared = _prepare(args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prepared.write(args.out)
    print(f"{args.recipe} -> {args.out}")
    print("\n".join(prepared.lines()))
    if args.recipe in LICENCES:
        print(f"licence, as far as known: {LICENCES[args.recipe]}")
    return 0


def _prepare(args: argparse.Namespace) -> recipes.Prepared:
    split = {name: getattr(args, name) for name in ("sft", "rl", "seed")} if args.recipe in SPLITS else {}
    make: dict[str, Callable[[], recipes.Prepared]] = {
        "openr1": lambda: recipes.openr1(
            args.data, num_tokens=_tokenizer(args.tokenizer), max_tokens=args.max_tokens, **split
        ),
        "toolace": lambda: recipes.toolace(args.data, **split),
        "gsm8k": lambda: recipes.gsm8k(args.data, **split),
        "math": lambda: recipes.math(args.data, exclude=args.exclude, **split),
        "bfcl": lambda: recipes.bfcl(args.data[0], categories=args.categories),
        "mmlu_pro": lambda: recipes.mmlu_pro(args.data),
        "gpqa": lambda: recipes.gpqa(args.data, seed=args.seed),
    }
    if args.recipe in make:
        return make[args.recipe]()
    return recipes.problems(args.data, url_has=args.url_has)


def _tokenizer(folder: Path) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prepare.py", description="Prepare a public data set for a run.")
    recipe = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for name in (*SPLITS, "bfcl", "mmlu_pro", "gpqa", *EVALUATIONS):
        one = recipe.add_parser(name)
        one.add_argument(
            "data", type=Path, nargs="+", metavar="FILE", help="downloaded files, folders or patterns"
        )
        one.add_argument(
            "--out", type=Path, required=True, metavar="FOLDER", help="where the files are written"
        )
        if name in SPLITS:
            sft, rl = SPLITS[name]
            one.add_argument(
                "--sft", type=int, default=sft, help=f"number of demonstrations (default: {sft})"
            )
            one.add_argument(
                "--rl",
                type=int,
                default=rl,
                help=f"number of RL prompts (default: {rl or 'all that are left'})",
            )
        if name in SPLITS or name == "gpqa":
            one.add_argument("--seed", type=int, default=42, help="seed of all random draws (default: 42)")
    openr1 = recipe.choices["openr1"]
    openr1.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder with the policy's tokenizer, which counts tokens for the limit",
    )
    openr1.add_argument(
        "--max-tokens",
        type=int,
        default=8196,
        help="maximum number of tokens of a generation (default: 8196)",
    )
    recipe.choices["math"].add_argument(
        "--exclude",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="problems to leave out, such as MATH-500",
    )
    recipe.choices["bfcl"].add_argument(
        "--categories",
        nargs="+",
        default=list(recipes.BFCL_CATEGORIES),
        help="categories of BFCL (default: the eight that CHORD reports)",
    )
    for name in EVALUATIONS:
        recipe.choices[name].add_argument(
            "--url-has", default="", help="keep rows whose url has this, such as 2024"
        )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
