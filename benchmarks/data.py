"""Time and memory to read demonstrations, cold and warm, against the bare tokenizer on the same cores.

    python benchmarks/data.py                            # 300 demonstrations of 8k tokens: a minute on two cores
    python benchmarks/data.py --rows 1000 2000 4000      # how time and memory grow; 5 minutes
    python benchmarks/data.py --rows 46000               # the size of Openr1-Math-46k; half an hour, 4 GB on disk

The tokenizer is a byte-level BPE of 16,000 tokens with Qwen's pre-tokenizer, trained here on this project's own text;
`--tokenizer FOLDER` takes another. Each number of rows is measured in a process of its own:

* **bare**: `encode_batch_fast`, the tokenizer's fastest call, on the rendered conversations, with the ids fetched, on
  all cores. It runs before and after **cold**, and the mean counts, because other jobs may share the machine.
  **offsets**: `encode_batch`, the usual call.
* **cold**: `load_demonstrations` and the writing of the cache: JSON, checks, template, tokenizer, mask, files. In the
  first three seconds one thread works alone (`cores.ALONE_S`), which shows with few rows.
* **CPU**: seconds of all cores, with the processes that render templates; it depends less on other jobs.
* **warm**: found in the cache: hash of the data file, and the mapping.
* **peak**: memory of the process during cold, and how much of it came on top of what was there before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Time:
    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Result:
    rows: int
    tokens: int
    bare: Time
    offsets: Time
    cold: Time
    warm: Time
    fingerprint: Time
    before_bytes: int
    peak_bytes: int


def main() -> None:
    arguments = _arguments()
    if arguments.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(
        f"{time.strftime('%Y-%m-%d')}; {cores} cores, load {load:.1f}; {arguments.tokens} tokens a row",
        flush=True,
    )
    print(
        "   rows  M tokens |  bare s  offsets s  cold s  cold/bare  cold/offsets "
        "| CPU: bare s  offsets s  cold s  cold/bare  cold/offsets "
        "| warm s  fingerprint s | peak MB  of this new",
        flush=True,
    )
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        tokenizer = arguments.tokenizer or _train_tokenizer(Path(folder) / "tokenizer")
        for rows in arguments.rows:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(_measure, (tokenizer, rows, arguments.tokens, arguments.folder)))
            print(_line(results[-1]), flush=True)
    _print_whole(results, arguments.whole)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[300], help="numbers of rows, one measurement for each"
    )
    parser.add_argument("--tokens", type=int, default=8000, help="tokens of each demonstration")
    parser.add_argument("--cores", type=int, help="number of this machine's cores to use")
    parser.add_argument("--whole", type=int, default=46_000, help="number of rows to estimate")
    parser.add_argument(
        "--tokenizer", type=Path, help="Hugging Face folder with a fast tokenizer and a chat template"
    )
    parser.add_argument("--folder", type=Path, help="where the files are made")
    return parser.parse_args()


def _measure(tokenizer: Path, rows: int, tokens: int, place: Path | None) -> Result:
    from megatron_chord.data.cache import cached_loader
    from megatron_chord.data.cursor import fingerprint
    from megatron_chord.data.demonstrations import load_demonstrations
    from megatron_chord.data.templates import load_template

    template = load_template(tokenizer)
    tokenizers: Any = template.tokenizer
    backend = tokenizers.backend_tokenizer
    with tempfile.TemporaryDirectory(dir=place) as name:
        file = Path(name) / "demonstrations.jsonl"
        _write_rows(file, template, rows, tokens)
        settings = {"max_prompt_tokens": 4096, "max_response_tokens": 1 << 20, "overlong": "fail"}
        load = cached_loader(load_demonstrations, Path(name) / "cache", settings)

        def cold() -> Any:
            found = load(file, template)
            template.renderer.stop_processes()  # its processes count only after they have ended
            return found

        before, _ = _measured(partial(_encoded, backend.encode_batch_fast, file))
        offsets, _ = _measured(partial(_encoded, backend.encode_batch, file))
        _forget_peak()
        there = _memory("VmRSS")
        cold_time, (cold_rows, _) = _measured(cold)
        peak = _memory("VmHWM")
        after, _ = _measured(partial(_encoded, backend.encode_batch_fast, file))
        warm, (warm_rows, _) = _measured(lambda: load(file, template))
        prints, _ = _measured(lambda: fingerprint(warm_rows))
        assert warm_rows[-1] == cold_rows[-1]
        return Result(
            rows=rows,
            tokens=sum(len(row.token_ids) for row in cold_rows),
            bare=Time((before.wall_s + after.wall_s) / 2, (before.cpu_s + after.cpu_s) / 2),
            offsets=offsets,
            cold=cold_time,
            warm=warm,
            fingerprint=prints,
            before_bytes=there,
            peak_bytes=peak,
        )


def _line(found: Result) -> str:
    bare, cold = found.bare, found.cold
    return (
        f"{found.rows:7}  {found.tokens / 1e6:8.1f} |{bare.wall_s:8.2f}{found.offsets.wall_s:11.2f}{cold.wall_s:8.2f}"
        f"{cold.wall_s / bare.wall_s:11.2f}{cold.wall_s / found.offsets.wall_s:14.2f} |{bare.cpu_s:12.2f}"
        f"{found.offsets.cpu_s:11.2f}{cold.cpu_s:8.2f}{cold.cpu_s / bare.cpu_s:11.2f}"
        f"{cold.cpu_s / found.offsets.cpu_s:14.2f} |{found.warm.wall_s:7.2f}{found.fingerprint.wall_s:15.2f} |"
        f"{found.peak_bytes / 1e6:8.0f}{(found.peak_bytes - found.before_bytes) / 1e6:13.0f}"
    )


def _print_whole(results: list[Result], rows: int) -> None:
    last = results[-1]
    if last.rows < rows:
        times = rows / last.rows
        walls = [one.wall_s * times for one in (last.bare, last.cold, last.warm)]
        print(
            f"{rows} rows, from {last.rows}: bare {walls[0]:.0f} s, cold {walls[1]:.0f} s, warm {walls[2]:.1f} s"
        )
    if len(results) > 1:
        first = results[0]
        new = (last.peak_bytes - last.before_bytes) - (first.peak_bytes - first.before_bytes)
        each = new / (last.tokens - first.tokens)
        print(f"peak memory grows by {each:.1f} bytes a token; the result itself has 5")


def _measured(action: Callable[[], Any]) -> tuple[Time, Any]:
    wall, cpu = time.perf_counter(), _cpu_s()
    result = action()
    return Time(time.perf_counter() - wall, _cpu_s() - cpu), result


def _cpu_s() -> float:
    """Return the CPU seconds of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _memory(field: str) -> int:
    """Return bytes of this process: VmRSS now, and VmHWM, the maximum since ``_forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _encoded(encode: Callable[..., list[Any]], file: Path) -> int:
    """Return the number of tokens of the rendered conversations. Rendering only replaces a part of a string here."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    return sum(len(one.ids) for texts in _batches(file) for one in encode(texts, add_special_tokens=False))


