"""Text to token ids and back, with a model folder's own rules; equal to transformers' tokenizer on the same folder.

Nothing here imports torch or transformers; the work is done by the `tokenizers` library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.data.chat_template import Message, render_chat_template
from burnish.data.stream_decoder import StreamDecoder
from burnish.data.tokenizer_files import TokenizerFiles, read_tokenizer_files
from burnish.errors import DataError


class Tokenizer:
    """A model folder's tokenizer.

    Args:
        files: what the folder says; `Tokenizer.load` reads it.
        source: the folder's name, for messages of errors.

    Attributes:
        bos_id, eos_id, pad_id, unk_id: token ids, None where the model names none.
        eos_ids: every id that ends an answer: the tokenizer's end token and those of generation_config.json.
        chat_template: Jinja source of the default chat template, None where there is none.
        max_length: longest input in tokens that the tokenizer's author vouches for, if told.
    """

    def __init__(self, files: TokenizerFiles, *, source: str) -> None:
        self.backend = files.backend
        self.source = source
        self.special_tokens = dict(files.special_tokens)
        self.chat_templates = dict(files.chat_templates)
        self.chat_template = self._default_template(files.chat_templates)
        self.max_length = files.max_length
        self.bos_id = self._named_id("bos_token", fallback=files.bos_id)
        self.eos_id = self._named_id("eos_token", fallback=next(iter(files.stop_ids), None))
        self.pad_id = self._named_id("pad_token", fallback=None)
        self.unk_id = self._named_id("unk_token", fallback=None)
        self.eos_ids = frozenset(files.stop_ids) | ({self.eos_id} if self.eos_id is not None else set())
        added = files.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._decoder: Mapping[str, Any] | None = (
            None if files.backend.decoder is None else json.loads(files.backend.decoder.__getstate__())
        )

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a model folder: tokenizer.json, or vocab.json and merges.txt, or tokenizer.model.

        Raises:
            CheckpointError: files are missing or malformed.
        """
        folder = Path(folder)
        return cls(read_tokenizer_files(folder), source=str(folder))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's own vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; with the begin and end tokens that the tokenizer adds, if asked.

        Special tokens that are spelled out in `text` become their ids.

        Raises:
            DataError: `text` has lone surrogates, which no UTF-8 text has.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            kind = f"{type(text).__name__}: {error}" if not isinstance(text, str) else "lone surrogates"
            raise DataError("a text cannot be tokenized", got=kind, expected="valid Unicode text") from error

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt that the model continues: with the tokenizer's begin token, never with an end token."""
        ids = self.encode(text, add_special_tokens=True)
        added = self._trailing_ends(ids) - self._trailing_ends(self.encode(text))
        return ids[: len(ids) - max(0, added)]

    def encode_chat(self, messages: Sequence[Message], *, system: str | None = None) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises:
            DataError: as `render_chat`.
        """
        return self.encode(self.render_chat(messages, system=system))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id, such as "Ġthe", "▁the" or "<0x0A>"."""
        text = self.backend.id_to_token(token_id)
        return f"<{token_id}?>" if text is None else text

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes ids one at a time; its pieces joined equal `decode` of all ids."""
        skip = self.special_ids if skip_special_tokens else frozenset[int]()
        return StreamDecoder(self.backend, decoder=self._decoder, skip_ids=skip)

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, system: str | None = None
    ) -> str:
        """Text of a conversation in the model's chat template; encode it without adding special tokens.

        Args:
            messages: {"role", "content"} objects, oldest first.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            system: a system message to put first.

        Raises:
            DataError: no chat template, malformed messages, two system messages, or the template's own failure.
        """
        if self.chat_template is None:
            names = ", ".join(sorted(self.chat_templates))
            raise DataError(
                f"the tokenizer of {self.source} has no {'default ' if names else ''}chat template",
                got=f"templates named {names}" if names else None,
                remedy="Choose another template, such as alpaca or sql-context, or send plain text",
            )
        if system is not None:
            if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
                raise DataError("there are two system messages", expected="one, in the messages or as an option")
            messages = [{"role": "system", "content": system}, *messages]
        return render_chat_template(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            source=self.source,
        )

    def _trailing_ends(self, ids: Sequence[int]) -> int:
        return next((count for count, token_id in enumerate(reversed(ids)) if token_id != self.eos_id), len(ids))

    @staticmethod
    def _default_template(templates: Mapping[str, str]) -> str | None:
        if "default" in templates or len(templates) != 1:
            return templates.get("default")
        return next(iter(templates.values()))

    def _named_id(self, name: str, *, fallback: int | None) -> int | None:
        text = self.special_tokens.get(name)
        if text is not None:
            return self.backend.token_to_id(text)
        return fallback
