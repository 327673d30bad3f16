"""Interrupt, pause and kill tools/convert.py at random moments: how soon it ends, and what it leaves.

    python benchmarks/convert_signals.py [--layers 24] [--interrupts 4] [--rounds 15] [--seed 1] [--folder /var/tmp]

The program makes a random model in BF16 of about 0.13 + 0.03 GB a layer. First it sends Ctrl-C (SIGINT) to each command
at random moments, and measures the seconds until the process is gone. Then it starts two conversions into one target.
One of them is killed, interrupted, or paused for some seconds, at a random moment. Whatever is under the target's name
afterwards must be the model (``verify``), and the next conversion must succeed and leave nothing but its target.

Exits with 0 when each interrupted command ends within 2 seconds with one line and exit code 130, and each round holds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from shared import circumstances, qwen2_config, save_model

TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert.py"
LIMIT_S = 2.0
BEGIN_S = 0.3
"""Seconds in which Python starts. Until then a signal meets Python itself."""
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGSTOP)


@dataclass
class Command:
    """A running command of the tool. Its lines of stdout and stderr go to a file."""

    arguments: tuple[str | Path, ...]
    said: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        with self.said.open("wb") as said:
            command = [sys.executable, str(TOOL), *map(str, self.arguments)]
            self.process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)

    def lines(self) -> list[str]:
        return self.said.read_text().splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--interrupts", type=int, default=4, help="interrupts of each command (default 4)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of two conversions (default 15)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        save_model(folder / "hf", qwen2_config(hidden=1024, layers=args.layers, vocab=65536), "bf16")
        size = sum(file.stat().st_size for file in (folder / "hf").glob("*.safetensors"))
        commands = {
            "hf-to-megatron": ("hf-to-megatron", folder / "hf", folder / "megatron"),
            "megatron-to-hf": ("megatron-to-hf", folder / "megatron", folder / "back"),
            "verify": ("verify", folder / "hf", folder / "megatron"),
        }
        seconds = {name: undisturbed(folder, *command) for name, command in commands.items()}
        times = ", ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items())
        print(f"a model of {size / 1e9:.2f} GB; undisturbed: {times}", flush=True)
        commands["hf-to-megatron"] = ("hf-to-megatron", folder / "hf", folder / "target")
        commands["megatron-to-hf"] = ("megatron-to-hf", folder / "megatron", folder / "target")
        good = [
            interrupt(folder, *commands[name], after=draw.uniform(BEGIN_S, seconds[name]))
            for name in commands
            for _ in range(args.interrupts)
        ]
        for number in range(args.rounds):
            kind = draw.choice(["hf-to-megatron", "megatron-to-hf"])
            good.append(disturb(folder, number, commands[kind], seconds[kind], draw))
    print(circumstances("transformers"))
    print("PASS" if all(good) else "FAIL")
    return 0 if all(good) else 1


def undisturbed(folder: Path, *arguments: str | Path) -> float:
    begun = time.monotonic()
    command = Command(arguments, folder / "said")
    if command.process.wait():
        raise SystemExit("\n".join(command.lines()))
    return time.monotonic() - begun


def interrupt(folder: Path, *arguments: str | Path, after: float) -> bool:
    """Send SIGINT to one command. Return whether it ended as it should."""
    command = Command(arguments, folder / "said")
    time.sleep(after)
    command.process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    code = command.process.wait()
    took = time.monotonic() - sent
    target, left = folder / "target", sorted(path.name for path in folder.glob(".*"))
    print(
        f"{arguments[0]:<15} interrupted after {after:5.1f} s: ended {took:4.2f} s later, exit code {code}, left: "
        f"{left or 'nothing'}; {command.lines()}",
        flush=True,
    )
    finished = code == 0 or target.exists()  # the signal came too late
    shutil.rmtree(target, ignore_errors=True)
    return took < LIMIT_S and not left and (finished or (code == 130 and len(command.lines()) == 1))


def disturb(
    folder: Path, number: int, arguments: tuple[str | Path, ...], seconds: float, draw: random.Random
) -> bool:
    """Run two conversions into one target, and disturb one of them. Return whether the target was whole or absent."""
    target, kind = folder / "target", SIGNALS[number % len(SIGNALS)]
    processes = [Command(arguments, folder / "one")]
    time.sleep(draw.uniform(0, 0.5) * seconds)
    processes.append(Command(arguments, folder / "two"))
    victim = draw.choice(processes)
    # Both run at once, so each takes longer than alone.
    time.sleep(draw.uniform(0.2, 1.2) * seconds)
    if victim.process.poll() is None:
        victim.process.send_signal(kind)
    if kind == signal.SIGSTOP:
        time.sleep(seconds)
        victim.process.send_signal(signal.SIGCONT)
    codes = [command.process.wait() for command in processes]
    was_there = target.exists()
    whole = was_there and verified(folder)
    ending = [command.lines()[-1:] for command in processes]
    left = sorted(path.name.split(".")[-1] for path in folder.glob(".*"))
    following = "not needed"
    good = whole == was_there and not any("Traceback" in line for c in processes for line in c.lines())
    if not was_there:
        code = Command(arguments, folder / "said").process.wait()
        good &= code == 0 and verified(folder) and not list(folder.glob(".*"))
        following = f"exit code {code}"
    shutil.rmtree(target, ignore_errors=True)
    for path in folder.glob(".*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    state = "absent" if not was_there else "whole" if whole else "BROKEN"
    which = "first" if victim is processes[0] else "second"
    print(
        f"round {number + 1:>2} {arguments[0]:<15} {kind.name} to the {which}: "
        f"exit codes {codes}, target {state}, left: {left or 'nothing'}, next: {following}; {ending}",
        flush=True,
    )
    return good


def verified(folder: Path) -> bool:
    return Command(("verify", folder / "hf", folder / "target"), folder / "said").process.wait() == 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
