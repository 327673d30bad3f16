"""The command line: train, check, data, report, mu preview, evaluate, generate, chat, compare, settings, doctor."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from megatron_chord import hub
from megatron_chord.config import RunConfig, hub_paths
from megatron_chord.config_checks import MAX_TEMPERATURE
from megatron_chord.config_io import ConfigError, dump_config, load_config, located, meant_by

if TYPE_CHECKING:
    from megatron_chord.data.lens import Lens
    from megatron_chord.data.observed import Observed
    from megatron_chord.data.templates import ChatTemplate
    from megatron_chord.families.shape import ModelShape
    from megatron_chord.methods.base import Method
    from megatron_chord.train.stop import StopRequest


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _main(argv)
    except BrokenPipeError:  # `... | head` has read enough
        if "train" in (argv or sys.argv[1:])[:1]:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _main(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args, rest = parser.parse_known_args(argv, argparse.Namespace(argv=argv))
    # argparse takes positional arguments in one place only; overrides may also stand after an option.
    unknown = [text for text in rest if text.startswith("-") or "=" not in text]
    if unknown or (rest and not hasattr(args, "overrides")):
        parser.error(_about_unknown(args.command, unknown or rest, argv))
    if rest:
        args.overrides = [*args.overrides, *rest]
    if args.command == "train" and args.overwrite and args.resume != "never":
        parser.error(f"--overwrite and --resume {args.resume} contradict each other")
    return _run_with_file(args) if hasattr(args, "config") else _run_without_file(args)


def _about_unknown(command: str, unknown: Sequence[str], argv: Sequence[str]) -> str:
    """Return the error message for unknown arguments. For a setting with dashes it shows the right form."""
    from megatron_chord.config_suite import SuiteConfig

    for text in unknown:
        name, equals, value = text.lstrip("-").partition("=")
        kind = SuiteConfig if command == "evaluate" else RunConfig
        meant = meant_by(name.replace("-", "_"), kind) if text.startswith("-") else []
        if meant:
            following = argv[argv.index(text) + 1 :]
            given = value if equals else next(iter(following), "VALUE")
            written = " or ".join(f"{full}={given}" for full in meant)
            return f"{text} is a setting, not an option: write {written} without dashes"
    return f"unrecognized arguments: {' '.join(unknown)}"


def _run_without_file(args: argparse.Namespace) -> int:
    """Run a command that does not read a run's YAML file."""
    if args.command == "doctor":
        from megatron_chord import doctor

        return doctor.main()
    if args.command == "settings":
        from megatron_chord.config_suite import SuiteConfig
        from megatron_chord.settings import lines, markdown

        listed = lines(SuiteConfig) if args.suite else lines()
        print(markdown() if args.markdown else "\n".join(listed), end="" if args.markdown else "\n")
        return 0
    if args.command in ("generate", "chat"):
        from megatron_chord.evaluation.talk_command import talk_command

        return talk_command(args)
    if args.command == "report":
        return _report(args.runs, args.output)
    from megatron_chord.evaluation.command import compare_command, evaluate_command

    return compare_command(args) if args.command == "compare" else evaluate_command(args)


def _run_with_file(args: argparse.Namespace) -> int:
    try:
        run = load_config(args.config, args.overrides)
        if args.command != "mu" and _fetch(run):
            run = load_config(args.config, args.overrides)
    except ValueError as error:
        has_place = isinstance(error, ConfigError)
        return _refuse(str(error) if has_place else located(str(error), args.config, args.overrides))
    if args.command == "mu":
        return _preview_mu(run, args.plot)

    def refuse(error: ValueError) -> int:
        return _refuse(located(str(error), args.config, args.overrides))

    runs = {"check": _check, "data": _show_data, "train": _train}
    return runs[args.command](run, args, refuse)