def _batches(file: Path, batch: int = 64) -> Iterator[list[str]]:
    texts: list[str] = []
    with file.open() as lines:
        for line in lines:
            row = json.loads(line)
            texts.append(
                f"<|im_start|>user\n{row['problem']}<|im_end|>\n<|im_start|>assistant\n{row['solution']}<|im_end|>\n"
            )
            if len(texts) == batch:
                yield texts
                texts = []
    yield texts


def _sources() -> list[str]:
    files = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "megatron_chord").rglob("*.py")])
    return [file.read_text(encoding="utf-8") for file in files]


def _train_tokenizer(folder: Path) -> Path:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sources(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


def _write_rows(file: Path, template: Any, rows: int, tokens: int) -> None:
    """Write paragraphs of this project's text in random order, with about ``tokens`` tokens a row."""
    pieces = [
        piece for text in _sources() for piece in text.split("\n\n") if "<" not in piece and piece.strip()
    ]
    sizes = [len(one.ids) for one in template.tokenizer.backend_tokenizer.encode_batch(pieces)]
    draw = random.Random(0)
    with file.open("w") as lines:
        for index in range(rows):
            chosen: list[str] = []
            count = 0
            while count < tokens:
                place = draw.randrange(len(pieces))
                chosen.append(pieces[place])
                count += sizes[place]
            row = {"problem": f"Problem {index}: {chosen[0]}", "solution": f"Answer: {' '.join(chosen)}"}
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
