"""Make the world of `benchmarks/paper_in_small.py`: problems, demonstrations, a tokenizer and a small base policy.

    python examples/evidence/make.py

The world has what the CHORD paper's experiments have. ``questions.py`` defines its questions and styles.

* The base policy is competent in its own style: it answers about half of the questions of ability A right, mostly by
  writing every second result (``,6,4#4``). It begins about one answer of ten with ``{``, as the demonstrations do, but
  it does not master that style on these questions.
* The demonstrations are few, right and four to six times as long: ``{7+5=2|2*3=6|6-8=8|8+6=4dabe}#4``. They have every
  step, and letters without meaning ("murmurs") that the base policy has never seen.
* Ability B (sorting digits) is never trained again. It shows what is forgotten. Ability C (two operators) shows whether
  the new style leaks into questions that the base policy answers at once.

Pre-training stops by a rule, not at a fixed step, so that every seed gives a base policy of about the same ability. On
one machine the seed determines everything; on other machines the last bits of the weights differ.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from questions import Question, chain_question, demonstration, direct, distinct, jumps, sort_question, steps
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).parent
USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
SYSTEM = "<|system|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ONE, TWO, A, B = "one", "two", "a", "b"


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The composition of a pre-training batch, as shares of the conversations."""

    one: float
    """Questions with one operator, answered at once."""
    two: float
    """Questions with two operators: 70 % answered at once, 30 % with every step."""
    a: float
    """Questions of ability A. The rest of the batch is ability B."""
    steps: float = 0.004
    """Share of questions of ability A that are answered with every step."""
    habit: float = 0.0
    """Share of questions of ability A whose answer is only the first token of the demonstrations' style."""
    jumps: float = 0.7
    """Share of questions of ability A that are answered with every second result. The others are answered at once."""


FACTS = Mix(one=0.7, two=0.1, a=0.0)
"""The first stage has results of single operations. Without this stage nothing else is learned."""
OWN_STYLE = Mix(one=0.12, two=0.30, a=0.55, steps=0.006)
WITH_HABIT = Mix(one=0.12, two=0.30, a=0.55, habit=0.12, jumps=0.66)


# ------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class World:
    train: list[Question]
    demonstrations: list[Question]
    heldout: list[Question]
    second: list[Question]
    transfer: list[Question]
    validation: list[Question]
    """Questions of ability A that decide when pre-training stops. They are not reported."""

    @property
    def reserved(self) -> set[str]:
        """Questions that pre-training never shows. Ability C has too few different questions to exclude them."""
        parts = (self.train, self.demonstrations, self.heldout, self.second, self.validation)
        return {question.text for part in parts for question in part}


def make_world(rng: random.Random, args: argparse.Namespace) -> World:
    counts = (args.train, args.demonstrations, args.heldout, args.validation)
    questions = distinct(rng, sum(counts), lambda r: chain_question(r, 4))
    parts = []
    for count in counts:
        parts.append(questions[:count])
        questions = questions[count:]
    train, demonstrations, heldout, validation = parts
    return World(
        train=train,
        demonstrations=demonstrations,
        heldout=heldout,
        second=distinct(rng, args.heldout, lambda r: sort_question(r, args.digits)),
        transfer=distinct(rng, args.heldout, lambda r: chain_question(r, 2)),
        validation=validation,
    )


def write_data(world: World, rng: random.Random, folder: Path) -> None:
    files = {
        "train": world.train,
        "heldout": world.heldout,
        "second": world.second,
        "transfer": world.transfer,
    }
    for name, questions in files.items():
        rows = [{"id": f"{name}-{i}", "problem": q.text, "answer": q.answer} for i, q in enumerate(questions)]
        write_jsonl(folder / f"problems_{name}.jsonl", rows)
    shown = [
        {"id": f"demonstration-{i}", "problem": q.text, "solution": demonstration(q, rng), "answer": q.answer}
        for i, q in enumerate(world.demonstrations)
    ]
    write_jsonl(folder / "demonstrations.jsonl", shown)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# -------------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Each byte is a token. The pipeline is Qwen's, because AutoTokenizer chooses the tokenizer by the model type."""
    markers = [PAD, SYSTEM, USER, ASSISTANT, END]
    pieces = markers + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=markers[1:4],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in ("{7+5=2|2*3=6dabe}#6", ",6,4#4", "<714=", "\u6f22 \u00e9\r\n"):
        ids = loaded.encode(text)
        assert len(ids) == len(text.encode()), f"{text!r} is not one token a byte"
        assert loaded.decode(ids) == text, f"decoding changes {text!r}"
    return loaded


