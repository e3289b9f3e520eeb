"""Single tokens as clients are shown them: their bytes, and a text that tells them apart."""

from __future__ import annotations

import re
from functools import lru_cache

from burnish.data.stream_decoder import byte_level_alphabet
from burnish.data.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class TokenTexts:
    """Names of one tokenizer's tokens; of a model without one they are their numbers."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        decoder = None if tokenizer is None else tokenizer.backend.decoder
        self._alphabet = byte_level_alphabet() if decoder is not None and "ByteLevel" in repr(decoder) else None
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def text_of(self, token_id: int) -> str:
        r"""The token's text; where its bytes are no whole characters, `bytes:\xe6\x9d`."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes_of(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return str(token_id).encode()
        spelled = self._tokenizer.backend.id_to_token(token_id)
        if spelled is None:
            return f"<{token_id}>".encode()
        if token_id in self._tokenizer.special_ids:
            return spelled.encode()
        if self._alphabet is not None:
            if all(letter in self._alphabet for letter in spelled):
                return bytes(self._alphabet[letter] for letter in spelled)
            return spelled.encode()
        byte = _BYTE_TOKEN.match(spelled)
        if byte:
            return bytes([int(byte[1], 16)])
        return spelled.replace("▁", " ").encode()
