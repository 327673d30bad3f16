#!/usr/bin/env python
"""Estimates whether a run fits its GPUs, and how long a step takes. It needs only the YAML and the model's config.json.

    python tools/plan.py RUN.yaml [NAME=VALUE ...] --gpu h100 --nodes 8
    python tools/plan.py RUN.yaml --gpu h200 --nodes 4 --search             # what fits, the fastest first
    python tools/plan.py RUN.yaml --nodes 8 --rollout-nodes 4 --overlap     # half of them only sample

Prints memory by part, the time of a step by phase, the capacity of the KV cache, and disk space. Nothing is measured:
docs/planning.md has the formulas and their errors for published runs. The exit code is 0 if the run fits (with
--search: if any layout fits), 1 if not, and 2 if settings, model or cluster cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chord.costs.gpus import GPUS, gpu_named

if TYPE_CHECKING:  # these modules load torch, and --help must not wait for it
    from megatron_chord.plan.estimate import Case, Estimate
    from megatron_chord.plan.search import Found, Placed


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    from megatron_chord.config_io import load_config
    from megatron_chord.config_nodes import ConfigError
    from megatron_chord.plan.estimate import Cluster, case_of, choice_of, estimate
    from megatron_chord.plan.search import search_servers

    try:
        run = load_config(args.config, args.overrides)
        cluster = Cluster(
            gpu=gpu_named(args.gpu),
            nodes=args.nodes,
            gpus_per_node=args.gpus,
            rollout_nodes=args.rollout_nodes,
        )
        case = case_of(
            run,
            cluster,
            prompt_tokens=args.prompt_tokens,
            response_tokens=args.response_tokens,
            demonstration_tokens=args.demonstration_tokens,
            overlap=args.overlap,
        )
        if args.search:
            limit = None if args.host_memory is None else args.host_memory * 1e9
            return _show_search(args, case, *search_servers(case, choice_of(run), host_memory=limit))
        return _show(args, case, estimate(case, choice_of(run)))
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="as in model.path=PATH/MODEL")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help=f"kind of GPU, one of {', '.join(GPUS)} (default: h100)"
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (default: 1)")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs of a node (default: 8)")
    parser.add_argument(
        "--host-memory", type=float, metavar="GB", help="main memory of a node (default: not checked)"
    )
    parser.add_argument(
        "--rollout-nodes",
        type=int,
        default=0,
        help="number of nodes that only sample (default: all GPUs train and sample)",
    )
    parser.add_argument("--overlap", action="store_true", help="sampling runs one step ahead of training")
    parser.add_argument(
        "--prompt-tokens",
        type=float,
        help="mean number of tokens of a prompt (default: a quarter of the settings' limit)",
    )
    parser.add_argument(
        "--response-tokens",
        type=float,
        help="mean number of tokens of a response (default: a quarter of the limit)",
    )
    parser.add_argument(
        "--demonstration-tokens",
        type=float,
        help="mean number of tokens of a demonstration (default: that of responses)",
    )
    parser.add_argument(
        "--search", action="store_true", help="try layouts of the ranks, servers and splits of nodes"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON with plain numbers: bytes, seconds, tokens"
    )
    return parser.parse_intermixed_args(argv)


def _show(args: argparse.Namespace, case: Case, found: Estimate) -> int:
    from rich.console import Console

    from megatron_chord.plan.report import as_plain, layout, tables

    if args.json:
        print(json.dumps(as_plain(case, found), indent=2))
        return _code(args, found)
    console = Console()
    console.print(f"layout: {layout(found)}, recompute {found.choice.recompute}")
    console.print(_assumed(case), highlight=False)
    for table in tables(case, found):
        console.print(table)
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for problem in found.problems:
        print(f"does not fit: {problem}", file=sys.stderr)
    return _code(args, found)


def _code(args: argparse.Namespace, found: Estimate) -> int:
    """The exit code: 1 if the run does not fit the GPUs, or does not fit the main memory if that is given."""
    if args.host_memory is not None and found.host.total > args.host_memory * 1e9:
        host = found.host
        advice = [
            *(["rollout.offload: false"] if host.offloaded else []),
            *(["checkpoint.asynchronous: false"] if host.staged else []),
            "more training nodes",
        ]
        print(
            f"does not fit: a node needs {host.total / 1e9:.0f} GB of main memory ({host.offloaded / 1e9:.0f} GB "
            f"offloaded, {host.staged / 1e9:.0f} GB for a checkpoint that is being written, {host.processes / 1e9:.0f} "
            f"GB of ranks and servers), and has {args.host_memory:g} GB; what needs less: {', '.join(advice)}",
            file=sys.stderr,
        )
        return 1
    return int(bool(found.problems))


def _show_search(args: argparse.Namespace, case: Case, found: Found, placed: list[Placed]) -> int:
    from rich.console import Console

    from megatron_chord.plan.report import reasons, search_as_plain, search_table, tables
    from megatron_chord.plan.search import best_block

    if args.json:
        print(json.dumps(search_as_plain(found, placed), indent=2))
    elif placed:
        best, console = placed[0], Console()
        console.print(_assumed(case), highlight=False)
        console.print(search_table(placed))
        for table in tables(best.case, best.estimate):
            console.print(table)
        print(best_block(best.estimate, best.case))
        for warning in best.estimate.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    elif found.fitting:
        print("no layout fits the main memory of a node (--host-memory)", file=sys.stderr)
    else:
        print("\n".join(reasons(found)), file=sys.stderr)
    return int(not placed)


def _assumed(case: Case) -> str:
    work, cluster = case.work, case.cluster
    split = (
        "sampling and training on all" if cluster.colocated else f"{cluster.rollout_nodes} nodes only sample"
    )
    return (
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}, {split}; assumed mean lengths: prompt "
        f"{work.prompt_tokens:g}, response {work.response_tokens:g}, demonstration {work.demonstration_tokens:g} tokens"
    )


if __name__ == "__main__":
    sys.exit(main())
