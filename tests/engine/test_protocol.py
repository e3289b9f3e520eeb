"""Engines by name: what each refuses, because it could not honour it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.engine.protocol import ENGINES, is_engine, make_engine
from burnish.engine.sampling import SamplingParams
from burnish.engine.supported import require_supported
from burnish.errors import ConfigError, RequestError


@pytest.mark.parametrize("name", ["native", "transformers", "ctranslate2", "openai:http://here/v1"])
def test_names_are_known(name: str) -> None:
    assert is_engine(name)


@pytest.mark.parametrize("name", ["vllm", "openai", "openai:", "native:1", ""])
def test_other_names_are_refused_with_what_there_is(name: str, tmp_path: Path) -> None:
    assert not is_engine(name)
    with pytest.raises(ConfigError, match=", ".join(ENGINES)):
        make_engine(tmp_path, engine=name)


@pytest.mark.parametrize(
    ("engine", "option"),
    [
        ("transformers", {"quantize": "int8"}),
        ("transformers", {"memory": "4GiB"}),
        ("transformers", {"kv_memory": 1 << 20}),
        ("transformers", {"kv_dtype": "int8"}),
        ("transformers", {"max_batch_tokens": 64}),
        ("transformers", {"speculation": "ngram"}),
        ("openai:http://localhost:1/v1", {"speculation": "off"}),
        ("ctranslate2", {"memory": "4GiB"}),
        ("ctranslate2", {"kv_cache": False}),
        ("ctranslate2", {"revision": "main"}),
        ("openai:http://localhost:1/v1", {"quantize": "int8"}),
        ("openai:http://localhost:1/v1", {"dtype": "bfloat16"}),
        ("openai:http://localhost:1/v1", {"threads": 2}),
        ("openai:http://localhost:1/v1", {"kv_cache": False}),
    ],
)
def test_options_that_an_engine_cannot_honour_are_refused(engine: str, option: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(option)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"cannot honour {name}"):
        make_engine(tmp_path, engine=engine, **option)


def test_parameters_are_refused_by_name_unless_supported_or_default() -> None:
    require_supported(SamplingParams(max_tokens=4, top_k=3), frozenset({"max_tokens", "top_k"}), engine="some")
    with pytest.raises(RequestError, match=r"the some engine does not know top_k; got 3"):
        require_supported(SamplingParams(top_k=3), frozenset({"max_tokens"}), engine="some")
