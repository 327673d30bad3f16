"""Make the quick start's content: problems, demonstrations, a tokenizer and a small base policy.

    python examples/arithmetic/make.py

A problem is a diary of three or four gains and losses. The answer is the number that is left. This script pre-trains
the base policy from random weights on three kinds of conversation:

* Diaries that end in "Show workings." are answered day by day and correctly. So the policy is able to do the sums.
* Other diaries are answered only with the final number. This becomes the policy's habit. Its answers are mostly wrong,
  because it cannot do all sums at once.
* A few diaries without "Show workings." are answered with workings that are often wrong. So the policy also writes
  workings without a request, in about one answer of eight, and these are often wrong.

The demonstrations have correct workings for every diary, without a request. From them the policy must learn to use a
skill that it already has. About a dozen steps are enough for this, which suits a quick start.

The seed determines everything, except that weights differ in their last bits between machines.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).parent

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
SYSTEM = "<|system|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

NAMES = [
    "Ann",
    "Ben",
    "Cho",
    "Dan",
    "Eva",
    "Fay",
    "Gus",
    "Hal",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Oda",
    "Pam",
]
THINGS = ["pens", "nuts", "eggs", "books", "coins", "shells", "stamps", "apples", "stones", "cards"]
GAINS = ("buys {}", "finds {}", "gets {}", "wins {}", "picks {}")
REQUEST = "Show workings."
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri")
TOOL = {
    "name": "count",
    "description": "How many are left.",
    "parameters": {
        "type": "object",
        "properties": {
            "start": {"type": "integer"},
            "changes": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["start", "changes"],
    },
}
LOSSES = ("loses {}", "sells {}", "breaks {}", "drops {}", "gives away {}")


# ------------------------------------------------------------------------------------------------ problems


Sum = tuple[int, str, int, int]
"""(left, sign, right, result)"""


def chain(rng: random.Random, count: int) -> tuple[Sum, ...]:
    """Return sums. Each sum starts from the result of the sum before it."""
    total, sums = rng.randint(10, 89), []
    for _ in range(count):
        sign, right = rng.choice("+-"), rng.randint(1, 9)
        if not 1 <= (total + right if sign == "+" else total - right) <= 99:
            sign = "-" if sign == "+" else "+"
        result = total + right if sign == "+" else total - right
        sums.append((total, sign, right, result))
        total = result
    return tuple(sums)


@dataclass(frozen=True)
class Story:
    text: str
    sums: tuple[Sum, ...]
    """(left, sign, right, result), in the order of the story."""

    @property
    def answer(self) -> str:
        return str(self.sums[-1][3])


def make_story(rng: random.Random) -> Story:
    name, thing, sums = rng.choice(NAMES), rng.choice(THINGS), chain(rng, rng.choice((3, 4)))
    deeds = [rng.choice(GAINS if sign == "+" else LOSSES).format(right) for _, sign, right, _ in sums]
    diary = ", ".join(f"{day} {deed}" for day, deed in zip(DAYS, deeds, strict=False))
    return Story(f"{name} has {sums[0][0]} {thing}. {diary}. How many {thing} now?", sums)


def workings(sums: tuple[Sum, ...]) -> str:
    lines = zip(DAYS, sums, strict=False)
    return "\n".join(f"{day} {left}{sign}{right}={result}" for day, (left, sign, right, result) in lines)


def demonstration_text(story: Story) -> str:
    return f"{workings(story.sums)}\n#### {story.answer}"


def sloppy_solution(rng: random.Random, story: Story, error_rate: float) -> str:
    """Return workings like a demonstration's. Each result is wrong with probability `error_rate`; later sums use it."""
    sums, total = [], story.sums[0][0]
    for _, sign, right, _ in story.sums:
        result = total + right if sign == "+" else total - right
        if rng.random() < error_rate:
            result += rng.choice((-10, -2, -1, 1, 2, 10))
        result = max(result, 0)
        sums.append((total, sign, right, result))
        total = result
    return f"{workings(tuple(sums))}\n#### {total}"


def pretraining_conversation(
    rng: random.Random, reserved: set[str], args: argparse.Namespace
) -> tuple[str, str]:
    """(question, answer). Stories that the data files use are never drawn."""
    story = make_story(rng)
    while story.text in reserved:
        story = make_story(rng)
    if rng.random() < args.asked:
        return f"{story.text} {REQUEST}", demonstration_text(story)
    if rng.random() < args.sloppy:
        return story.text, sloppy_solution(rng, story, args.error_rate)
    return story.text, f"#### {story.answer}"


