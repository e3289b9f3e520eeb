"""The Python face of opening a model: `burnish.load` and `burnish.Engine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from burnish.data.tokenizer import Tokenizer
from burnish.engine.outputs import EngineStats, RequestOutput, StreamEvent
from burnish.engine.prompts import Prompt
from burnish.engine.sampling import SamplingParams
from burnish.models.decoder import Decoder
from burnish.pipeline.opening import EngineOptions, Source, open_decoder, open_engine


def load(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    adapter: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
) -> tuple[Decoder, Tokenizer]:
    """Load a model and its tokenizer.

    `model(tokens_BT)` takes (B, T) token ids and returns (B, T, vocab) logits. An adapter's folder stands for its base
    with the adapter on it.

    Raises:
        CheckpointError, ConfigError: what is named is not there, is corrupt, or does not fit together.
    """
    source = Source(dtype=dtype, device=device, revision=revision, offline=offline, allow_pickle=allow_pickle)
    opened = open_decoder(model, source, adapter=adapter)
    return opened.decoder, opened.tokenizer


class Engine:
    """Generates with a model: continuous batching over a KV cache.

    Args:
        model: folder, bundled name, hub id, or an adapter's folder; for "ctranslate2" a folder of its converter's.
        engine: "native", "transformers", "ctranslate2" or "openai:URL"; those that are not native refuse the options
            that they cannot honour.
        quantize: "int8" or "int4" weights of a dense checkpoint, made while it is read and kept on disk for the next
            time; "auto" is int8 on CPUs where it is measured to be good enough; "none" leaves the weights as they are.
        memory: most memory of the process (on a GPU: of the card), as "4GiB" or bytes.
        kv_memory: memory of the KV cache alone.
        kv_dtype: of the KV cache: "auto" (the model's), "float32", "bfloat16", "float16" or "int8".
        dtype: "auto" by size and hardware, or a name.
        threads: CPU threads; all cores when None.
        max_num_seqs: most prompts that run at once.
        max_model_len: most tokens of prompt and answer together.
        tensor_parallel, pipeline_parallel: processes that share every block, and stages of blocks; they are started
            here, unless torchrun did.

    Raises:
        CheckpointError, ConfigError, MissingExtraError: as `load`, and when the engine's extra is missing.
    """

    def __init__(
        self,
        model: str,
        *,
        engine: str = "native",
        quantize: str = "none",
        memory: str | int | None = None,
        kv_memory: str | int | None = None,
        kv_dtype: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        adapter: str | None = None,
        max_num_seqs: int = 32,
        max_model_len: int | None = None,
        kv_cache: bool = True,
        revision: str | None = None,
        offline: bool = False,
        allow_pickle: bool = False,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
    ) -> None:
        source = Source(
            dtype=dtype, device=device, threads=threads, revision=revision, offline=offline, allow_pickle=allow_pickle
        )
        self._engine = open_engine(
            model,
            source,
            adapter=adapter,
            engine=engine,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            options=EngineOptions(
                quantize=quantize,
                memory=memory,
                kv_memory=kv_memory,
                kv_dtype=kv_dtype,
                kv_cache=kv_cache,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
            ),
        )

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """Run prompts (texts, token ids or chat messages) together; outputs come in the prompts' order.

        Raises:
            RequestError: a prompt or its parameters cannot be honoured.
        """
        return self._engine.generate(prompts, params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Run one prompt; pieces of text come as they are certain. Closing the iterator stops it."""
        return self._engine.stream(prompt, params)

    def warm_up(self) -> float:
        """Run a small request, so that later ones are quick from the start; returns seconds."""
        return self._engine.warm_up()

    def close(self) -> None:
        """End the other processes of a model that several run; without it they end with this one."""
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()

    def stats(self) -> EngineStats:
        """Sizes, set-up times and load now."""
        return self._engine.stats()
