"""Opening what a user names: a model, or a model with an adapter on it, as a decoder or as an engine."""

from __future__ import annotations

import errno
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from burnish.compress.frozen_loading import FrozenFormat, load_frozen
from burnish.compress.optimise import OptimiseReport, check_quantize, load_optimised
from burnish.data.tokenizer import Tokenizer
from burnish.engine.drafter import check_speculation
from burnish.engine.dtype_rule import pick_dtype
from burnish.engine.native import NativeEngine
from burnish.engine.protocol import Engine, make_engine
from burnish.engine.tokenizer_folder import load_tokenizer
from burnish.errors import CheckpointError, ConfigError
from burnish.models.adapter_files import is_adapter_folder, read_adapter_config
from burnish.models.checkpoint import read_config
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import config_of, parse_dtype, resolve_model
from burnish.pipeline.manifest import describe_input, read_manifest
from burnish.train.adapter import load_adapter


@dataclass(frozen=True, kw_only=True)
class Source:
    """How to open models: the options that every stage shares."""

    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    revision: str | None = None
    offline: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        parse_dtype(self.dtype)
        try:
            kind = torch.device(self.device).type
        except RuntimeError as error:
            raise ConfigError("unknown device", got=repr(self.device), expected="cpu, cuda or cuda:N") from error
        if kind not in ("cpu", "cuda"):
            raise ConfigError("unknown device", got=repr(self.device), expected="cpu, cuda or cuda:N")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device here", got=self.device, remedy="Use --device cpu.")
        if self.threads is not None:
            if self.threads < 1:
                raise ConfigError("threads is out of range", got=self.threads, expected="1 or more")
            torch.set_num_threads(self.threads)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine may use, and how it is to work.

    Attributes:
        quantize: "none", "int8", "int4" or "auto": the linears of a dense checkpoint, while it is read.
        weights_cache: keep quantized weights on disk for the next time.
        memory: most memory of the process (on a GPU: of the card), as "4GiB" or bytes.
        kv_memory: memory of the KV cache alone.
        kv_dtype: of the KV cache: "auto", "float32", "bfloat16", "float16" or "int8".
        max_batch_tokens: tokens computed in one step.
        speculation: "auto", "ngram" or "off": whether the next tokens are guessed and verified.
        kv_cache: False recomputes every token, to show what the cache is worth.
        tensor_parallel, pipeline_parallel: processes that share every block, and stages of blocks.
    """

    quantize: str = "none"
    weights_cache: bool = True
    memory: str | int | None = None
    kv_memory: str | int | None = None
    kv_dtype: str | None = None
    max_batch_tokens: int | None = None
    speculation: str = "auto"
    kv_cache: bool = True
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        check_quantize(self.quantize)
        check_speculation(self.speculation)

    @property
    def sharded(self) -> bool:
        """Whether several processes are to run the model."""
        return self.tensor_parallel != 1 or self.pipeline_parallel != 1


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model in memory, ready to train, compare or serve.

    `folder` holds the weights and the tokenizer, `name` is what the user called it, `adapter` is the folder of the
    adapter on it, `optimised` is what loading did to the weights.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    folder: Path
    name: str
    adapter: Path | None = None
    optimised: OptimiseReport | None = None

    def as_input(self) -> dict[str, object]:
        """For a manifest."""
        return describe_input(self.folder, name=self.name)


def required_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.

    Raises:
        CheckpointError: it has none.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder} has no tokenizer", expected="tokenizer.json, vocab.json with merges.txt, or tokenizer.model"
        )
    return tokenizer


def read_without_weights(model: str, source: Source) -> tuple[Tokenizer, ModelConfig]:
    """Tokenizer and settings of a model, before anything large is read.

    Raises:
        CheckpointError, ConfigError: what is named is not there, is corrupt, or is an adapter.
    """
    folder = Path(model)
    if not is_adapter_folder(model):
        folder = resolve_model(
            model, revision=source.revision, offline=source.offline, allow_pickle=source.allow_pickle
        )
    if is_adapter_folder(folder) and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{model} is an adapter", expected="a base model to tune", remedy="Merge it first: burnish merge"
        )
    return required_tokenizer(folder), config_of(read_config(folder))


def base_of_adapter(adapter: Path, model: str | None) -> str:
    """The base to put an adapter on: the one given, else the one that the adapter names.

    Raises:
        ConfigError: neither is there.
    """
    if model is not None:
        return model
    base = read_adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{adapter} does not name its base", remedy="Name the base with --base.")
    return str(base)


def open_decoder(
    model: str,
    source: Source,
    *,
    adapter: str | None = None,
    base: str | None = None,
    quantize: str = "none",
    weights_cache: bool = True,
    frozen: FrozenFormat | None = None,
) -> Opened:
    """Load a model; an adapter's folder stands for its base with the adapter on it.

    Args:
        model: folder, bundled name or hub id; or an adapter's folder.
        adapter: an adapter to put on the model.
        base: the base of the adapter that `model` names, where it is not the recorded one.
        quantize, weights_cache: as in `EngineOptions`.
        frozen: hold the linears of the blocks in this format, to train adapters on; not together with `quantize`.

    Raises:
        CheckpointError, ConfigError: what is named is not there, is corrupt, or does not fit together.
    """
    if adapter is None and is_adapter_folder(model):
        adapter, model = model, base_of_adapter(Path(model), base)
    elif base is not None:
        raise ConfigError("a base was given, but the model is no adapter", got=f"model {model}, base {base}")
    folder = resolve_model(model, revision=source.revision, offline=source.offline, allow_pickle=source.allow_pickle)
    if is_adapter_folder(folder) and not (folder / "config.json").is_file():
        raise ConfigError(f"{model} is an adapter", expected="a base model", remedy="Give it with --adapter.")
    hf_config = read_config(folder)
    device = torch.device(source.device)
    dtype = pick_dtype(
        source.dtype,
        num_parameters=config_of(hf_config).num_parameters(),
        stored=parse_dtype("auto", hf_config),
        device=device,
    )
    report = None
    if frozen is not None:
        assert quantize == "none"
        decoder = load_frozen(folder, frozen, dtype=dtype, device=device, allow_pickle=source.allow_pickle)
    else:
        loaded = load_optimised(
            folder,
            quantize=quantize,
            dtype=dtype,
            device=device,
            cache=weights_cache,
            allow_pickle=source.allow_pickle,
        )
        decoder, report = loaded.decoder, loaded.report
    if adapter is not None:
        load_adapter(decoder, Path(adapter))
    return Opened(
        decoder=decoder.eval(),
        tokenizer=required_tokenizer(folder),
        folder=folder,
        name=model,
        adapter=None if adapter is None else Path(adapter),
        optimised=report,
    )


def open_engine(
    model: str,
    source: Source,
    *,
    adapter: str | None = None,
    engine: str = "native",
    max_num_seqs: int = 32,
    max_model_len: int | None = None,
    options: EngineOptions | None = None,
) -> Engine:
    """An engine for a model, with an adapter on it if one is given or named.

    Raises:
        ConfigError: an adapter with an engine other than the native one, or an option that the engine cannot honour.
    """
    options = options or EngineOptions()
    if adapter is None and not is_adapter_folder(model):
        return make_engine(
            model,
            engine=engine,
            dtype=source.dtype,
            device=source.device,
            threads=source.threads,
            revision=source.revision,
            offline=source.offline,
            allow_pickle=source.allow_pickle,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            **asdict(options),
        )
    if engine != "native":
        raise ConfigError(
            "adapters run on the native engine only",
            got=engine,
            remedy="Merge it first: burnish merge ADAPTER --out DIR",
        )
    check_not_sharded(options, "an adapter", remedy="Merge it first: burnish merge ADAPTER --out DIR")
    opened = open_decoder(
        model, source, adapter=adapter, quantize=options.quantize, weights_cache=options.weights_cache
    )
    return engine_of(opened, max_num_seqs=max_num_seqs, max_model_len=max_model_len, options=options)


def engine_of(
    opened: Opened,
    *,
    max_num_seqs: int = 32,
    max_model_len: int | None = None,
    options: EngineOptions | None = None,
    optimise: bool = False,
) -> NativeEngine:
    """The native engine over a decoder that is in memory already; `optimise` lays out its linears, in place.

    Of the options, those of loading have been honoured by `open_decoder`.
    """
    options = options or EngineOptions()
    asked: dict[str, Any] = (
        {"max_batch_tokens": options.max_batch_tokens} if options.max_batch_tokens is not None else {}
    )
    engine = NativeEngine(
        opened.decoder,
        tokenizer=opened.tokenizer,
        device=opened.decoder.device,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        memory=options.memory,
        kv_memory=options.kv_memory,
        kv_dtype=options.kv_dtype,
        kv_cache=options.kv_cache,
        speculation=options.speculation,
        optimise=optimise,
        **asked,
    )
    engine.optimised = opened.optimised
    return engine


def check_not_sharded(options: EngineOptions, what: str, *, remedy: str) -> None:
    """Refuse what needs the whole model in this process.

    Raises:
        ConfigError: several processes were asked for.
    """
    if options.sharded:
        raise ConfigError(
            f"{what} needs the whole model in one process",
            got=f"tensor_parallel {options.tensor_parallel}, pipeline_parallel {options.pipeline_parallel}",
            remedy=remedy,
        )


def quantize_of(opened: Opened) -> str:
    """What loading did to the weights: "none", "int8" or "int4"."""
    return "none" if opened.optimised is None else opened.optimised.quantize


def check_output(out: str | Path, *, overwrite: bool) -> Path:
    """The folder to write to, checked now so that a wrong place fails before the work and not after it.

    A file is made and removed where the folder is or will be; the folder is made once there is something to write.

    Raises:
        ConfigError: it is a file, it cannot be written to, or it holds something already.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file", expected="a folder")
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    probe = above / f".burnish-writable.{os.getpid()}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = "no space is left on the device" if error.errno == errno.ENOSPC else error.strerror
        raise ConfigError(f"--out {folder} cannot be written to: {reason}") from error
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder} is not empty", remedy="Choose another folder, or add --overwrite.")
    return folder


def check_not_parent(folder: Path, parent: Opened) -> None:
    """Make sure that a child does not take its parent's place, which it is yet to be held against.

    Raises:
        ConfigError: it would.
    """
    if folder.resolve() in [place.resolve() for place in (parent.folder, parent.adapter) if place is not None]:
        raise ConfigError(f"--out {folder} is what it is made from", remedy="Choose another folder.")


def data_of(opened: Opened) -> dict[str, object] | None:
    """What the manifest of the model (or of its adapter) says it was trained on."""
    return recorded_data(*[folder for folder in (opened.adapter, opened.folder) if folder is not None])


def recorded_data(*folders: Path) -> dict[str, object] | None:
    """The data that the first of these folders to name some was trained on, by its manifest."""
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest and isinstance(manifest.get("data"), dict):
            return manifest["data"]
    return None