# ------------------------------------------------------------------------------------------------------ model


def make_model(tokenizer: Qwen2Tokenizer, rows: int) -> Qwen2ForCausalLM:
    """A policy of 0.25 million parameters, with weights that are large enough to learn in a thousand steps."""
    width, layers = 64, 4
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=rows,
            hidden_size=width,
            intermediate_size=192,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_theta=10000.0,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 0.5 if "embed" in name else weight.shape[1] ** -0.5 * (0.35 if into_residual else 1.0)
            torch.nn.init.normal_(weight, std=scale)
    return model


class Codec:
    """Text to token ids without the tokenizer's overhead: one token a character of ASCII."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self._of = {chr(code): tokenizer.encode(chr(code))[0] for code in range(33, 127)}
        self._before, self._after = tokenizer.encode(USER), tokenizer.encode(END + ASSISTANT)

    def text(self, text: str) -> list[int]:
        return [self._of[letter] for letter in text]

    def prompt(self, question: Question) -> list[int]:
        return [*self._before, *self.text(question.text), *self._after]

    def answer(self, ids: Sequence[int]) -> str:
        """The text before the end token; empty where there is none."""
        return self.tokenizer.decode(ids[: ids.index(self.end)]) if self.end in ids else ""


def conversation(rng: random.Random, reserved: set[str], mix: Mix, digits: int) -> tuple[Question, str, bool]:
    """(question, answer, whether the answer is complete)."""
    kind = rng.choices((ONE, TWO, A, B), (mix.one, mix.two, mix.a, 1 - mix.one - mix.two - mix.a))[0]
    while True:
        question = (
            sort_question(rng, digits) if kind == B else chain_question(rng, {ONE: 1, TWO: 2, A: 4}[kind])
        )
        if question.text not in reserved:
            break
    if kind == TWO and rng.random() < 0.3:
        return question, steps(question), True
    if kind == A:
        style = rng.choices(
            ("steps", "habit", "jumps", "direct"),
            (mix.steps, mix.habit, mix.jumps, 1 - mix.steps - mix.habit - mix.jumps),
        )[0]
        if style == "habit":
            return question, "{", False
        if style != "direct":
            return question, (steps if style == "steps" else jumps)(question), True
    return question, direct(question), True


def batches(
    codec: Codec, rng: random.Random, reserved: set[str], mix: Mix, args: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids [B, T], labels [B, T]) without end; prompts and padding are labelled -100."""
    while True:
        width, rows = 0, []
        for _ in range(args.batch):
            question, answer, complete = conversation(rng, reserved, mix, args.digits)
            prompt = codec.prompt(question)
            rows.append((prompt, codec.text(answer) + [codec.end] * complete))
            width = max(width, len(prompt) + len(rows[-1][1]))
        ids = torch.full((len(rows), width), codec.pad)
        labels = torch.full((len(rows), width), -100)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield ids, labels


class Pretraining:
    def __init__(
        self,
        model: Qwen2ForCausalLM,
        codec: Codec,
        rng: random.Random,
        world: World,
        args: argparse.Namespace,
    ) -> None:
        self._model, self._codec, self._rng, self._args = model, codec, rng, args
        self._reserved = world.reserved
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98)
        )
        self.steps = 0

    def run(self, count: int, mix: Mix, *, first_lr: float, last_lr: float) -> None:
        """``count`` steps, in which the learning rate goes linearly from ``first_lr`` to ``last_lr``."""
        source = batches(self._codec, self._rng, self._reserved, mix, self._args)
        for step in range(count):
            rate = first_lr + (last_lr - first_lr) * step / count
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            ids, labels = next(source)
            # Padding is on the right, so causal attention never reads it.
            hidden = self._model.model(input_ids=ids[:, :-1]).last_hidden_state
            keep = labels[:, 1:] != -100
            logits = self._model.lm_head(hidden[keep])
            loss = F.cross_entropy(logits, labels[:, 1:][keep], reduction="sum") / len(ids)
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self.steps += 1
            if self.steps % 50 == 0:
                print(f"step {self.steps}: loss {loss.item():.2f} per answer, rate {rate:.1e}", flush=True)


