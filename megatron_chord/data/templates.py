"""Converts chat messages to token ids in the same way for RL prompts, demonstrations and evaluation.

The trainable tokens of a demonstration are not found by searching its text. They are the tokens after the prompt's own
ids. This requires that adding an answer does not change the prompt's ids. Every row is checked, and a row that
violates this is refused.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sentencepiece

from megatron_chord.data.messages import texts_of
from megatron_chord.data.rendering import Renderer
from megatron_chord.data.rows import RowError
from megatron_chord.data.thinking import CLOSE, is_skipped, lost_part, opening, thinks
from megatron_chord.json_files import read_object
from megatron_chord.records import Message, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TrainOn = Literal["all_turns", "last_turn"]
ToolsAs = Literal["auto", "system_message", "template"]
_LATER = (
    "The template rewrites earlier turns. Train the last turn alone with data.train_on: last_turn, or give another "
    "template with data.chat_template"
)
_PROBE: Message = {"role": "user", "content": "What is 1 + 1?"}


@dataclass(frozen=True)
class _Rendered:
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A tokenizer, its Jinja template and the system prompt: a pure function of the messages."""

    tokenizer: PreTrainedTokenizerBase
    source: str
    """Origin of the template, for errors."""
    renderer: Renderer
    system_prompt: str | None
    stop_token_ids: tuple[int, ...]
    """Ids that end an answer; the rollout engine must be given the same."""
    control_tokens: dict[int, str]
    """Ids of control tokens, and the strings that the tokenizer converts to these ids wherever they occur."""
    vocab_size: int | None = None
    """Vocabulary size of the model; ids from this number on have no embedding. None: not checked."""
    opening: str = ""
    """Thinking block that prompts open and the policy continues, such as ``<think>\\n``."""
    tools_as: ToolsAs = "auto"
    """How a row's functions are shown (`data.tools`)."""
    train_on: TrainOn = "all_turns"
    """Which of a demonstration's assistant turns are trained."""
    exported: str | None = None
    """Jinja template to export with the trained policy, so that other programs render as the training did. None: the
    template in the tokenizer's folder does so already."""

    def conversation(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """`messages` with the system prompt in front, unless they have one."""
        if self.system_prompt is None or messages[0]["role"] == "system":
            return tuple(messages)
        return ({"role": "system", "content": self.system_prompt}, *messages)

    def fingerprint(self) -> str:
        """Hash of everything that the token ids of a conversation depend on."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab())
        others = [
            getattr(self, field.name) for field in fields(self) if field.name not in ("tokenizer", "renderer")
        ]
        return repr((hashlib.sha256(vocabulary.encode()).hexdigest(), self.renderer.setting, others))

    def prompt_ids(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """Ids of `messages` and the generation prompt: what the policy continues. `tools` are shown by the template.

        Raises:
            RowError: a message holds a control token's text, or the template refuses the conversation.
        """
        conversation = self.conversation(messages)
        self._refuse_control_texts(conversation, tools)
        return self._rendered(conversation, tools, add_generation_prompt=True).token_ids

    def demonstration(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Ids of a whole conversation and, for each, whether it belongs to an assistant's turn that is trained.

        A trained turn is trainable from its first token to its stop token, both included. Tokens that the template
        writes after a stop token are not trainable; after the last stop token they are cut off. With ``train_on:
        last_turn`` the template may change earlier turns: they are only context, as in a prompt.

        Raises:
            RowError: as `prompt_ids`; an answer or a later message changes the ids of a trained turn or of what is
                before it; the template adds an empty thinking block to a trained turn or leaves a part of it out; a
                trained turn has no stop token.
        """
        conversation = self.conversation(messages)
        self._refuse_control_texts(conversation, tools)
        whole = self._rendered(conversation, tools, add_generation_prompt=False)
        trainable = [False] * len(whole.token_ids)
        end = 0
        turns = [turn for turn, message in enumerate(conversation) if message["role"] == "assistant"]
        for turn in turns if self.train_on == "all_turns" else turns[-1:]:
            prompt = self._rendered(conversation[:turn], tools, add_generation_prompt=True)
            answered = whole
            if turn + 1 < len(conversation):
                answered = self._rendered(conversation[: turn + 1], tools, add_generation_prompt=False)
            start = len(prompt.token_ids)
            self._require_prefix(
                prompt.token_ids,
                answered.token_ids,
                turn,
                "the answer",
                self._why(prompt, conversation[turn]),
            )
            self._require_whole(prompt, answered, conversation[turn], turn)
            end = self._end_of_turn(answered.token_ids, start, turn)
            self._require_prefix(answered.token_ids[:end], whole.token_ids, turn, "later messages", _LATER)
            trainable[start:end] = [True] * (end - start)
        return whole.token_ids[:end], tuple(trainable[:end])

    def turn(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        """Text of the assistant's whole turn: the response, after the thinking block that its prompt opened.

        Graders and format rules read this text, so ``<think>`` counts whether the prompt or the policy wrote it. An
        empty block that a prompt opens and closes (Qwen3 without thinking) is not part of it.
        """
        response = self.decode(response_ids)
        if not self.opening:
            return response
        end = self._decode(prompt_ids[-len(self.opening) :])
        return self.opening + response if end.endswith(self.opening) else response

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, without control tokens."""
        text_ids = [token for token in token_ids if token not in self.control_tokens]
        return self._decode(text_ids)

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """Text with control tokens."""
        return self._decode(token_ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _rendered(
        self, conversation: Sequence[Message], tools: Sequence[Tool], *, add_generation_prompt: bool
    ) -> _Rendered:
        text = self.renderer.render(conversation, tools=tools, add_generation_prompt=add_generation_prompt)
        token_ids = self._encoded(text)
        self._refuse_unknown(token_ids)
        return _Rendered(text, token_ids)

    def _encoded(self, text: str) -> tuple[int, ...]:
        """Ids of a rendered text. The template writes the beginning-of-sequence token where the model wants one.

        For a fast tokenizer this calls the ``tokenizers`` library directly. Transformers' own call also computes
        offsets, and waits for other threads because it changes an option of the shared tokenizer.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        return tuple(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _refuse_unknown(self, token_ids: tuple[int, ...]) -> None:
        if self.vocab_size is None or max(token_ids, default=0) < self.vocab_size:
            return
        place, token = next((i, token) for i, token in enumerate(token_ids) if token >= self.vocab_size)
        raise RowError(f"token {place} is {self._token_text(token)}, id {token}, {self._beyond()}")

    def _token_text(self, token: int) -> str:
        return repr(self.tokenizer.convert_ids_to_tokens(token))

    def _beyond(self) -> str:
        return (
            f"beyond the model's vocabulary: config.json has vocab_size {self.vocab_size}, the tokenizer "
            f"{len(self.tokenizer)} tokens. Resize the model's embedding, or use a tokenizer without the added tokens"
        )

    def check_stop_tokens(self) -> None:
        """Raises ValueError if a stop token, or the tokenizer's end or padding token, is not in the model's
        vocabulary."""
        roles = dict.fromkeys(
            self.stop_token_ids, "a stop token (of the tokenizer or generation_config.json)"
        )
        for role in ("eos_token", "pad_token"):
            token = getattr(self.tokenizer, f"{role}_id")
            if token is not None:
                roles[token] = f"the tokenizer's {role}"
        for token, role in roles.items():
            if self.vocab_size is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{role} is {self._token_text(token)}, id {token}, {self._beyond()}")

    def _refuse_control_texts(self, conversation: Sequence[Message], tools: Sequence[Tool]) -> None:
        places = [
            (f"message {index} ({message['role']})", message) for index, message in enumerate(conversation)
        ]
        for name, place in (*places, ("a function's schema", tools)):
            for held in texts_of(place):
                for text in self.control_tokens.values():
                    if text in held:
                        raise RowError(
                            f"{name} holds {text!r}, which the tokenizer would read as a control token"
                        )

    def _require_prefix(
        self, before: tuple[int, ...], after: tuple[int, ...], turn: int, what: str, why: str
    ) -> None:
        if after[: len(before)] == before:
            return
        same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        raise RowError(
            f"the chat template ({self.source}) is not prefix-stable: with {what}, the {len(before)} tokens up "
            f"to message {turn} change from token {same} on ({self._excerpt(before, same)!r} becomes "
            f"{self._excerpt(after, same)!r}), so RL and SFT would see different prompts. {why}"
        )

    def _why(self, prompt: _Rendered, message: Message) -> str:
        """The reason why an answer changes its prompt, and what to do about it."""
        if self.opening and prompt.text.endswith(self.opening):
            return (
                "The prompt opens <think>, and the template does not write it into an assistant's turn, or cuts the "
                "thinking out. Give a template that keeps it with data.chat_template"
            )
        if thinks(message) and prompt.text.rstrip().endswith(CLOSE):
            return (
                "The prompt closes an empty thinking block, and this answer thinks. Let the prompts think "
                "(data.template_arguments), or give answers without thinking"
            )
        return (
            "Usual reasons: the template rewrites earlier turns, writes the system message into the last user turn "
            "only, or its generation prompt ends in text that the tokenizer joins to the answer. Give another template "
            "with data.chat_template"
        )

    def _require_whole(self, prompt: _Rendered, answered: _Rendered, message: Message, turn: int) -> None:
        """Raise RowError if the policy would learn another answer than the row has."""
        text = answered.text.removeprefix(prompt.text)
        if prompt.text.endswith(self.opening):
            text = self.opening + text
        if is_skipped(text, message):
            remedies = self._thinking_remedies(message)
            raise RowError(
                f"the chat template ({self.source}) begins message {turn} with an empty <think></think>, but the "
                f"prompt leaves thinking open: the demonstration would teach the policy to skip it. {remedies}"
            )
        lost = lost_part(text, message)
        if lost is not None:
            raise RowError(
                f"the chat template ({self.source}) leaves the {lost} of message {turn} out, so the policy would not "
                "learn it. Give another template with data.chat_template"
            )

    def _thinking_remedies(self, message: Message) -> str:
        if thinks(message):
            return "The template does not see the thinking in `content`: put it into `reasoning_content`"
        off = "give another template with data.chat_template"
        if "enable_thinking" in self.renderer.variables():
            off = "set data.template_arguments: {enable_thinking: false}, which RL and evaluation follow, too"
        return (
            f"To train without thinking, {off}. To train with it, give demonstrations that think (<think>...</think> "
            "at the start of the answer, or `reasoning_content`)"
        )

    def _excerpt(self, token_ids: tuple[int, ...], start: int) -> str:
        return self._decode(token_ids[start : start + 8])

    def _end_of_turn(self, token_ids: tuple[int, ...], start: int, turn: int) -> int:
        """Index just after the first stop token from `start` on."""
        answer = token_ids[start:]
        end = min(
            (start + 1 + answer.index(stop) for stop in self.stop_token_ids if stop in answer), default=None
        )
        stop_texts = ", ".join(repr(self._excerpt((stop,), 0)) for stop in self.stop_token_ids)
        if end is None:
            raise RowError(
                f"the chat template ({self.source}) ends message {turn} without a stop token ({stop_texts}), so "
                "the demonstration would not teach when to stop. Let the template write one, or name the one it writes "
                "as eos_token_id in generation_config.json"
            )
        rest = self.decode(token_ids[end:])
        if rest.strip():
            raise RowError(
                f"message {turn} continues after its stop token ({stop_texts}): {rest[:40]!r} could never be sampled"
            )
        return end


def load_template(
    tokenizer_folder: Path,
    *,
    chat_template: Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    tools_as: ToolsAs = "auto",
    train_on: TrainOn = "all_turns",
    vocab_size: int | None = None,
) -> ChatTemplate:
    """The chat template of a local Hugging Face folder, or the Jinja file `chat_template` with its tokenizer.

    A folder with only a SentencePiece ``tokenizer.model`` (and config.json) is sufficient. No hub is contacted, and no
    code of the folder is run.

    Args:
        arguments: variables that the template reads, such as ``enable_thinking``, for every conversation.
        vocab_size: number of ids that the model knows (None: not checked, here and in rows).

    Raises:
        ValueError: no tokenizer, no template, a broken template, arguments that it does not read, no stop token, or
            tokens beyond ``vocab_size``.
    """
    arguments = dict(arguments or {})
    tokenizer = _load_tokenizer(tokenizer_folder)
    source, jinja = _template_text(tokenizer, tokenizer_folder, chat_template)
    template = ChatTemplate(
        tokenizer=tokenizer,
        source=source,
        renderer=Renderer(jinja, {**tokenizer.special_tokens_map, **arguments}, source),
        system_prompt=system_prompt,
        tools_as=tools_as,
        train_on=train_on,
        stop_token_ids=_stop_token_ids(tokenizer, tokenizer_folder),
        control_tokens=_control_tokens(tokenizer, tokenizer_folder),
        vocab_size=vocab_size,
        exported=with_defaults(jinja, arguments) if arguments or chat_template is not None else None,
    )
    template.check_stop_tokens()
    try:
        _check_arguments(arguments, template.renderer, tokenizer.special_tokens_map, source)
        probe = template.prompt_ids([{"role": "user", "content": "1"}])
        text = template.renderer.render([_PROBE], add_generation_prompt=True)
    except RowError as error:
        raise ValueError(f"the chat template ({source}), tried on one user message: {error}") from error
    if not probe:
        raise ValueError(f"the chat template ({source}) turns a user message into nothing")
    return replace(template, opening=opening(text.rpartition(_PROBE["content"])[2]))


def with_defaults(jinja: str, arguments: Mapping[str, Any]) -> str:
    """The template with default values for its variables. The template's text is otherwise the same."""
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}\n"
        for name, value in arguments.items()
    ]
    return "".join(lines) + jinja


_NOT_ARGUMENTS = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *(
            "conversations",
            "chat_template",
            "return_assistant_tokens_mask",
            "strftime_now",
            "raise_exception",
        ),
    }
)
"""Names that the renderer itself gives a value."""


