"""Time to read demonstrations, cold and warm, against the bare tokenizer on the same cores.

    python benchmarks/data.py                      # 300 demonstrations of 8k tokens: a minute on two cores
    python benchmarks/data.py --rows 46000         # the size of Openr1-Math-46k; 12 GB on disk

The tokenizer is a byte-level BPE of 16,000 tokens with Qwen's pre-tokenizer, trained here on this project's own text;
`--tokenizer FOLDER` takes another. **bare** is `encode_batch` of the rendered conversations on all cores, with the ids
fetched. **cold** is `load_demonstrations` and the writing of the cache: JSON, checks, template, tokenizer, mask, files.
**warm** finds them in the cache: hash of the data file, and the mapping. The first second is one thread's alone
(`cores.ALONE_S`), which shows with few rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def main() -> None:
    arguments = _arguments()
    from megatron_chord.data.cache import remembering
    from megatron_chord.data.cursor import fingerprint
    from megatron_chord.data.demonstrations import load_demonstrations
    from megatron_chord.data.templates import load_template

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        tokenizer = arguments.tokenizer or _train_tokenizer(folder / "tokenizer")
        template = load_template(tokenizer)
        file = folder / "demonstrations.jsonl"
        _write_rows(file, template, arguments.rows, arguments.tokens)
        settings = {"max_prompt_tokens": 4096, "max_response_tokens": 1 << 20, "overlong": "fail"}
        load = remembering(load_demonstrations, folder / "cache", settings)
        bare = _timed(partial(_bare, template, file))
        (cold_rows, _), cold = _measured(lambda: load(file, template))
        (warm_rows, _), warm = _measured(lambda: load(file, template))
        prints = _timed(lambda: fingerprint(warm_rows))
        assert warm_rows[-1] == cold_rows[-1]
        tokens = sum(len(row.token_ids) for row in cold_rows)
        cores = len(os.sched_getaffinity(0))
        print(
            f"{arguments.rows} demonstrations, {tokens:,} tokens, {file.stat().st_size / 1e6:.0f} MB, {cores} cores"
        )
        print(f"bare   {bare:8.2f} s  {tokens / bare / 1e6:.2f} M tokens/s")
        print(f"cold   {cold:8.2f} s  {cold / bare:.2f} x bare")
        print(f"warm   {warm:8.2f} s, and {prints:.2f} s for the cursor's fingerprint")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"peak memory of this process {peak:.2f} GB")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=8000, help="of each demonstration")
    parser.add_argument(
        "--tokenizer", type=Path, help="Hugging Face folder with a fast tokenizer and a chat template"
    )
    parser.add_argument("--folder", type=Path, help="where the files are made")
    return parser.parse_args()


def _timed(action: Callable[[], Any]) -> float:
    return _measured(action)[1]


def _measured(action: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


def _bare(template: Any, file: Path, batch: int = 64) -> int:
    """The rendered conversations through the bare tokenizer. Their making is not timed: it is a replaced string."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    backend, total = template.tokenizer.backend_tokenizer, 0
    texts: list[str] = []
    with file.open() as lines:
        for line in lines:
            row = json.loads(line)
            texts.append(
                f"<|im_start|>user\n{row['problem']}<|im_end|>\n<|im_start|>assistant\n{row['solution']}<|im_end|>\n"
            )
            if len(texts) == batch:
                total += _encoded(backend, texts)
                texts = []
    return total + _encoded(backend, texts)


def _encoded(backend: Any, texts: list[str]) -> int:
    return sum(len(one.ids) for one in backend.encode_batch(texts, add_special_tokens=False))


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
    """Paragraphs of this project's text in random order, about ``tokens`` tokens a row."""
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
