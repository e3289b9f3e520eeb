"""burnish's own engine: the model, the scheduler and the runner joined in one loop."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path

import torch

from burnish.compress.loading import load_model
from burnish.engine.dtype_rule import pick_dtype
from burnish.engine.model_runner import ModelRunner
from burnish.engine.outputs import EngineStats, RequestOutput, StreamEvent
from burnish.engine.packing import pack_decoder, weights_bytes
from burnish.engine.prompts import Prompt, TextTokenizer
from burnish.engine.requests import RequestFactory, context_length
from burnish.engine.sampling import SamplingParams
from burnish.engine.scheduler import Batch, Scheduler
from burnish.engine.sequence import Sequence
from burnish.engine.tokenizer_folder import load_tokenizer
from burnish.errors import ConfigError
from burnish.models.checkpoint import read_config
from burnish.models.decoder import Decoder
from burnish.models.loading import config_of, parse_dtype, resolve_model


class NativeEngine:
    """Continuous batching over a preallocated KV cache. Several iterators may be open at once, all in one thread.

    Args:
        model: a folder, bundled name or hub id; or a `Decoder`, perhaps with adapters, which is put into eval mode and
            otherwise left as it is unless `optimise` is True.
        tokenizer: None loads the folder's own. Where it has none, prompts are token ids and texts are empty.
        dtype: "auto" follows `dtype_rule`; a `Decoder` keeps its own.
        max_num_seqs: most sequences that run at once.
        max_model_len: most tokens of prompt and answer; None is what the model was made for.
        max_batch_tokens: prompt tokens computed in one step; longer prompts are read in pieces of this size.
        threads: of torch, for the whole process; None leaves them.
        kv_cache: False computes everything anew for each token, to show what the cache is worth.
        optimise: join and lay out plain linears for this hardware; None does so for models loaded here.

    Raises:
        ConfigError, CheckpointError: an option is out of range, or the model cannot be loaded.
    """

    name = "native"

    def __init__(
        self,
        model: str | Path | Decoder,
        *,
        tokenizer: TextTokenizer | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        max_num_seqs: int = 32,
        max_model_len: int | None = None,
        max_batch_tokens: int = 512,
        threads: int | None = None,
        kv_cache: bool = True,
        optimise: bool | None = None,
        revision: str | None = None,
        offline: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        counts = {"max_num_seqs": max_num_seqs, "max_batch_tokens": max_batch_tokens, "threads": threads}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is out of range", got=value, expected="1 or more")
        if threads is not None:
            torch.set_num_threads(threads)
        started = time.perf_counter()
        if isinstance(model, Decoder):
            _check_same(model, dtype, torch.device(device))
            self.decoder = model.eval()
            self._load_s = 0.0
        else:
            folder = resolve_model(model, revision=revision, offline=offline, allow_pickle=allow_pickle)
            self.decoder = _load(folder, dtype=dtype, device=torch.device(device), allow_pickle=allow_pickle)
            tokenizer = tokenizer or load_tokenizer(folder)
            self._load_s = time.perf_counter() - started
        started = time.perf_counter()
        self._packed = pack_decoder(self.decoder) if optimise or (optimise is None and model is not self.decoder) else 0
        self._optimise_s = time.perf_counter() - started
        self._warmup_s = 0.0
        config = self.decoder.config
        self.max_model_len = context_length(
            max_model_len, longest=config.max_position_embeddings, unlimited=config.position == "alibi"
        )
        self.tokenizer = tokenizer
        self._requests = RequestFactory(
            tokenizer,
            vocab_size=config.vocab_size,
            max_model_len=self.max_model_len,
            end_ids=frozenset(config.eos_ids) | frozenset(tokenizer.eos_ids if tokenizer is not None else ()),
        )
        self.scheduler = Scheduler(max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, kv_cache=kv_cache)
        self.runner = ModelRunner(
            self.decoder,
            max_num_seqs=max_num_seqs,
            max_model_len=self.max_model_len,
            max_batch_tokens=max_batch_tokens,
            kv_cache=kv_cache,
        )
        self._unfinished: dict[int, Sequence] = {}

    def generate(
        self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None = None
    ) -> Generator[RequestOutput, None, None]:
        """See `Engine.generate`."""
        return self._run_all(self._requests.make_all(prompts, params))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamEvent, None, None]:
        """See `Engine.stream`."""
        return self._run_streaming(self._requests.make(prompt, params or SamplingParams(), index=0))

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a request for callers that drive `step` themselves; returns its id, which is its output's `index`."""
        sequence = self._requests.make(prompt, params or SamplingParams())
        self._add(sequence)
        return sequence.request_id

    def abort(self, request_id: int) -> None:
        """End an unfinished request with finish_reason "aborted"; its slot is free at once. Others are not affected."""
        sequence = self._unfinished.pop(request_id, None)
        if sequence is not None and not sequence.finished:
            self.scheduler.abort(sequence)
            sequence.finish("aborted", now_s=time.perf_counter())

    def step(self) -> list[RequestOutput]:
        """Run one batch; returns the requests that it finished."""
        with self._recomputed_after_failure():
            batch = self.scheduler.schedule()
            token_ids = self.runner.run(batch)
            return self._postprocess(batch, token_ids)

    def warm_up(self) -> float:
        """Run prompts of the sizes that bind memory and kernels first; returns seconds, also kept for `stats`."""
        started = time.perf_counter()
        params = SamplingParams(max_tokens=min(4, self.max_model_len - 1), ignore_eos=True)
        prompt = [0] * min(16, self.max_model_len - params.max_tokens)
        for count in (1, min(4, self.scheduler.max_num_seqs)):
            for _ in self.generate([prompt] * count, params):
                pass
        self._warmup_s = time.perf_counter() - started
        return self._warmup_s

    def stats(self) -> EngineStats:
        """Sizes, set-up times and load now."""
        cache = self.runner.cache
        return EngineStats(
            engine=self.name,
            dtype=str(self.decoder.dtype).removeprefix("torch."),
            device=str(self.decoder.device),
            threads=torch.get_num_threads(),
            weights_bytes=weights_bytes(self.decoder),
            kv_bytes=0 if cache is None else cache.num_bytes,
            load_s=self._load_s,
            optimise_s=self._optimise_s,
            warmup_s=self._warmup_s,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            max_num_seqs=self.scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
            packed_linears=self._packed,
        )

    def _add(self, sequence: Sequence) -> None:
        sequence.arrival_s = time.perf_counter()
        self._unfinished[sequence.request_id] = sequence
        self.scheduler.add(sequence)

    def _run_all(self, sequences: list[Sequence]) -> Generator[RequestOutput, None, None]:
        try:
            for sequence in sequences:
                self._add(sequence)
            for sequence in sequences:
                while not sequence.finished:
                    self.step()
                yield sequence.output()
        finally:
            for sequence in sequences:
                self.abort(sequence.request_id)

    def _run_streaming(self, sequence: Sequence) -> Generator[StreamEvent, None, None]:
        shown = 0
        try:
            self._add(sequence)
            while not sequence.finished:
                self.step()
                piece = sequence.text.take()
                if piece or sequence.finished:
                    token_ids, shown = tuple(sequence.token_ids[shown:]), len(sequence.token_ids)
                    output = sequence.output() if sequence.finished else None
                    yield StreamEvent(text=piece, token_ids=token_ids, output=output)
        finally:
            self.abort(sequence.request_id)

    def _postprocess(self, batch: Batch | None, token_ids: list[int]) -> list[RequestOutput]:
        if batch is None:
            return []
        now_s = time.perf_counter()
        for sequence, token_id in zip([row.sequence for row in batch.rows if row.samples], token_ids):
            sequence.append(token_id, now_s=now_s)
        finished = self.scheduler.postprocess(batch)
        for sequence in finished:
            self._unfinished.pop(sequence.request_id, None)
        return [sequence.output() for sequence in finished]

    @contextmanager
    def _recomputed_after_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Ctrl-C may land between any two lines of a step: the others' tokens are kept, their cache is not trusted.
            self.scheduler.restart(self._unfinished.values())
            raise


def _load(folder: Path, *, dtype: str | torch.dtype, device: torch.device, allow_pickle: bool) -> Decoder:
    hf_config = read_config(folder)
    wanted = pick_dtype(
        dtype,
        num_parameters=config_of(hf_config).num_parameters(),
        stored=parse_dtype("auto", hf_config),
        device=device,
    )
    return load_model(folder, dtype=wanted, device=device, allow_pickle=allow_pickle)


def _check_same(decoder: Decoder, dtype: str | torch.dtype, device: torch.device) -> None:
    wanted = None if dtype == "auto" else parse_dtype(dtype)
    if wanted is not None and wanted != decoder.dtype:
        raise ConfigError("a decoder that is handed in keeps its dtype", got=wanted, expected=decoder.dtype)
    if device.type != "cpu" and device.type != decoder.device.type:
        raise ConfigError("a decoder that is handed in keeps its device", got=device, expected=decoder.device)
