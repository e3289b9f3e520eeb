"""The backend is the one asked for or the fastest that fits; a choice that cannot be honoured is an error."""

from __future__ import annotations

import pytest
import torch

from burnish.engine.backends import parse_kv_dtype
from burnish.engine.native import NativeEngine
from burnish.errors import ConfigError
from burnish.models.decoder import Decoder


def test_kv_dtype_follows_the_model_unless_named() -> None:
    assert parse_kv_dtype(None, dtype=torch.bfloat16) == torch.bfloat16
    assert parse_kv_dtype("auto", dtype=torch.float32) == torch.float32
    assert parse_kv_dtype("int8", dtype=torch.float32) == torch.int8
    assert parse_kv_dtype(torch.float16, dtype=torch.float32) == torch.float16
    with pytest.raises(ConfigError, match="unknown kv_dtype"):
        parse_kv_dtype("int4", dtype=torch.float32)


def test_unknown_backend_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match="unknown backend; got abacus"):
        NativeEngine(decoder, backend="abacus")


def test_cpu_backend_without_cache_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match="cannot run this: it always keeps a cache"):
        NativeEngine(decoder, backend="cpu", kv_cache=False)


def test_decoder_that_must_stay_as_it_is_runs_as_it_is(decoder: Decoder) -> None:
    names = set(decoder.state_dict())
    assert NativeEngine(decoder).stats().backend == "torch"
    assert set(decoder.state_dict()) == names
