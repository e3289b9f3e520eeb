"""From what a caller may pass as a prompt to checked token ids. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from burnish.engine.text_stream import PieceDecoder
from burnish.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt that somebody else has turned into ids.

    Attributes:
        is_chat: it came from chat messages, so that the answer is a text of its own.
    """

    ids: Sequence[int]
    text: str | None = None
    is_chat: bool = False


Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]] | EncodedPrompt


class TextTokenizer(Protocol):
    """What an engine needs of a tokenizer; `data.tokenizer.Tokenizer` is one."""

    @property
    def eos_ids(self) -> Any: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_prompt(self, text: str) -> list[int]: ...

    def render_chat(self, messages: Any, /) -> str: ...

    def stream_decoder(self) -> PieceDecoder: ...


class NoText:
    """The decoder of an engine without a tokenizer: every answer's text is empty."""

    def push(self, token_id: int, /) -> str:
        return ""

    def flush(self) -> str:
        return ""


def encode_prompt(prompt: Prompt, tokenizer: TextTokenizer | None, *, vocab_size: int) -> tuple[str | None, list[int]]:
    """The prompt's text (None when given as ids) and its token ids.

    Text is encoded with the begin token that the tokenizer asks for; chat messages are rendered by the chat template.

    Raises:
        RequestError: the prompt is empty, of the wrong kind, or has ids outside the vocabulary.
        DataError: the messages or the tokenizer's chat template are at fault.
    """
    text: str | None = None
    if isinstance(prompt, EncodedPrompt):
        text, ids = prompt.text, list(prompt.ids)
    elif isinstance(prompt, str):
        text = prompt
        ids = _needed(tokenizer).encode_prompt(prompt)
    elif not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise RequestError("a prompt is of the wrong kind", got=type(prompt).__name__, expected=_KINDS)
    elif prompt and all(isinstance(message, Mapping) for message in prompt):
        tokens = _needed(tokenizer)
        text = tokens.render_chat(list(prompt))
        ids = tokens.encode(text)
    elif all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]
    else:
        raise RequestError("a prompt mixes kinds", expected=_KINDS)
    if not ids:
        raise RequestError("a prompt is empty", expected="at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError("a prompt has a token outside the vocabulary", got=wrong, expected=f"0..{vocab_size - 1}")
    return text, ids


def answer_decoder(tokenizer: TextTokenizer | None, prompt: Prompt, prompt_ids: Sequence[int]) -> PieceDecoder:
    """A fresh decoder for the answer, placed as if the prompt came before it.

    Some tokenizers drop the first space of a text: after a plain prompt that space belongs to the answer. A chat
    answer is a text of its own.
    """
    if tokenizer is None:
        return NoText()
    if isinstance(prompt, EncodedPrompt):
        is_chat = prompt.is_chat
    else:
        is_chat = not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
    if not is_chat:
        decoder = tokenizer.stream_decoder()
        # A last token that gives no text yet (part of a character) would leak into the answer.
        if decoder.push(prompt_ids[-1]):
            return decoder
    return tokenizer.stream_decoder()


_KINDS = "a string, a list of token ids, or a list of chat messages"


def _needed(tokenizer: TextTokenizer | None) -> TextTokenizer:
    if tokenizer is None:
        raise RequestError(
            "the engine has no tokenizer, as the model folder has none",
            expected="prompts as lists of token ids",
            remedy="Copy the tokenizer files of the model into its folder.",
        )
    return tokenizer
