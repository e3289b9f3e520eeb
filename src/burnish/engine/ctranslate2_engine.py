"""CTranslate2 (https://opennmt.net/CTranslate2) behind the Engine protocol; needs the extra `ct2`.

The model is a folder that CTranslate2's converter made; nothing is converted here. Batches are fixed: up to
`max_num_seqs` requests of equal sampling settings run until the last is done. Where an answer ends is burnish's
decision, as for the native engine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from burnish._optional import require
from burnish.engine.outputs import EngineStats, RequestOutput, StreamEvent
from burnish.engine.prompts import Prompt, TextTokenizer
from burnish.engine.request import Request
from burnish.engine.requests import RequestFactory
from burnish.engine.sampling import SamplingParams
from burnish.engine.sequence import Sequence
from burnish.engine.supported import require_supported
from burnish.engine.threaded_stream import stream_in_thread
from burnish.engine.tokenizer_folder import load_tokenizer
from burnish.errors import CheckpointError, ConfigError

SUPPORTED = frozenset(
    (
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "stop",
        "include_stop",
        "stop_token_ids",
        "ignore_eos",
    )
)
DTYPES = ("float32", "bfloat16", "float16")
UNKNOWN_LENGTH = 1 << 20
"""Tokens of prompt and answer when nobody says: the folder does not tell how long its model's context is."""


class CTranslate2Engine:
    """A CTranslate2 `Generator`. One thread at a time.

    Args:
        model: a folder with model.bin, config.json and the vocabulary; tokenizer files in it are used.
        dtype: "auto" is what the folder was converted to.
        quantize: "int8" computes in int8; "none" as the folder was converted.
        max_num_seqs: most requests of one batch.
        max_model_len: most tokens of prompt and answer; unlimited when None.
        threads: of each product; all cores when None.

    Raises:
        MissingExtraError: ctranslate2 is not installed (extra ct2).
        ConfigError: it is no CTranslate2 folder, or an option cannot be honoured.
        CheckpointError: the folder is corrupt.
    """

    name = "ctranslate2"

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: TextTokenizer | None = None,
        dtype: object = "auto",
        device: str = "cpu",
        quantize: str = "none",
        max_num_seqs: int = 32,
        max_model_len: int | None = None,
        threads: int | None = None,
    ) -> None:
        library = require("ctranslate2", extra="ct2")
        for option, value in (("max_num_seqs", max_num_seqs), ("threads", threads), ("max_model_len", max_model_len)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} is out of range", got=value, expected="1 or more")
        self._folder = _checked_folder(Path(model))
        kind, _, index = device.partition(":")
        self._device = device
        self._threads = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1))
        started = time.perf_counter()
        try:
            self._generator = library.Generator(
                str(self._folder),
                device=kind,
                device_index=int(index or 0),
                compute_type=_compute_type(dtype, quantize),
                inter_threads=1,
                intra_threads=self._threads,
            )
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"CTranslate2 cannot load {model}: {_first_line(error)}") from error
        self.tokenizer = tokenizer or load_tokenizer(self._folder)
        self._pieces, ends = _vocabulary(self._folder)
        self._load_s = time.perf_counter() - started
        self._warmup_s = 0.0
        self._running = self._waiting = 0
        self.vocab_size = len(self._pieces)
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len or UNKNOWN_LENGTH
        self._requests = RequestFactory(
            self.tokenizer,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            end_ids=ends | frozenset(self.tokenizer.eos_ids if self.tokenizer is not None else ()),
        )

    def generate(
        self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None = None
    ) -> Generator[RequestOutput, None, None]:
        """See `Engine.generate`; closing the iterator takes effect between two batches."""
        sequences = self._requests.make_all(prompts, params)
        for sequence in sequences:
            require_supported(sequence.params, SUPPORTED, engine=self.name)
        return self._run_all(sequences)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamEvent, None, None]:
        """See `Engine.stream`. The model runs in a thread of its own meanwhile."""
        sequence = self._requests.make(prompt, params or SamplingParams(), index=0)
        require_supported(sequence.params, SUPPORTED, engine=self.name)
        return stream_in_thread(sequence, self._run_batch, name="ctranslate2-generate")

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
        """What the library tells: weights_bytes is the size of model.bin, kv_bytes is unknown (0)."""
        return EngineStats(
            engine=self.name,
            dtype=self._generator.compute_type,
            device=self._device,
            threads=self._threads,
            weights_bytes=(self._folder / "model.bin").stat().st_size,
            kv_bytes=0,
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
        done = 0
        try:
            for group in _groups(sequences, self.max_num_seqs):
                self._waiting = len(sequences) - done - len(group)
                self._run_batch(group, lambda _: None)
                done += len(group)
                for sequence in group:
                    yield Request(sequences=[sequence]).output()
        finally:
            self._waiting = 0

    def _run_batch(self, sequences: list[Sequence], on_token: Callable[[Sequence], None]) -> None:
        """Run requests of equal sampling settings; every one is finished afterwards."""
        params = sequences[0].params
        failures: list[BaseException] = []

        def take(step: Any) -> bool:
            """Take one token; True ends that request. An exception would be lost in the library."""
            sequence = sequences[step.batch_id]
            try:
                if not sequence.finished:
                    sequence.append(step.token_id, now_s=time.perf_counter())
                    on_token(sequence)
            except BaseException as error:
                failures.append(error)
            return sequence.finished or bool(failures)

        self._running = len(sequences)
        try:
            self._generator.generate_batch(
                [[self._pieces[token] for token in sequence.prompt_ids] for sequence in sequences],
                max_batch_size=len(sequences),
                max_length=max(sequence.max_tokens for sequence in sequences),
                sampling_topk=1 if params.greedy else params.top_k,
                sampling_topp=params.top_p,
                sampling_temperature=1.0 if params.greedy else params.temperature,
                end_token=[],
                include_prompt_in_result=False,
                callback=take,
            )
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"CTranslate2 failed: {_first_line(error)}") from error
        finally:
            self._running = 0
        if failures:
            raise failures[0]


