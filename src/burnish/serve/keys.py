"""API keys: read from a file or the environment, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from burnish.errors import ConfigError

KEYS_VARIABLE = "BURNISH_API_KEYS"
_LEAST_CHARS = 8


class KeyRing:
    """The keys that open a server; none of them is kept in the clear.

    Args:
        keys: at least one.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        assert self._digests

    def opens(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header, `Bearer KEY`, holds one of the keys; every key is compared with, always."""
        scheme, _, given = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found and scheme.lower() == b"bearer"


def load_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> KeyRing | None:
    """Keys of a file (one a line, # begins a comment), else of BURNISH_API_KEYS (joined by commas); None for neither.

    Raises:
        ConfigError: the file cannot be read or holds no key, or a key is too short or has blanks.
    """
    if path is not None:
        source = str(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{path} cannot be read as API keys", got=reason) from error
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    elif KEYS_VARIABLE in environment:
        source = KEYS_VARIABLE
        keys = [key.strip() for key in environment[KEYS_VARIABLE].split(",") if key.strip()]
    else:
        return None
    if not keys:
        raise ConfigError(f"{source} holds no API key")
    for number, key in enumerate(keys, 1):
        if len(key) < _LEAST_CHARS or any(not "!" <= letter <= "~" for letter in key):
            raise ConfigError(
                f"API key {number} of {source} is not usable",
                expected=f"at least {_LEAST_CHARS} visible ASCII characters",
            )
    return KeyRing(keys)
