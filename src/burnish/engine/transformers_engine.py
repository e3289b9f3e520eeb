"""The reference engine: transformers' own model, cache and batched `generate` behind the Engine protocol.

Batches are fixed: up to `max_num_seqs` prompts, padded on the left, run until the last is done. The model, its cache
and the loop are transformers'; requests, stop conditions and (for anything but plain greedy) the sampler are
burnish's, so that both engines mean the same by the same parameters. Remote code is never run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish._optional import require
from burnish.engine.dtype_rule import pick_dtype
from burnish.engine.outputs import EngineStats, RequestOutput, StreamEvent
from burnish.engine.packing import weights_bytes
from burnish.engine.prompts import Prompt, TextTokenizer
from burnish.engine.request import Request
from burnish.engine.requests import RequestFactory, context_length
from burnish.engine.sampler import Sampler
from burnish.engine.sampling import SamplingParams
from burnish.engine.sequence import Sequence
from burnish.engine.supported import require_supported
from burnish.engine.threaded_stream import OnToken, stream_in_thread
from burnish.engine.tokenizer_folder import load_tokenizer
from burnish.errors import CheckpointError, ConfigError, RequestError
from burnish.models.checkpoint import read_config
from burnish.models.loading import parse_dtype, resolve_model

# All but what is not a matter of choosing tokens.
SUPPORTED = frozenset(field.name for field in fields(SamplingParams)) - {"n", "prompt_logprobs"}


class TransformersEngine:
    """Any causal language model that transformers knows. One thread at a time.

    Args:
        model: a folder, bundled name or hub id.
        tokenizer: None loads the folder's own (or none, where it has none).
        dtype: "auto" follows `dtype_rule`, as the native engine does.
        kv_cache: False runs `generate` with use_cache=False.
        The others are as in `NativeEngine`.

    Raises:
        MissingExtraError: transformers is not installed (extra hf).
        ConfigError, CheckpointError: an option is out of range, or the model cannot be loaded.
    """

    name = "transformers"

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: TextTokenizer | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        max_num_seqs: int = 32,
        max_model_len: int | None = None,
        threads: int | None = None,
        kv_cache: bool = True,
        revision: str | None = None,
        offline: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        transformers = require("transformers", extra="hf")
        for name, value in (("max_num_seqs", max_num_seqs), ("threads", threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is out of range", got=value, expected="1 or more")
        if threads is not None:
            torch.set_num_threads(threads)
        started = time.perf_counter()
        folder = resolve_model(model, revision=revision, offline=offline, allow_pickle=allow_pickle)
        self.device = torch.device(device)
        self.model = _load(transformers, folder, dtype=dtype, device=self.device, allow_pickle=allow_pickle)
        self.tokenizer = tokenizer or load_tokenizer(folder)
        self._load_s = time.perf_counter() - started
        self._warmup_s = 0.0
        self._kv_bytes = 0
        self._running = self._waiting = 0
        self._kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        config = self.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None)
        self.max_model_len = context_length(
            max_model_len, longest=longest or max_model_len or 2048, unlimited=longest is None
        )
        ends = {*_ids(config.eos_token_id), *_ids(self.model.generation_config.eos_token_id)}
        self._requests = RequestFactory(
            self.tokenizer,
            vocab_size=config.vocab_size,
            max_model_len=self.max_model_len,
            end_ids=frozenset(ends) | frozenset(self.tokenizer.eos_ids if self.tokenizer is not None else ()),
        )
        # A model's own defaults (temperature, penalties) must not leak into requests that did not ask for them.
        self.model.generation_config = transformers.GenerationConfig()

    def generate(
        self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None = None
    ) -> Generator[RequestOutput, None, None]:
        """See `Engine.generate`; closing the iterator takes effect between two batches."""
        sequences = self._requests.make_all(prompts, params)
        for sequence in sequences:
            require_supported(sequence.params, SUPPORTED, engine=self.name)
        return self._run_all(sequences)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamEvent, None, None]:
        """See `Engine.stream`. `generate` runs in a thread of its own meanwhile."""
        sequence = self._requests.make(prompt, params or SamplingParams(), index=0)
        require_supported(sequence.params, SUPPORTED, engine=self.name)
        return stream_in_thread(sequence, self._run_batch, name="transformers-generate")

    def warm_up(self) -> float:
        """Run a short prompt; returns seconds, also kept for `stats`."""
        started = time.perf_counter()
        params = SamplingParams(max_tokens=min(4, self.max_model_len - 1), ignore_eos=True)
        prompt = [0] * min(16, self.max_model_len - params.max_tokens)
        for count in (1, min(4, self.max_num_seqs)):
            for _ in self.generate([prompt] * count, params):
                pass
        self._warmup_s = time.perf_counter() - started
        return self._warmup_s

    def stats(self) -> EngineStats:
        """Sizes, set-up times and load now; kv_bytes is the last batch's cache at its largest."""
        return EngineStats(
            engine=self.name,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.device),
            threads=torch.get_num_threads(),
            weights_bytes=weights_bytes(self.model),
            kv_bytes=self._kv_bytes,
            load_s=self._load_s,
            optimise_s=0.0,
            warmup_s=self._warmup_s,
            running=self._running,
            waiting=self._waiting,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
        )

    def _run_all(self, sequences: list[Sequence]) -> Generator[RequestOutput, None, None]:
        now_s = time.perf_counter()
        for sequence in sequences:
            sequence.arrival_s = now_s
        try:
            for begin in range(0, len(sequences), self.max_num_seqs):
                group = sequences[begin : begin + self.max_num_seqs]
                self._waiting = len(sequences) - begin - len(group)
                self._run_batch(group, lambda _: None)
                for sequence in group:
                    yield Request(sequences=[sequence]).output()
        finally:
            self._waiting = 0

    def _run_batch(self, sequences: list[Sequence], on_token: OnToken) -> None:
        """Run one left-padded batch to its end; every sequence is finished afterwards."""
        transformers = require("transformers", extra="hf")
        width = max(len(sequence.prompt_ids) for sequence in sequences)
        pads = [width - len(sequence.prompt_ids) for sequence in sequences]
        tokens_BT = torch.tensor([[0] * pad + [*one.prompt_ids] for pad, one in zip(pads, sequences)])
        mask_BT = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        progress = _Progress(sequences, on_token)
        settings = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=max(sequence.max_tokens for sequence in sequences),
            use_cache=self._kv_cache,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        processors = [] if all(one.params.plain_greedy for one in sequences) else [_ChooseLikeBurnish(sequences)]
        self._running = len(sequences)
        try:
            with torch.inference_mode():
                result = self.model.generate(
                    tokens_BT.to(self.device),
                    attention_mask=mask_BT.to(self.device),
                    generation_config=settings,
                    logits_processor=transformers.LogitsProcessorList(processors),
                    stopping_criteria=transformers.StoppingCriteriaList([progress]),
                )
        finally:
            self._running = 0
        self._kv_bytes = _cache_bytes(getattr(result, "past_key_values", None))