def _fetch(run: RunConfig) -> bool:
    """Download the models and data sets on the hub that the run names and that are not in the cache.

    Returns:
        True if anything was downloaded.

    Raises:
        ValueError: a download is not possible. The message names the setting.
    """
    names = [(setting, name) for setting, path in hub_paths(run) if (name := hub.unresolved_name(path))]
    for setting, name in names:
        try:
            hub.fetch(name, lambda text: print(text, file=sys.stderr))
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from None
    return bool(names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-chord", description="CHORD (arXiv 2508.11408) on Megatron-Core, with vLLM rollouts."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a training from a YAML file")
    train.add_argument(
        "--resume",
        metavar="auto|step-N",
        type=_resume,
        default="never",
        help="auto: continue from the newest complete checkpoint, or start at step 0 if there is none. step-N: "
        "continue from that checkpoint",
    )
    train.add_argument(
        "--allow-changed",
        action="store_true",
        help="with --resume: allow changes of settings that affect training, such as the learning rate",
    )
    train.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    check = commands.add_parser("check", help="check a YAML file, its model and its data, and stop")
    data = commands.add_parser(
        "data", help="show what a YAML file's data will train: counts, lengths, tokens, masks"
    )
    data.add_argument(
        "--examples",
        type=_count,
        default=3,
        metavar="N",
        help="number of rows of each data set that are shown in full (default: 3)",
    )
    data.add_argument("--html", type=Path, metavar="PAGE", help="also write it as one HTML page")
    data.add_argument(
        "--policy",
        type=Path,
        metavar="FOLDER",
        help="also show p and phi of demonstration tokens under this model",
    )
    data.add_argument(
        "--policy-rows",
        type=_count,
        default=16,
        metavar="N",
        help="number of demonstrations for --policy (default: 16)",
    )
    mu = commands.add_parser("mu", help="preview the schedule of mu, the weight of the SFT branch")
    preview = mu.add_subparsers(dest="mu_command", required=True, metavar="COMMAND").add_parser(
        "preview", help="show mu at every step, and how many rollouts and demonstrations the run needs"
    )
    preview.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw mu with matplotlib")
    for command in (train, check, data, preview):
        command.add_argument("config", type=Path, metavar="RUN.yaml")
        command.add_argument(
            "overrides",
            nargs="*",
            default=[],  # without a default argparse reports it as missing
            metavar="NAME=VALUE",
            help="settings to change, as in optim.lr=1e-6",
        )
    report = commands.add_parser(
        "report", help="write an HTML page with the curves, answers and settings of one or several runs"
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the output folder of a run")
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="page to write (default: report.html in the run's folder, or with several runs in the current folder)",
    )
    _add_evaluate(commands.add_parser("evaluate", help="measure a policy on a suite of benchmarks"))
    _add_talk(
        commands.add_parser("generate", help="let a policy answer the prompts of a file"),
        commands.add_parser("chat", help="talk to a policy"),
    )
    compare = commands.add_parser("compare", help="compare two evaluations, problem by problem")
    compare.add_argument("a", type=Path, metavar="A", help="folder of an evaluation (evaluate --output)")
    compare.add_argument("b", type=Path, metavar="B", help="folder of a second evaluation of the same suite")
    compare.add_argument(
        "--all", action="store_true", help="name all problems that flipped, not only the first ten"
    )
    settings = commands.add_parser("settings", help="list every setting with its default and its meaning")
    settings.add_argument("--suite", action="store_true", help="list those of an evaluation suite instead")
    settings.add_argument("--markdown", action="store_true", help="write docs/settings.md instead")
    commands.add_parser("doctor", help="show what is installed here, what does not fit and what is missing")
    return parser


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "policy", type=Path, metavar="POLICY", help="Hugging Face folder, or a run's checkpoints/step-N"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the suite to change, as in samples=2",
    )
    parser.add_argument(
        "--suite",
        default="paper",
        metavar="SUITE.yaml",
        help="file that lists the benchmarks (default: paper, which is examples/suites/paper.yaml)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for answers and results; answers in it are kept (default: evaluations/SUITE/POLICY in the folder "
        "of the policy's run, or in the current folder)",
    )
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="a running vLLM server, which gets the policy's weights (may be repeated; its key is in VLLM_API_KEY)",
    )


