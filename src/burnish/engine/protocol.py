"""What an engine is to whoever measures, compares or serves one, and the way to make one by name."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from burnish.engine.outputs import EngineStats, RequestOutput, StreamEvent
from burnish.engine.prompts import Prompt
from burnish.engine.sampling import SamplingParams
from burnish.errors import ConfigError

if TYPE_CHECKING:
    import torch

ENGINES = ("native", "transformers", "ctranslate2", "openai:URL")


class Engine(Protocol):
    """Continues prompts. One thread at a time."""

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Run all prompts together; outputs come in the prompts' order, each as soon as it and those before are done.

        Requests are checked at once, before anything runs. Closing the iterator aborts what is unfinished.

        Raises:
            RequestError: a prompt or its parameters cannot be honoured.
        """
        ...

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamEvent, None, None]:
        """Run one prompt; pieces of text come as they are certain. Closing the iterator aborts the request."""
        ...

    def warm_up(self) -> float:
        """Run a small request so that later ones are measured warm; returns seconds."""
        ...

    def stats(self) -> EngineStats: ...


def make_engine(
    model: str | Path,
    *,
    engine: str = "native",
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    quantize: str = "none",
    weights_cache: bool = True,
    memory: str | int | None = None,
    kv_memory: str | int | None = None,
    kv_dtype: str | None = None,
    max_num_seqs: int = 32,
    max_model_len: int | None = None,
    max_batch_tokens: int | None = None,
    speculation: str = "auto",
    threads: int | None = None,
    kv_cache: bool = True,
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> Engine:
    """Load `model` into the engine of this name; the options are `NativeEngine`'s.

    The others honour a part of them and refuse the rest: "transformers" everything up to `kv_cache` but those of
    memory, quantizing and speculation, "ctranslate2" a CTranslate2 folder with dtype, threads and quantize int8,
    "openai:URL" or "openai:URL#NAME" a server (`model` is not loaded) with `max_num_seqs` requests at once.

    Raises:
        ConfigError: there is no such engine, or it cannot honour an option.
        MissingExtraError: the engine needs an extra that is not installed.
    """
    if not is_engine(engine):
        raise ConfigError(f"there is no engine {engine!r}", expected=f"one of {', '.join(ENGINES)}")
    kind = engine.partition(":")[0]
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("quantize", None if quantize == "none" else quantize),
            ("weights_cache", None if weights_cache else False),
            ("memory", memory),
            ("kv_memory", kv_memory),
            ("kv_dtype", kv_dtype),
            ("max_batch_tokens", max_batch_tokens),
            ("speculation", None if speculation == "auto" else speculation),
            ("tensor_parallel", None if tensor_parallel == 1 else tensor_parallel),
            ("pipeline_parallel", None if pipeline_parallel == 1 else pipeline_parallel),
        )
        if value is not None
    }
    if kind == "native":
        from burnish.engine.native import NativeEngine

        return NativeEngine(
            model,
            dtype=dtype,
            device=device,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            threads=threads,
            kv_cache=kv_cache,
            revision=revision,
            offline=offline,
            allow_pickle=allow_pickle,
            **given,
        )
    if kind == "transformers":
        _refuse(kind, given)
        from burnish.engine.transformers_engine import TransformersEngine

        return TransformersEngine(
            model,
            dtype=dtype,
            device=device,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            threads=threads,
            kv_cache=kv_cache,
            revision=revision,
            offline=offline,
            allow_pickle=allow_pickle,
        )
    if not kv_cache:
        given["kv_cache"] = False
    if allow_pickle:
        given["allow_pickle"] = True
    if kind == "ctranslate2":
        given.pop("quantize", None)
        _refuse(kind, {**given, **({"revision": revision} if revision else {})})
        from burnish.engine.ctranslate2_engine import CTranslate2Engine

        return CTranslate2Engine(
            model,
            dtype=dtype,
            device=device,
            quantize=quantize,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            threads=threads,
        )
    local = (("dtype", dtype, "auto"), ("device", device, "cpu"), ("threads", threads, None))
    _refuse(kind, {**given, **{name: value for name, value, default in local if value != default}})
    from burnish.engine.openai_engine import OpenAIEngine

    return OpenAIEngine(engine.partition(":")[2], max_num_seqs=max_num_seqs, max_model_len=max_model_len)


def is_engine(name: str) -> bool:
    """Whether `make_engine` knows the name."""
    kind, colon, rest = name.partition(":")
    return (kind == "openai" and bool(rest)) or (not colon and kind in ENGINES)


def _refuse(engine: str, options: Mapping[str, object]) -> None:
    for name, value in options.items():
        raise ConfigError(
            f"the {engine} engine cannot honour {name.replace('_', '-')}",
            got=value,
            remedy="Leave it out, or use --engine native.",
        )
