"""Checks of options that say nothing about the model. Torch-free."""

from __future__ import annotations

from burnish.errors import ConfigError


def check_counts(*, max_num_seqs: int, max_batch_tokens: int, block_size: int, threads: int | None) -> None:
    """Make sure that numbers of things are above 0.

    Raises:
        ConfigError: one is not.
    """
    for name, value in (
        ("max_num_seqs", max_num_seqs),
        ("max_batch_tokens", max_batch_tokens),
        ("block_size", block_size),
        ("threads", threads),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is out of range", got=value, expected="1 or more")


def check_no_cache_asked(*, memory: str | int | None, kv_memory: str | int | None) -> None:
    """Make sure that nobody bounds a KV cache that is not there.

    Raises:
        ConfigError: somebody does.
    """
    for name, size in (("memory", memory), ("kv_memory", kv_memory)):
        if size is not None:
            raise ConfigError(f"{name} bounds the KV cache, and there is none without kv_cache")