class _Progress:
    """A stopping criterion: takes each step's tokens, notes the time, and tells which sequences are done."""

    def __init__(self, sequences: list[Sequence], on_token: OnToken) -> None:
        self.sequences = sequences
        self.on_token = on_token

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        now_s = time.perf_counter()
        for sequence, token_id in zip(self.sequences, input_ids[:, -1].tolist()):
            if not sequence.finished:
                sequence.append(token_id, now_s=now_s)
                self.on_token(sequence)
        return torch.tensor([sequence.finished for sequence in self.sequences], device=input_ids.device)


class _ChooseLikeBurnish:
    """A logits processor that lets burnish's sampler choose and leaves transformers only that token."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.sampler = Sampler()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [row for row, sequence in enumerate(self.sequences) if not sequence.finished]
        sampled = self.sampler.sample(scores[rows].clone(), [self.sequences[row] for row in rows])
        for row, one in zip(rows, sampled):
            if one.failure is not None:
                raise one.failure
            if one.logprob is not None:
                self.sequences[row].logprobs.append(one.logprob)
        forced = torch.full_like(scores, float("-inf"))
        forced[:, 0] = 0.0
        forced[rows] = float("-inf")
        forced[rows, [one.token_id for one in sampled]] = 0.0
        return forced


def _load(
    transformers: Any, folder: Path, *, dtype: str | torch.dtype, device: torch.device, allow_pickle: bool
) -> Any:
    hf_config = read_config(folder)
    weight_files = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    stored = parse_dtype("auto", hf_config)
    stored_bytes = 4 if stored in (None, torch.float32) else 2
    wanted = pick_dtype(
        dtype,
        num_parameters=sum(path.stat().st_size for path in weight_files) // stored_bytes,
        stored=stored,
        device=device,
    )
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=wanted,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=None if allow_pickle else True,
        )
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load {folder}: {reason}") from error
    return model.to(device).eval()


def _ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, int):
        return (value,)
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise RequestError("eos_token_id is of the wrong kind", got=repr(value), expected="an integer or a list of them")


def _cache_bytes(cache: Any) -> int:
    layers = getattr(cache, "layers", None) or ()
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