def _check_arguments(
    arguments: Mapping[str, Any], renderer: Renderer, special_tokens: Mapping[str, Any], source: str
) -> None:
    taken = _NOT_ARGUMENTS | special_tokens.keys()
    for name in arguments:
        if name in taken:
            raise ValueError(
                f"data.template_arguments: `{name}` cannot be set here, because rows and tokenizer give it its value"
            )
    if not arguments:
        return
    known = sorted(renderer.variables() - taken)
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"it reads {', '.join(known) or 'none'}"
            raise ValueError(
                f"data.template_arguments: the chat template ({source}) does not read `{name}`; {hint}"
            )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; model.path must be a local Hugging Face folder")
    # Imported here: it takes seconds, and reading rows does not need it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Use the folder's own tokenizer file. AutoTokenizer chooses the tokenizer by the model type: for a Qwen2 model
    # with a SentencePiece tokenizer it chooses Qwen's byte-level one, which gives other ids without a warning.
    has_file = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    loader = PreTrainedTokenizerFast if has_file else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _check_sentencepiece(tokenizer, folder)
        tokenizer("1")  # removes the truncation and padding settings of its file
        return tokenizer
    except Exception as error:  # any exception that a loader raises for the folder's files
        raise ValueError(f"{folder}: no tokenizer can be loaded from it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return text[0] if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text[0]}"


def _check_sentencepiece(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Compare Transformers with SentencePiece in a folder that has tokenizer.model and no tokenizer.json.

    Raises:
        ValueError: Transformers gives a text other token ids than SentencePiece.
    """
    model = folder / "tokenizer.model"
    if not model.is_file() or (folder / "tokenizer.json").is_file():
        return
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in ("What is 12 + 7?", "two  spaces,\na line. #### 19"):
        expected, ids = pieces.encode(text), tokenizer.encode(text, add_special_tokens=False)
        if ids != expected:
            raise ValueError(
                f"transformers and SentencePiece tokenise with tokenizer.model differently: {text!r} becomes {ids}, "
                f"not {expected}; train it with add_dummy_prefix=False, or add a tokenizer.json"
            )


def _template_text(tokenizer: PreTrainedTokenizerBase, folder: Path, file: Path | None) -> tuple[str, str]:
    if file is not None:
        if not file.is_file():
            raise ValueError(f"data.chat_template: {file}: no such file")
        return str(file), file.read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{folder}: its tokenizer has no chat template; give a Jinja file with data.chat_template"
        )
    try:
        return str(folder), str(tokenizer.get_chat_template())
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its chat template cannot be read: {_first_line(error)}") from error


def _control_tokens(tokenizer: Any, folder: Path) -> dict[int, str]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    control = added | set(tokenizer.all_special_ids)
    model = folder / "tokenizer.model"
    if model.is_file() and not (folder / "tokenizer.json").is_file():
        # Transformers treats all user-defined pieces of such a model as control tokens, "\n" among them. Here such a
        # piece is a control token only if the tokenizer's configuration uses it as the beginning, end or padding token.
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        text = {i for i in control if i < len(pieces) and not (pieces.is_control(i) or pieces.is_unknown(i))}
        control -= text - {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return {index: tokenizer.convert_ids_to_tokens(index) for index in sorted(control)}


def _stop_token_ids(tokenizer: Any, folder: Path) -> tuple[int, ...]:
    stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    file = folder / "generation_config.json"
    if file.is_file():
        eos = read_object(file).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise ValueError(f"{file}: eos_token_id must be a token id or a list of them, it is {eos!r}")
        stops |= set(ids)
    if not stops:
        raise ValueError(f"{folder}: neither its tokenizer nor generation_config.json names an eos token")
    return tuple(sorted(stops))