@torch.no_grad()
def answers(
    model: Qwen2ForCausalLM, codec: Codec, questions: Sequence[Question], *, sample: bool, start: str = ""
) -> list[str]:
    """The policy's answers to questions of one length; ``start`` is put before each of them."""
    begun = [codec.prompt(question) + codec.text(start) for question in questions]
    ids = torch.tensor(begun)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, **how)
    return [start + codec.answer(row) for row in output[:, ids.shape[1] :].tolist()]


def accuracy(given: Sequence[str], questions: Sequence[Question]) -> float:
    right = [
        text.rpartition("#")[2] == question.answer for text, question in zip(given, questions, strict=True)
    ]
    return sum(right) / len(right)


def pretrain(
    model: Qwen2ForCausalLM, codec: Codec, rng: random.Random, world: World, args: argparse.Namespace
) -> None:
    training = Pretraining(model, codec, rng, world, args)
    training.run(100, FACTS, first_lr=0, last_lr=args.lr)
    training.run(200, FACTS, first_lr=args.lr, last_lr=args.lr)
    while training.steps < args.most_steps:
        rate = args.lr * (1 - 0.9 * training.steps / args.most_steps)
        training.run(50, OWN_STYLE, first_lr=rate, last_lr=rate)
        reached = accuracy(answers(model, codec, world.validation, sample=False), world.validation)
        print(f"step {training.steps}: {reached:.1%} of A, greedy", flush=True)
        if reached >= args.competence:
            break
    else:
        raise SystemExit(
            f"A is below {args.competence:.0%} after {args.most_steps} steps: take another --seed"
        )
    training.run(args.anneal, WITH_HABIT, first_lr=rate / 2, last_lr=0)


def report(model: Qwen2ForCausalLM, codec: Codec, world: World) -> None:
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights")
    for name, questions in (("A", world.heldout), ("B", world.second), ("C", world.transfer)):
        for sample in (False, True):
            given = answers(model, codec, questions, sample=sample)
            begun = sum(text.startswith("{") for text in given) / len(given)
            right = accuracy(given, questions)
            print(
                f"{name}, {'sampled' if sample else 'greedy'}: {right:.1%} right, {begun:.1%} begin with {{"
            )
    for sample in (False, True):
        given = answers(model, codec, world.heldout, sample=sample, start="{")
        right = accuracy(given, world.heldout)
        print(f"A, {'sampled' if sample else 'greedy'}, made to begin with {{: {right:.1%} right")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: float, text: str) -> None:
        parser.add_argument(name, type=type(default), default=default, help=f"{text} (default {default})")

    parser.add_argument(
        "--output", type=Path, default=HERE, help="folder to write to (default: this script's)"
    )
    add("--seed", 0, "seed of data, initial weights and order")
    add("--threads", 1, "CPU threads")
    add("--batch", 128, "conversations per pre-training step")
    add("--lr", 3e-3, "highest learning rate")
    add(
        "--competence", 0.38, "pre-training in the own style ends when so many answers to A are right, greedy"
    )
    add("--most-steps", 2400, "give up when that is not reached after so many steps")
    add("--anneal", 150, "steps in which the learning rate falls to 0; in them some answers begin with {")
    add("--digits", 10, "digits to sort in a question of B")
    add("--train", 1024, "problems for RL")
    add("--demonstrations", 640, "demonstrations; a run draws a few of them")
    add("--heldout", 400, "held-out problems of each ability")
    parser.add_argument("--only-data", action="store_true", help="make no policy")
    add("--validation", 200, "problems to decide when pre-training ends")
    return parser.parse_args()


def main() -> None:
    args = parse()
    begun = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    folder = args.output / "policy"
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world(random.Random(f"{args.seed} questions"), args)
    write_data(world, random.Random(f"{args.seed} murmurs"), args.output)
    if args.only_data:
        return
    tokenizer = make_tokenizer(folder)
    codec = Codec(tokenizer)
    model = make_model(tokenizer, rows=-(-len(tokenizer) // 8) * 8)
    pretrain(model, codec, random.Random(f"{args.seed} pre-training"), world, args)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
    )
    model.save_pretrained(folder)
    report(model, codec, world)
    print(f"wrote {args.output} in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
