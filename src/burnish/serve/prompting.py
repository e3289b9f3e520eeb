"""From a request's prompts or messages to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from burnish.data.tokenizer import Tokenizer
from burnish.engine.prompts import EncodedPrompt
from burnish.errors import DataError, RequestError
from burnish.serve.schema import ChatRequest, CompletionRequest, Message
from burnish.serve.templates import TemplateRenderer

# Longer texts are tokenized beside the event loop; for shorter ones handing over costs more.
_INLINE_CHARS = 8192
# OpenAI's newer word, which chat templates do not know.
_ROLES = {"developer": "system"}


class Prompting:
    """One model's way from text to ids.

    Args:
        tokenizer: None where the model has none; prompts are token ids then.
        renderer: None where the model has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer | None, renderer: TemplateRenderer | None) -> None:
        self.tokenizer = tokenizer
        self._renderer = renderer

    async def of_completion(self, request: CompletionRequest) -> list[EncodedPrompt]:
        """One prompt for each that the request has.

        Raises:
            RequestError: a prompt is text and the model has no tokenizer.
            DataError: a text is no valid Unicode.
        """
        given: Any = request.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        if not isinstance(given[0], str):
            return [EncodedPrompt(ids=tuple(one)) for one in given]
        encode = self._needed().encode_prompt

        def encoded() -> list[EncodedPrompt]:
            return [EncodedPrompt(ids=tuple(encode(text)), text=text) for text in given]

        return encoded() if sum(map(len, given)) <= _INLINE_CHARS else await asyncio.to_thread(encoded)

    async def of_text(self, text: str, *, add_special_tokens: bool = True) -> EncodedPrompt:
        """Raises as `of_completion`."""
        tokens = self._needed()
        encode = tokens.encode_prompt if add_special_tokens else tokens.encode
        ids = encode(text) if len(text) <= _INLINE_CHARS else await asyncio.to_thread(encode, text)
        return EncodedPrompt(ids=tuple(ids), text=text)

    async def of_chat(self, request: ChatRequest) -> EncodedPrompt:
        """The conversation in the model's own template.

        Raises:
            RequestError, DataError: there is no template or tokenizer, or the template refuses the messages.
        """
        return await self.of_messages(request.messages)

    async def of_messages(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> EncodedPrompt:
        """Raises as `of_chat`."""
        self._needed()
        if self._renderer is None:
            raise RequestError("this model has no chat template", remedy="Use /v1/completions.")
        plain = [{"role": _ROLES.get(message.role, message.role), "content": _text_of(message)} for message in messages]
        text = await self._renderer.render(plain, add_generation_prompt=add_generation_prompt)
        if not text:
            raise DataError("the chat template made nothing of the messages")
        encoded = await self.of_text(text, add_special_tokens=False)
        return EncodedPrompt(ids=encoded.ids, text=text, is_chat=True)

    def _needed(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer", expected="prompts as lists of token ids")
        return self.tokenizer


def _text_of(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)
