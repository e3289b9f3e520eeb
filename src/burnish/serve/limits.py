"""What one request may ask for. The request models declare these, so the OpenAPI document does as well."""

from __future__ import annotations

MAX_PROMPTS = 64
"""Prompts of one completion request."""
MAX_CHOICES = 16
"""Answers to one prompt."""
MAX_SEQUENCES = 128
"""Answers of one request in all."""
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_MESSAGES = 1024
MAX_PARTS = 256
"""Text parts of one chat message."""
MAX_LOGPROBS = 20
MAX_REGEX_CHARS = 8192
MAX_GRAMMAR_CHARS = 32768
MAX_SCHEMA_CHARS = 32768
MAX_EXPECTED_CHARS = 65536
MAX_TOKENS = 1 << 20
"""Largest number accepted where tokens are counted; the model's context is the real bound."""
