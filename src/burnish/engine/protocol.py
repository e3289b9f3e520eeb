"""What an engine is to whoever measures, compares or serves one, and the way to make one by name."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from burnish.engine.outputs import EngineStats, RequestOutput, StreamEvent
from burnish.engine.prompts import Prompt
from burnish.engine.sampling import SamplingParams
from burnish.errors import ConfigError

if TYPE_CHECKING:
    import torch

ENGINES = ("native", "transformers")


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
    max_num_seqs: int = 32,
    max_model_len: int | None = None,
    threads: int | None = None,
    kv_cache: bool = True,
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
) -> Engine:
    """Load `model` into the engine of this name; the options are `NativeEngine`'s.

    Raises:
        ConfigError: there is no such engine.
        MissingExtraError: the engine needs an extra that is not installed.
    """
    if engine not in ENGINES:
        raise ConfigError(f"there is no engine {engine!r}", expected=f"one of {', '.join(ENGINES)}")
    if engine == "native":
        from burnish.engine.native import NativeEngine as Made
    else:
        from burnish.engine.transformers_engine import TransformersEngine as Made
    return Made(
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
