"""Quantizing a dense checkpoint while it is read: `load_optimised`, and what it did.

Each tensor is read, rounded and forgotten, so that memory holds the quantized model and one dense tensor. Which layers
there are is said in `optimised_layers`; what is kept on disk for the next time in `optimise_cache`; whether the result
is good enough to be taken unasked in `optimise_quality`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.compress.loading import load_model
from burnish.compress.optimise_cache import CacheEntry, entry_of, read_entry, update_record, write_entry
from burnish.compress.optimise_quality import Divergence, divergence_from_checkpoint, reason_against
from burnish.compress.optimised_layers import GROUP_SIZE, place_layers, place_tensor
from burnish.errors import CheckpointError, ConfigError
from burnish.models.decoder import Decoder
from burnish.models.loading import materialise, open_checkpoint, plan_reads, read_parts, scratch_for

QUANTIZE = ("none", "int8", "int4", "auto")


@dataclass(frozen=True, kw_only=True)
class OptimiseReport:
    """What was done while loading, in seconds and bytes.

    Attributes:
        asked: "none", "int8", "int4" or "auto".
        quantize: what was done.
        reason: why, in words.
        bytes_before: of the dense weights in the dtype of the activations.
        bytes_after: of the weights as they are in memory.
        hash_s, read_s, quantize_s, check_s, write_s, seconds: hashing the files, reading, rounding, comparing with the
            checkpoint, writing to the cache, everything.
        cached: the weights came from the cache.
        cache: the folder of the entry; None when nothing is kept.
        kl_mean, kl_tokens: mean divergence from the checkpoint in nats per token; None when it was not measured.
        notes: what people should know of the cache, a line each: it was damaged, or cannot be written to.
    """

    asked: str
    quantize: str
    reason: str
    bytes_before: int
    bytes_after: int
    hash_s: float = 0.0
    read_s: float = 0.0
    quantize_s: float = 0.0
    check_s: float = 0.0
    write_s: float = 0.0
    seconds: float = 0.0
    cached: bool = False
    cache: str | None = None
    kl_mean: float | None = None
    kl_tokens: int = 0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Optimised:
    decoder: Decoder
    report: OptimiseReport


def load_optimised(
    folder: Path,
    *,
    quantize: str,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    group_size: int = GROUP_SIZE,
    cache: bool = True,
    allow_pickle: bool = False,
) -> Optimised:
    """Load a model folder with its linears in 8 or 4 bits, see `optimised_layers`; "none" is `load_model`.

    "auto" is int8 or none by the rule in `optimise_quality`.

    Args:
        dtype: of what stays dense, and of the activations.
        group_size: of 4-bit weights.
        cache: keep the result on disk, and use what is kept there.

    Raises:
        ConfigError: the model is quantized already, or an option is not known.
        CheckpointError: the folder is corrupt.
        CompressionError: NaN or infinite weights.
    """
    check_quantize(quantize)
    if group_size < 1:
        raise ConfigError("group_size is out of range", got=group_size, expected="1 or more")
    loading = _Loading(
        folder=folder,
        asked=quantize,
        kind="int8" if quantize == "auto" else quantize,
        dtype=dtype,
        device=torch.device(device),
        group_size=group_size,
        allow_pickle=allow_pickle,
    )
    return loading.run(cache=cache)


def check_quantize(quantize: str) -> None:
    """Raises ConfigError for a name that is not in `QUANTIZE`."""
    if quantize not in QUANTIZE:
        raise ConfigError("quantize is not known", got=quantize, expected=", ".join(QUANTIZE))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@dataclass(kw_only=True)
class _Loading:
    """One load: its options, its clock and what it has to tell."""

    folder: Path
    asked: str
    kind: str
    dtype: torch.dtype
    device: torch.device
    group_size: int
    allow_pickle: bool
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    spent: dict[str, float] = field(default_factory=dict)
    dense_bytes: int = 0

    def run(self, *, cache: bool) -> Optimised:
        decoder, reader, hf_config = open_checkpoint(self.folder, dtype=self.dtype, allow_pickle=self.allow_pickle)
        self.dense_bytes = tensor_bytes(decoder)
        if self.asked == "none":
            return self._dense("as asked")
        if self.asked == "auto":
            against = reason_against(decoder, hf_config, self.device)
            if against is not None:
                return self._dense(against)
        elif hf_config.get("quantization_config") is not None:
            raise ConfigError(
                f"{self.folder} is quantized already",
                got=f"--quantize {self.asked}",
                expected="a dense checkpoint",
                remedy="Leave --quantize out, or start from the model it was made from.",
            )
        del decoder
        entry: CacheEntry | None = None
        options: dict[str, Any] = {"quantize": self.kind, "dtype": str(self.dtype).removeprefix("torch.")}
        if self.kind == "int4":
            options["group_size"] = self.group_size
        if cache:
            with self._timed("hash_s"):
                entry = entry_of(reader, hf_config, options)
        record = None if entry is None else entry.record()
        decoder = None if entry is None or record is None else self._from_cache(entry, record)
        cached = decoder is not None
        divergence = Divergence.from_record(record.get("divergence")) if cached and record else None
        if decoder is None:
            decoder = self._from_checkpoint()
        if self.asked == "auto" and divergence is None:
            with self._timed("check_s"):
                divergence = divergence_from_checkpoint(decoder, self.folder, allow_pickle=self.allow_pickle)
            if cached and entry is not None:
                update_record(entry, {"divergence": divergence.to_dict()})
        if entry is not None and not cached:
            noted = {
                "model": str(self.folder.resolve()),
                **options,
                "divergence": divergence.to_dict() if divergence else None,
            }
            with self._timed("write_s"):
                kept = write_entry(entry, decoder.state_dict(), noted, say=self.notes.append)
            entry = entry if kept else None
        if self.asked == "auto" and divergence is not None and not divergence.good:
            del decoder
            return self._dense(divergence.verdict, divergence)
        reason = divergence.verdict if self.asked == "auto" and divergence is not None else "as asked"
        report = self._report(decoder, self.kind, reason, divergence, cached=cached, entry=entry)
        return Optimised(decoder=decoder, report=report)

    def _dense(self, reason: str, divergence: Divergence | None = None) -> Optimised:
        with self._timed("read_s"):
            decoder = load_model(self.folder, dtype=self.dtype, device=self.device, allow_pickle=self.allow_pickle)
        return Optimised(decoder=decoder, report=self._report(decoder, "none", reason, divergence))

    def _from_cache(self, entry: CacheEntry, record: dict[str, Any]) -> Decoder | None:
        """None when the entry is damaged."""
        with self._timed("read_s"):
            try:
                decoder, _, _ = open_checkpoint(self.folder, dtype=self.dtype, allow_pickle=self.allow_pickle)
                place_layers(decoder, quantize=self.kind, group_size=self.group_size)
                for name in list(decoder.state_dict()):
                    materialise(decoder, name, self.device)
                read_entry(entry, decoder.state_dict(), record)
            except CheckpointError as error:
                self.notes.append(f"the cached weights are made anew: {error.message}")
                return None
        return decoder

    def _from_checkpoint(self) -> Decoder:
        decoder, reader, _ = open_checkpoint(self.folder, dtype=self.dtype, allow_pickle=self.allow_pickle)
        plan = plan_reads(decoder, reader)
        place_layers(decoder, quantize=self.kind, group_size=self.group_size)
        scratch = scratch_for(reader, list(plan))
        with torch.no_grad():
            for hf_name, placement in plan.items():
                with self._timed("read_s"):
                    parts = read_parts(reader, hf_name, placement, scratch)
                with self._timed("quantize_s"):
                    for target, part in parts.items():
                        place_tensor(decoder, target, part, device=self.device)
        return decoder

    def _report(
        self,
        decoder: Decoder,
        quantize: str,
        reason: str,
        divergence: Divergence | None,
        *,
        cached: bool = False,
        entry: CacheEntry | None = None,
    ) -> OptimiseReport:
        return OptimiseReport(
            asked=self.asked,
            quantize=quantize,
            reason=reason,
            bytes_before=self.dense_bytes,
            bytes_after=tensor_bytes(decoder),
            cached=cached,
            cache=None if entry is None else str(entry.folder),
            kl_mean=None if divergence is None else divergence.kl_mean,
            kl_tokens=0 if divergence is None else divergence.num_tokens,
            notes=tuple(self.notes),
            seconds=time.perf_counter() - self.started,
            **self.spent,
        )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to the report's field of this name."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begun