def distinct_stories(rng: random.Random, count: int) -> list[Story]:
    stories: dict[str, Story] = {}
    while len(stories) < count:
        story = make_story(rng)
        stories[story.text] = story
    return list(stories.values())


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(stories: list[Story], args: argparse.Namespace) -> None:
    train, rest = stories[: args.train], stories[args.train :]
    demonstrations, heldout = rest[: args.demonstrations], rest[args.demonstrations :]
    for name, rows in (("train", train), ("heldout", heldout)):
        write_jsonl(
            args.output / f"problems_{name}.jsonl",
            [{"id": f"{name}-{i}", "problem": s.text, "answer": s.answer} for i, s in enumerate(rows)],
        )
    # Demonstrations of other problems than the policy trains on, and, for methods that need them, of the same problems.
    for name, file, solved in (
        ("expert", "demonstrations", demonstrations),
        ("demonstration", "demonstrations_aligned", train),
    ):
        write_jsonl(
            args.output / f"{file}.jsonl",
            [
                {"id": f"{name}-{i}", "problem": s.text, "solution": demonstration_text(s)}
                for i, s in enumerate(solved)
            ],
        )
    write_calls(train[: args.calls], heldout[: args.calls], args.output)


def write_calls(train: list[Story], heldout: list[Story], folder: Path) -> None:
    """The same diaries as requests for a tool call, for the tools half of tools/table.py."""
    for name, stories in (("train", train), ("heldout", heldout)):
        rows = [
            {"id": f"{name}-{i}", "problem": s.text, "tools": [TOOL], "answer": [call(s)]}
            for i, s in enumerate(stories)
        ]
        write_jsonl(folder / f"calls_{name}.jsonl", rows)
    rows = [
        {"id": f"call-{i}", "problem": s.text, "tools": [TOOL], "solution": call_text(s)}
        for i, s in enumerate(train)
    ]
    write_jsonl(folder / "calls_demonstrations.jsonl", rows)


def call(story: Story) -> dict[str, Any]:
    changes = [right if sign == "+" else -right for _, sign, right, _ in story.sums]
    return {"name": TOOL["name"], "arguments": {"start": story.sums[0][0], "changes": changes}}


def call_text(story: Story) -> str:
    return f"<think>{workings(story.sums)}</think>\n<tool_call>\n{json.dumps(call(story))}\n</tool_call>"