def _checked_folder(folder: Path) -> Path:
    if (folder / "model.bin").is_file():
        return folder
    remedy = None
    if (folder / "config.json").is_file():
        remedy = (
            f"Convert it: ct2-transformers-converter --model {folder} --output_dir OUT "
            "--copy_files tokenizer.json tokenizer_config.json"
        )
    raise ConfigError(f"{folder} is no CTranslate2 folder", expected="a folder with model.bin", remedy=remedy)


def _compute_type(dtype: object, quantize: str) -> str:
    if quantize not in ("none", "int8"):
        raise ConfigError("the ctranslate2 engine cannot honour quantize", got=quantize, expected="none or int8")
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in DTYPES:
        raise ConfigError("unknown dtype", got=name, expected=f"auto, {', '.join(DTYPES)}")
    if quantize == "int8":
        return "int8" if name == "auto" else f"int8_{name}"
    return "default" if name == "auto" else name


def _vocabulary(folder: Path) -> tuple[list[str], frozenset[int]]:
    """The pieces by token id, and the ids that end an answer."""
    try:
        pieces = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        end = config.get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder} has no readable vocabulary.json and config.json") from error
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise CheckpointError(f"{folder / 'vocabulary.json'} is not a list of pieces")
    return pieces, frozenset({pieces.index(end)} if end in pieces else ())


def _groups(sequences: list[Sequence], size: int) -> list[list[Sequence]]:
    """Neighbours of equal sampling settings, at most `size` of them together."""
    groups: list[list[Sequence]] = []
    previous: object = None
    for sequence in sequences:
        params = sequence.params
        settings = (params.greedy, params.temperature, params.top_k, params.top_p)
        if not groups or settings != previous or len(groups[-1]) == size:
            groups.append([])
        groups[-1].append(sequence)
        previous = settings
    return groups


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
