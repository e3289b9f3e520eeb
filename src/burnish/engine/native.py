"""burnish's own engine: the model, the scheduler and the runner joined in one loop."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from burnish.engine.adapters import adapter_of_each
from burnish.engine.block_manager import BLOCK_SIZE, BlockManager
from burnish.engine.drafter import Drafter, make_drafter
from burnish.engine.engine_options import check_counts, check_no_cache_asked
from burnish.engine.engine_setup import EngineSettings, set_up
from burnish.engine.logprobs import PromptLogprobs
from burnish.engine.memory_budget import longest_window
from burnish.engine.model_runner import ModelRunner
from burnish.engine.outputs import EngineStats, RankMemory, RequestOutput, StreamEvent
from burnish.engine.prompts import Prompt, TextTokenizer
from burnish.engine.request import Request
from burnish.engine.requests import RequestFactory, one_answer
from burnish.engine.rope_lengths import rope_lengths
from burnish.engine.sampling import SamplingParams
from burnish.engine.scheduler import Scheduler
from burnish.engine.sequence import Sequence
from burnish.engine.step_clock import StepClock
from burnish.models.decoder import Decoder

if TYPE_CHECKING:
    from burnish.engine.shard_group import ShardGroup

_SCORED_BYTES = 64 * 2**20


class NativeEngine:
    """Continuous batching over a paged KV cache. Several iterators may be open at once, all in one thread.

    Args:
        model: a folder, bundled name or hub id; or a `Decoder`, perhaps with adapters, which is put into eval mode and
            otherwise left as it is unless `optimise` is True.
        tokenizer: None loads the folder's own. Where it has none, prompts are token ids and texts are empty.
        dtype: "auto" follows `dtype_rule`; a `Decoder` keeps its own.
        max_num_seqs: most sequences that run at once.
        max_model_len: most tokens of prompt and answer; None is what the model was made for, or what the memory holds.
        max_batch_tokens: tokens computed in one step; longer prompts are read in pieces.
        memory: of the whole process (on a GPU: of the card), as "4GiB" or bytes; see `memory_budget`.
        kv_memory: of the KV cache alone.
        kv_dtype: of the KV cache: "auto" (the model's), "bfloat16", "float16", "float32" or "int8".
        block_size: tokens per block of the cache.
        prefix_caching: prompts that begin alike are computed once, while the blocks last.
        kv_cache: False computes everything anew for each token, to show what the cache is worth.
        backend: "auto", "torch", "cpu" or "gpu"; see `backends`.
        threads: of torch, for the whole process; None leaves them.
        optimise: join and lay out plain linears for this hardware; None does so for models loaded here.
        quantize: "int8", "int4", "auto" or "none": the linears of a dense checkpoint, while it is read.
        weights_cache: keep quantized weights on disk for the next time; see `compress.optimise_cache`.
        speculation: "auto" guesses tokens that copy the prompt or the answer while few sequences run, "ngram" whatever
            runs, both where that is measured to pay; "off" never. Answers are the same.
        adapters: folders of LoRA adapters in PEFT's format by the names that requests choose them with.
        tensor_parallel, pipeline_parallel: processes that share every block, and stages of blocks; their product is how
            many processes run the model. They are started here, unless torchrun did. See `models.shard_cut`.
        shards: the group of processes, seen from its rank 0, where somebody else started them; see `shard_group.join`.

    Raises:
        ConfigError, CheckpointError: an option is out of range, or the model cannot be loaded.

    Attributes:
        drafter: guesses tokens for the next step to verify; None does not.
        optimised: what loading did to the weights; None for a model handed in.
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
        memory: str | int | None = None,
        kv_memory: str | int | None = None,
        kv_dtype: str | torch.dtype | None = None,
        block_size: int = BLOCK_SIZE,
        prefix_caching: bool = True,
        kv_cache: bool = True,
        backend: str = "auto",
        threads: int | None = None,
        optimise: bool | None = None,
        quantize: str = "none",
        weights_cache: bool = True,
        speculation: str = "auto",
        adapters: Mapping[str, str | Path] | None = None,
        revision: str | None = None,
        offline: bool = False,
        allow_pickle: bool = False,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        shards: ShardGroup | None = None,
    ) -> None:
        check_counts(
            max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, block_size=block_size, threads=threads
        )
        if not kv_cache:
            check_no_cache_asked(memory=memory, kv_memory=kv_memory)
        self._speculation = speculation
        self.drafter: Drafter | None = make_drafter(speculation, kv_cache=kv_cache)
        parts = set_up(
            EngineSettings(
                model=model,
                tokenizer=tokenizer,
                dtype=dtype,
                device=device,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_batch_tokens=max_batch_tokens,
                memory=memory,
                kv_memory=kv_memory,
                kv_dtype=kv_dtype,
                block_size=block_size,
                kv_cache=kv_cache,
                backend=backend,
                threads=threads,
                optimise=optimise,
                quantize=quantize,
                weights_cache=weights_cache,
                adapters=adapters,
                revision=revision,
                offline=offline,
                allow_pickle=allow_pickle,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
                shards=shards,
            )
        )
        config = parts.config
        self.decoder, self.tokenizer, self.optimised = parts.decoder, parts.tokenizer, parts.optimised
        self.max_model_len = parts.max_model_len
        self._adapters = parts.adapters
        self._load_s, self._optimise_s = parts.load_s, parts.optimise_s
        self._warmup_s = 0.0
        self._requests_of = RequestFactory(
            self.tokenizer,
            vocab_size=config.vocab_size,
            max_model_len=self.max_model_len,
            end_ids=frozenset(config.eos_ids) | frozenset(self.tokenizer.eos_ids if self.tokenizer is not None else ()),
        )
        blocks = BlockManager(
            parts.num_blocks, block_size=block_size, prefix_caching=prefix_caching, window=longest_window(config)
        )
        self.scheduler = Scheduler(
            blocks=blocks if kv_cache else None,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_scored_tokens=max(1, _SCORED_BYTES // (4 * config.vocab_size)),
            rope=rope_lengths(config, max_model_len=self.max_model_len),
            block_bytes=parts.block_bytes,
        )
        self.runner = ModelRunner(parts.backend, max_batch_tokens=max_batch_tokens)
        self._closing = weakref.finalize(self, getattr(parts.backend, "close", _nothing))
        self._clock = StepClock()
        self._prompt_tokens = 0
        self._unfinished: dict[int, Request] = {}
        self._request_of: dict[Sequence, Request] = {}
        # Finished in a step that failed afterwards: the next one reports them.
        self._late: list[Request] = []

    def generate(
        self,
        prompts: SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        adapter: str | SequenceOf[str | None] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """See `Engine.generate`. A request with `params.n` above 1 gives one output with so many `choices`.

        Args:
            adapter: name of the adapter to answer with, one for all or one for each prompt; None is the base alone.
        """
        pairs = self._requests_of.pairs(prompts, params)
        names = adapter_of_each(adapter, len(pairs))
        every = enumerate(zip(pairs, names))
        return self._run_all([self.prepare(*pair, adapter=name, index=index) for index, (pair, name) in every])

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Generator[StreamEvent, None, None]:
        """See `Engine.stream`; `adapter` as in `generate`."""
        return self._run_streaming(self.prepare(prompt, one_answer(params), adapter=adapter, index=0))

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None) -> int:
        """Queue a request for callers that drive `step` themselves; returns its id, which is its output's `index`."""
        return self.enqueue(self.prepare(prompt, params or SamplingParams(), adapter=adapter))

    def enqueue(self, request: Request) -> int:
        """Queue a prepared request; as `submit`."""
        request.followed = True
        self._add(request)
        return request.request_id

    def abort(self, request_id: int) -> None:
        """End an unfinished request with finish_reason "aborted"; its blocks are free at once, others go on."""
        request = self._unfinished.get(request_id)
        if request is None:
            return
        self._forget(request)
        for sequence in request.sequences:
            if not sequence.finished:
                self.scheduler.abort(sequence)
                sequence.finish("aborted", now_s=time.perf_counter())

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Serve another LoRA adapter (PEFT's format), between steps.

        Raises:
            ConfigError: the name is taken, or the adapter does not fit the base or the backend.
            CheckpointError: a file is missing or corrupt.
        """
        self._adapters.add(name, folder)

    def remove_adapter(self, name: str) -> None:
        """Serve an adapter no longer.

        Raises:
            ConfigError: there is none of this name, or an unfinished request uses it.
        """
        self._adapters.remove(name, sequences=list(self._request_of))

    def step(self) -> list[RequestOutput]:
        """Run one batch; returns the requests that it finished."""
        return [request.output() for request in self.advance() if request.finished]

    def step_events(self) -> list[tuple[int, StreamEvent]]:
        """As `step`, for callers of `submit` that want every token: request ids with what is new, the end included."""
        events = [(request.request_id, request.event()) for request in self.advance() if request.followed]
        return [(request_id, event) for request_id, event in events if event is not None]

    def warm_up(self) -> float:
        """Run prompts of the sizes that bind memory and kernels first; returns seconds, also kept for `stats`."""
        started = time.perf_counter()
        params = SamplingParams(max_tokens=min(4, self.max_model_len - 1), ignore_eos=True)
        prompt = [0] * min(16, self.max_model_len - params.max_tokens)
        self.runner.prepare(self.scheduler.max_num_seqs)
        for count in (1, min(4, self.scheduler.max_num_seqs)):
            for _ in self.generate([prompt] * count, params):
                pass
        self._warmup_s = time.perf_counter() - started
        return self._warmup_s

    def close(self) -> None:
        """Let go of the other processes of a model that several run, as happens when the engine is forgotten."""
        self._closing()

    def rank_memory(self) -> tuple[RankMemory, ...]:
        """What each process takes now; empty where this one runs the model alone."""
        read = getattr(self.runner.backend, "read_memory", None)
        return () if read is None else read()

    def stats(self) -> EngineStats:
        """Sizes, set-up times, load now, and what was done so far."""
        scheduler, runner, backend = self.scheduler, self.runner, self.runner.backend
        blocks = scheduler.blocks
        return EngineStats(
            engine=self.name,
            dtype=str(self.decoder.dtype).removeprefix("torch."),
            device=str(self.decoder.device),
            threads=torch.get_num_threads(),
            weights_bytes=backend.weights_bytes,
            kv_bytes=backend.kv_bytes,
            load_s=self._load_s,
            optimise_s=self._optimise_s,
            warmup_s=self._warmup_s,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=self.max_model_len,
            packed_linears=getattr(backend, "packed_linears", 0),
            backend=backend.name,
            kv_blocks=0 if blocks is None else blocks.num_blocks,
            kv_blocks_used=0 if blocks is None else blocks.num_used,
            kv_blocks_cached=0 if blocks is None else blocks.num_cached,
            kv_bytes_used=0 if blocks is None else blocks.num_used * scheduler.block_bytes,
            preemptions=scheduler.num_preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            steps=runner.num_steps,
            step_s=self._clock.total_s,
            backend_s=runner.backend_s,
            prompt_tokens=self._prompt_tokens,
            output_tokens=runner.output_tokens,
            speculation=self._speculation,
            drafted_tokens=runner.drafted_tokens,
            accepted_tokens=runner.accepted_tokens,
            adapters=tuple(self._adapters.names),
            adapter_bytes=self._adapters.num_bytes,
            tokens_per_s=self._clock.tokens_per_s(),
            tensor_parallel=getattr(backend, "tensor_parallel", 1),
            pipeline_parallel=getattr(backend, "pipeline_parallel", 1),
            ranks=getattr(backend, "memory", ()),
        )

    def prepare(
        self, prompt: Prompt, params: SamplingParams, *, adapter: str | None = None, index: int | None = None
    ) -> Request:
        """Check a request; nothing runs yet. The one method that other threads may call, as it may take seconds."""
        self._adapters.check(adapter)
        sequences = self._requests_of.make_choices(prompt, params, index=index)
        for sequence in sequences:
            sequence.adapter_name = adapter
            self.scheduler.check_fits(sequence)
        if params.prompt_logprobs is not None:
            sequences[0].prompt_logprobs = PromptLogprobs(params.prompt_logprobs, sequences[0].prompt_ids)
        return Request(sequences=sequences)

    def _add(self, request: Request) -> None:
        now_s = time.perf_counter()
        for sequence in request.sequences:
            self._adapters.assign(sequence)
        self._unfinished[request.request_id] = request
        self._prompt_tokens += len(request.sequences[0].prompt_ids)
        for sequence in request.sequences:
            sequence.arrival_s = now_s
            self._request_of[sequence] = request
            self.scheduler.add(sequence)

    def _run_all(self, requests: list[Request]) -> Generator[RequestOutput, None, None]:
        try:
            for request in requests:
                self._add(request)
            for request in requests:
                while not request.finished:
                    self.advance()
                yield request.output()
        finally:
            for request in requests:
                self.abort(request.request_id)

    def _run_streaming(self, request: Request) -> Generator[StreamEvent, None, None]:
        try:
            self._add(request)
            while not request.finished:
                self.advance()
                event = request.event(with_text=True)
                if event is not None:
                    yield event
        finally:
            self.abort(request.request_id)

    def advance(self) -> list[Request]:
        """Run one batch; returns the requests that got on, each finished one once."""
        started = time.perf_counter()
        before = self.runner.output_tokens
        with self._recomputed_after_failure():
            advanced = dict.fromkeys(self._late)
            running = self.scheduler.running
            if self.drafter is not None and all(one.num_uncomputed == 1 for one in running):
                # Where a prompt is read the step is bound by arithmetic, and guesses are not cheap.
                self.drafter.draft(running)
            batch = self.scheduler.schedule()
            if batch is not None:
                self.runner.run(batch)
                self.scheduler.postprocess(batch)
                advanced |= {self._request_of[row.sequence]: None for row in batch.rows if row.samples}
                seconds = self._clock.count(started, tokens=self.runner.output_tokens - before)
                if self.drafter is not None and batch.decoding:
                    self.drafter.observe(batch.num_tokens, seconds)
            self._late = []
            for request in advanced:
                if request.finished:
                    self._forget(request)
        return list(advanced)

    def _forget(self, request: Request) -> None:
        self._unfinished.pop(request.request_id, None)
        for sequence in request.sequences:
            self._request_of.pop(sequence, None)

    @contextmanager
    def _recomputed_after_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Ctrl-C may land between any two lines of a step: the others' tokens are kept, their cache is not trusted.
            requests = list(self._unfinished.values())
            self.scheduler.restart(sequence for request in requests for sequence in request.sequences)
            self.runner.backend.reset()
            self._late = [request for request in requests if request.finished]
            raise


def _nothing() -> None:
    pass