# ----------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer(folder: Path, rng: random.Random, vocabulary: int) -> Qwen2Tokenizer:
    """A small vocabulary in Qwen's own pipeline, because AutoTokenizer chooses the tokenizer by the model type.

    Each digit is a token, because the policy learns sums digit by digit. Single bytes encode any other text, such as
    GSM8K's.
    """
    text = []
    for _ in range(5000):
        story = make_story(rng)
        text += [f"{story.text} {REQUEST}", "#### " + story.answer, *workings(story.sums).split("\n")]
    markers = [PAD, SYSTEM, USER, ASSISTANT, END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=markers,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline = Qwen2Tokenizer().backend_tokenizer
    pipeline.train_from_iterator(text, trainer)
    trained = json.loads(pipeline.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=markers[1:4],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    loaded = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(loaded, text)
    return loaded


def check_tokenizer(tokenizer: Qwen2Tokenizer, text: list[str]) -> None:
    hard = [
        " a  b",
        "\n\n- x\t1",
        "Janet\u2019s 16 \u20ac",
        "\u6f22\u5b57 \u00e9\u00a0\r\n\x00",
        "\U0001f986",
        "#### 42",
    ]
    assert set(tokenizer.all_special_tokens) == {PAD, SYSTEM, USER, ASSISTANT, END}
    for sample in [*hard, *text[:200]]:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample, f"decoding changes {sample!r}"
    assert len(tokenizer.encode("1234567890")) == 10, "digits do not stand alone"
    question = [{"role": "user", "content": "1+1"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answer = {"role": "assistant", "content": "1+1=2"}
    whole = tokenizer.apply_chat_template([*question, answer], return_dict=False)
    assert whole[: len(prompt)] == prompt, "the prompt's ids are no prefix of the conversation's"
    assert whole[-1] == tokenizer.eos_token_id, "the assistant's turn does not end with the stop token"


# -------------------------------------------------------------------------------------------------- policy


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_theta=10000.0,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def pad_vocabulary(model: Qwen2ForCausalLM, size: int, like: int) -> None:
    """Give embedding and head ``size`` rows; the new ones are copies of row ``like``, a token that is never sampled.

    vLLM's CPU build repeats its log-probs bit for bit with 512 rows, and does not with the tokenizer's 397.
    """
    old = [model.model.embed_tokens.weight.data, model.lm_head.weight.data]
    model.resize_token_embeddings(size, mean_resizing=False)
    for weight, before in zip((model.model.embed_tokens.weight, model.lm_head.weight), old, strict=True):
        weight.data[: len(before)] = before
        weight.data[len(before) :] = before[like]


def batches(
    tokenizer: Qwen2Tokenizer, rng: random.Random, reserved: set[str], args: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids [B, T], labels [B, T]) without end; prompts and padding are labelled -100."""
    while True:
        rows = []
        for _ in range(16 * args.batch):
            question, answer = pretraining_conversation(rng, reserved, args)
            prompt = tokenizer.encode(f"{USER}{question}{END}{ASSISTANT}")
            rows.append((prompt, tokenizer.encode(f"{answer}{END}")))
        rows.sort(
            key=lambda row: len(row[0]) + len(row[1])
        )  # rows of like length share a batch: little padding
        starts = list(range(0, len(rows), args.batch))
        rng.shuffle(starts)
        for start in starts:
            yield collate(rows[start : start + args.batch], tokenizer.pad_token_id)


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def pretrain(
    model: Qwen2ForCausalLM, source: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, lr: float
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    scale = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, 0.02 + 0.98 * (1 - s / steps))
    )
    bar = Progress(
        TextColumn("pre-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f} per answer"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with bar:
        task = bar.add_task("", total=steps, loss=float("nan"))
        for _ in range(steps):
            ids, labels = next(source)
            hidden = model.model(
                input_ids=ids
            ).last_hidden_state  # padding is on the right, so causal attention never sees it
            keep = (
                labels[:, 1:] != -100
            )  # logits only where there is a label, because most positions are prompts
            logits, targets = model.lm_head(hidden[:, :-1][keep]), labels[:, 1:][keep]
            # The loss is a mean over conversations and not over tokens. A batch has rows of one length, so with a mean
            # over tokens, tokens of short answers would have a larger weight.
            loss = F.cross_entropy(logits, targets, reduction="sum") / len(ids)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scale.step()
            bar.update(task, advance=1, loss=loss.item())


@torch.no_grad()
def accuracy(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    stories: list[Story],
    sample: bool,
    suffix: str = "",
) -> tuple[float, float]:
    """(share of right answers, share of answers with workings)."""
    prompts = [tokenizer.encode(f"{USER}{story.text}{suffix}{END}{ASSISTANT}") for story in stories]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    mask = (ids != tokenizer.pad_token_id).long()
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=56, **how)
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    right = [
        text.rpartition("####")[2].strip() == story.answer for text, story in zip(texts, stories, strict=True)
    ]
    return sum(right) / len(right), sum("=" in text for text in texts) / len(texts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: float, text: str) -> None:
        parser.add_argument(name, type=type(default), default=default, help=f"{text} (default {default})")

    parser.add_argument(
        "--output", type=Path, default=HERE, help="folder to write to (default: this script's)"
    )
    add("--seed", 0, "seed of data, tokenizer, initial weights and order")
    add("--threads", 2, "number of CPU threads; 1 is faster if other programs use the cores")
    add("--steps", 2500, "pre-training steps")
    add("--batch", 64, "conversations per pre-training step")
    add("--lr", 3e-3, "peak learning rate")
    add("--asked", 0.5, "share of diaries that ask for workings")
    add("--sloppy", 0.2, "share of sloppy workings among the rest")
    add("--error-rate", 0.4, "probability of a wrong result in sloppy workings")
    add("--vocabulary", 512, "number of tokens of the tokenizer, 256 of them bytes")
    add("--train", 2000, "training problems")
    add("--demonstrations", 1000, "demonstrations")
    add("--heldout", 200, "held-out problems")
    add(
        "--calls",
        64,
        "training problems and held-out problems that are also written as requests for a tool call",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    start = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    folder = args.output / "policy"
    folder.mkdir(parents=True, exist_ok=True)

    stories = distinct_stories(rng, args.train + args.demonstrations + args.heldout)
    write_data(stories, args)
    tokenizer = make_tokenizer(folder, rng, args.vocabulary)

    model = make_model(tokenizer)
    source = batches(tokenizer, rng, {story.text for story in stories}, args)
    pretrain(model, source, args.steps, args.lr)
    pad_vocabulary(model, args.vocabulary, tokenizer.pad_token_id)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
    )
    model.save_pretrained(folder)

    heldout = stories[-args.heldout :]
    measured = (
        ("greedy", False, ""),
        ("sampled", True, ""),
        ("greedy, asked for workings", False, f" {REQUEST}"),
    )
    for name, sample, suffix in measured:
        right, worked = accuracy(model.eval(), tokenizer, heldout, sample, suffix)
        print(
            f"base policy, {name}: {right:.1%} of {len(heldout)} held-out problems, {worked:.1%} with workings"
        )
    print(f"wrote {args.output} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