def _add_talk(generate: argparse.ArgumentParser, chat: argparse.ArgumentParser) -> None:
    for parser in (generate, chat):
        parser.add_argument(
            "policy", type=Path, metavar="FOLDER", help="Hugging Face folder, or a run's checkpoints/step-N"
        )
        parser.add_argument(
            "--temperature",
            type=_temperature,
            help="sampling temperature; 0 takes the most likely token (default: the run's, or 1)",
        )
        parser.add_argument(
            "--max-tokens",
            type=_positive,
            metavar="N",
            help="maximum number of tokens of an answer (default: the run's data.max_response_tokens, or 1024)",
        )
        parser.add_argument(
            "--system", metavar="TEXT", help="system prompt (default: the run's; an empty text: none)"
        )
        parser.add_argument(
            "--seed", type=_count, default=0, metavar="N", help="seed of sampling (default: 0)"
        )
        parser.add_argument(
            "--tensor",
            type=_positive,
            default=1,
            metavar="N",
            help="number of GPUs of the vLLM server that is started (default: 1)",
        )
        parser.add_argument(
            "--server",
            action="append",
            default=[],
            metavar="URL",
            help="a running vLLM server, which gets the policy's weights (its key is in VLLM_API_KEY)",
        )
    generate.add_argument(
        "prompts",
        type=Path,
        metavar="PROMPTS",
        help="a data file as in a run (true answers may be missing), or a .txt file with one prompt a line",
    )
    generate.add_argument(
        "--samples",
        type=_positive,
        default=1,
        metavar="N",
        help="number of answers to each prompt (default: 1)",
    )
    generate.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="write the answers as JSON lines instead of showing them",
    )


def _positive(text: str) -> int:
    if _count(text) == 0:
        raise argparse.ArgumentTypeError("a number above 0 is expected, got 0")
    return _count(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_TEMPERATURE:
        raise argparse.ArgumentTypeError(f"a number from 0 to {MAX_TEMPERATURE} is expected, got {text!r}")
    return value


def _resume(text: str) -> str:
    if text not in ("never", "auto") and not re.fullmatch(r"step-\d+", text):
        raise argparse.ArgumentTypeError(
            f"expected never, auto or the name of a checkpoint such as step-40, got {text!r}"
        )
    return text


def _check(run: RunConfig, args: argparse.Namespace, refuse: Callable[[ValueError], int]) -> int:
    from megatron_chord.rewards.graders import check_reward
    from megatron_chord.train.setup import check_run, load_data, plan_lines

    try:
        shape, method = check_run(run, _world_size(run))
        _check_machine(run)
        _check_push(run, shape, method)
        check_reward(run.reward)
        data = load_data(run, shape)
    except ValueError as error:
        return refuse(error)
    print(dump_config(run))
    print("\n".join(data.reports))
    plan_lines(run, shape, method, _world_size(run), print)
    command = shlex.join(["megatron-chord", "train", str(args.config), *args.overrides])
    print(f"\nNo fault found. Start it with: {command}")
    return 0


def _report(runs: Sequence[Path], output: Path | None) -> int:
    from megatron_chord.report.page import REPORT, write_report

    to = output or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT))
    try:
        print(f"report in {write_report(runs, to)}")
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    return 0


def _show_data(run: RunConfig, args: argparse.Namespace, refuse: Callable[[ValueError], int]) -> int:
    from rich.console import Console

    from megatron_chord.data.inspect import Inspector
    from megatron_chord.data.lens_page import lens_section
    from megatron_chord.data.lens_screen import show_lens
    from megatron_chord.data.page import page
    from megatron_chord.data.screen import show
    from megatron_chord.families.table import read_shape
    from megatron_chord.files import write_whole
    from megatron_chord.rewards.reading import truth_reader
    from megatron_chord.train.setup import load_data

    if args.html is not None and not args.html.parent.is_dir():
        return _refuse(f"--html: {args.html.parent} is no folder")
    sampled = args.policy_rows if args.policy is not None else 0
    inspector = Inspector(run.data.max_prompt_tokens, run.data.max_response_tokens, args.examples, sampled)
    try:
        data = load_data(run, read_shape(run.model.path), observe=inspector.observe)
        lens = _lens(run, args, data.template, inspector.observe["demonstrations"].sampled)
    except ValueError as error:
        return refuse(error)
    inspection = inspector.inspection(data.template, data.reports, partial(truth_reader, run.reward))
    console = Console(highlight=False, soft_wrap=True)
    show(inspection, console)
    if lens is not None:
        show_lens(lens, console, shown=args.examples)
    if args.html is not None:
        more = [] if lens is None else [lens_section(lens, shown=args.examples)]
        try:
            write_whole(args.html, page(inspection, title=str(args.config), more=more))
        except OSError as error:
            return _refuse(f"--html: {error}")
        print(f"page: {args.html}")
    return 0


def _lens(
    run: RunConfig, args: argparse.Namespace, template: ChatTemplate, rows: Sequence[Observed]
) -> Lens | None:
    """Compute p and phi of demonstration tokens with the model of ``--policy``. Returns None without ``--policy``.

    Raises:
        ValueError: the run has no demonstrations, or the model cannot be loaded.
    """
    from megatron_chord.config_io import one_line
    from megatron_chord.config_methods import ChordConfig, SimpleWeight
    from megatron_chord.data.lens import compute_lens, load_policy
    from megatron_chord.losses.sft import sft_term
    from megatron_chord.methods.chord import SFT
    from megatron_chord.methods.table import method_of

    if args.policy is None:
        return None
    if not rows:
        raise ValueError(
            "--policy needs demonstrations, but the run has no data.demonstrations, or --policy-rows is 0"
        )
    if isinstance(run.method, ChordConfig):
        term = method_of(run).terms(run.resolved_objective(), run.batch)[SFT]
        weighting = f"method.token_weight {one_line(run.method.token_weight).removeprefix('kind ')}"
        if run.method.cutoff < 1:
            weighting += f", no gradient above p = {run.method.cutoff:g}"
    else:
        term = sft_term(weight=SimpleWeight(kind="one"))
        weighting = (
            f"1 for each token, plain SFT (method {run.method.name} weighs by what the run will measure)"
        )
    print(f"reading {args.policy} and {len(rows)} demonstrations on the CPU ...", file=sys.stderr)
    return compute_lens(
        load_policy(args.policy), template, rows, term, policy=str(args.policy), weighting=weighting
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number is expected, got {text!r}")
    return int(text)


def _preview_mu(run: RunConfig, plot: Path | None) -> int:
    from megatron_chord.preview import lines, save_plot

    try:
        if plot is not None:
            save_plot(run, plot)
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    plain = not (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf8")
    print("\n".join(lines(run, plain=plain)))
    if plot is not None:
        print(f"plot: {plot}")
    return 0


def _train(run: RunConfig, args: argparse.Namespace, refuse: Callable[[ValueError], int]) -> int:
    from megatron_chord.importing import importing
    from megatron_chord.network import loopback
    from megatron_chord.runtime.launcher import end_with_launcher
    from megatron_chord.runtime.megatron import hide_warnings
    from megatron_chord.runtime.slurm import rank_of_task

    with importing():
        from megatron_chord.model.fp8 import set_environment
        from megatron_chord.train.setup import check_run
        from megatron_chord.train.stop import FILE_VARIABLE, StopRequest

    if "RANK" not in os.environ:
        os.environ.update(rank_of_task(os.environ))
    # Ranks of a job have a log each; others share a terminal, where one message is enough.
    speaks = os.environ.get("RANK", "0") == "0" or "CHORD_JOB" in os.environ
    set_environment(run.precision)  # before the check: it imports Megatron-Core if the run has overrides
    try:
        check_run(run, _world_size(run))
        _check_machine(run)
    except ValueError as error:
        return refuse(error) if speaks else 2
    if "RANK" not in os.environ and not run.rollout.servers and loopback() == "127.0.0.1":
        # All of the run is on this machine. (NCCL does not use loopback's IPv6 address.)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if "RANK" not in os.environ and run.parallel.ranks > 1:
        _launch(run.parallel.ranks, args.argv)
    end_with_launcher()
    hide_warnings()
    request = StopRequest()
    termination = _Termination(request, speaks=speaks)
    if FILE_VARIABLE in os.environ:
        # This is a rank of a job. Slurm sends SIGTERM to all processes of the job; the node's task decides what it
        # means.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, termination.on_signal)
    else:
        signal.signal(signal.SIGTERM, termination.on_signal)
    signal.signal(signal.SIGINT, termination.on_interrupt)
    request.listen()
    return _train_rank(run, args, request, termination, refuse if speaks else None)


def _train_rank(
    run: RunConfig,
    args: argparse.Namespace,
    request: StopRequest,
    termination: _Termination,
    refuse: Callable[[ValueError], int] | None,
) -> int:
    """Train on this rank. Returns the exit code, or ends the process if the rank must not wait for others
    (``train.ending``).

    ``refuse`` prints a refusal; None if this rank prints no messages that all ranks have.
    """
    from megatron_chord.cluster.outcome import record_end
    from megatron_chord.importing import importing

    with importing():
        from megatron_chord.train.ending import Failed, end_alone
        from megatron_chord.train.halt import Halted
        from megatron_chord.train.loop import train
        from megatron_chord.train.start import Refused
        from megatron_chord.train.stop import Stopped

    try:
        train(
            run,
            resume=args.resume,
            overwrite=args.overwrite,
            allow_changed=args.allow_changed,
            check_stop=termination.check,
            stop_wanted=request.is_made,
        )
    except Stopped as stopped:
        record_end(stopped.exit_code)
        if refuse is not None:
            print(f"{stopped}. Continue with: {_resuming(args.argv)}", file=sys.stderr)
        return stopped.exit_code
    except Halted as halted:
        if refuse is not None:
            print(f"error: {halted}", file=sys.stderr)
        return end_alone(halted.exit_code)
    except Refused as error:
        return refuse(error) if refuse is not None else 2
    except Failed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return end_alone(1)
    except SystemExit as ended:  # by a signal
        if isinstance(ended.code, int):
            end_alone(ended.code)
        raise
    record_end(0)
    return 0


def _check_push(run: RunConfig, shape: ModelShape, method: Method) -> None:
    """Raise ValueError if weights cannot reach the servers in time by the transport that the settings name.

    With ``auto`` it depends on the nodes; the preflight of a job and the planner know them.
    """
    from megatron_chord.costs.parameters import model_count
    from megatron_chord.plan.push import late_push
    from megatron_chord.train.setup import needs_servers

    transport = run.rollout.transport
    if transport == "auto" or not needs_servers(run, method):
        return
    late = late_push(run, transport, model_count(shape), gpus_per_node=run.rollout.tensor)
    if late is not None:
        raise ValueError(f"rollout.transport: {late}")


def _check_machine(run: RunConfig) -> None:
    """Raise ValueError if the run's precision needs something that this machine does not have. The message lists all
    faults."""
    if run.precision is None:
        return
    from megatron_chord import doctor

    machine = doctor.this_machine()
    faults = doctor.fp8_faults(run.precision, machine, rollouts_elsewhere=bool(run.rollout.servers))
    if faults:
        raise ValueError(
            f"precision {run.precision} needs {'; '.join(faults)}. `megatron-chord doctor` says more; without the "
            "setting the run trains in BF16"
        )


def _world_size(run: RunConfig) -> int:
    return int(os.environ.get("WORLD_SIZE", run.parallel.ranks))


def _launch(ranks: int, argv: Sequence[str]) -> NoReturn:
    """Replace this process by the launcher, which starts the ranks with the same command line."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    command = ["-m", "megatron_chord.runtime.launcher", str(ranks), "-m", "megatron_chord.cli", *argv]
    os.execv(sys.executable, [sys.executable, *command])


def _resuming(argv: Sequence[str]) -> str:
    """The command line that continues the run that ``argv`` started."""
    kept = [text for text in argv if text != "--overwrite"]
    if "--resume" in kept:
        at = kept.index("--resume")
        del kept[at : at + 2]
    kept = [text for text in kept if not text.startswith("--resume=")]
    return shlex.join(["megatron-chord", *kept, "--resume", "auto"])


class _Termination:
    """Handles the signals that end a run.

    After a SIGTERM the ``finally`` blocks run, which stop the rollout server. A second SIGTERM ends the process
    immediately: its children die with it, and the next run removes the folders that are left. The first Ctrl-C during
    training requests a stop with a checkpoint. Later ones, and those before the first step, act like SIGTERM.
    """

    SAME_S = 0.5
    """Seconds. A rank gets Ctrl-C from the terminal, and again from the launcher. A signal that follows another one
    within this time is ignored as such a copy."""

    def __init__(self, request: StopRequest, *, speaks: bool) -> None:
        self._request = request
        self._speaks = speaks
        self._is_training = False
        self._code: int | None = None
        self._last = -math.inf

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_another():
            return
        if self._code is not None:
            os._exit(self._code)
        self._code = 128 + number
        raise SystemExit(self._code)

    def on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._is_training or self._request.is_made():
            return self.on_signal(number, frame)
        self._is_another()
        self._request.make()
        if self._speaks:  # print is not allowed here: it may interrupt itself
            os.write(
                2,
                b"\nCtrl-C: the run will write a checkpoint at the next safe point and end. "
                b"Press Ctrl-C again to end now without a checkpoint.\n",
            )

    def check(self) -> None:
        """End the process if a signal has arrived. Call it before every step.

        If a signal arrives while a ``__del__`` runs, Python prints the exception of its handler and goes on.
        """
        self._is_training = True
        if self._code is not None:
            raise SystemExit(self._code)

    def _is_another(self) -> bool:
        """True if this signal is a new one, and not a copy of the signal before (``SAME_S``)."""
        before, self._last = self._last, time.monotonic()
        return self._last - before > self.SAME_S


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
