"""Makes a token cache of a source, once: rows are read, rendered, tokenized and appended, and none is kept.

The cache's name is a hash of all that decides what is in it: the source's content (of a hub data set, its commit), the
tokenizer, the template, the length, and the version of this code. A later run with the same hash reads it. It is
written to a folder under a temporary name, flushed and renamed: it is there whole or not at all. A second process that
wants the same one waits for the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from burnish.data.encoding import IGNORE, Example, TooLong
from burnish.data.examples import Learn, LeftOut, example_stats, iter_examples, nothing_fits
from burnish.data.preflight import PreflightCounter, is_empty
from burnish.data.readers import hub_commit, looks_like_hub_name
from burnish.data.rows import TASK, BadRow, Row, RowStream, no_usable_row, stream_rows
from burnish.data.templates import Template, pick_template
from burnish.data.token_cache import (
    FORMAT,
    KEY_DTYPE,
    KEYS,
    LEARNED,
    OFFSET_DTYPE,
    OFFSETS,
    RECORD,
    TOKEN_DTYPE,
    TOKENS,
    TokenCache,
)
from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError

CHUNK_BYTES = 1 << 20
BAD_ROWS_KEPT = 20
REPORT_EVERY = 1000
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class CacheRequest:
    """What a token cache is made from; see `read_rows` and `make_examples` for the fields."""

    source: str
    template: str = "auto"
    columns: Mapping[str, str] | None = None
    max_length: int = 512
    too_long: TooLong = "drop"
    learn: Learn = "all"
    limit: int | None = None
    check_sql: bool = False
    seed: int = 0
    offline: bool = False


def cache_folder() -> Path:
    """Where token caches are kept: under $BURNISH_CACHE, else $XDG_CACHE_HOME/burnish, else ~/.cache/burnish."""
    chosen = os.environ.get("BURNISH_CACHE")
    if chosen:
        return Path(chosen) / "tokens"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "burnish" / "tokens"


def open_token_cache(
    request: CacheRequest, tokenizer: Tokenizer, *, on_progress: OnProgress | None = None, root: Path | None = None
) -> TokenCache:
    """The token cache of a source, made now if there is none yet.

    Args:
        on_progress: called with the rows and the tokens so far.
        root: where caches are kept; `cache_folder()` when None.

    Raises:
        DataError: as `read_rows` and `make_examples`.
        OSError: it cannot be written.
    """
    root = root or cache_folder()
    folder = root / cache_key(request, tokenizer)
    if (found := _whole(folder)) is not None:
        return found
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / f".{folder.name}.lock"):
        if (found := _whole(folder)) is not None:
            return found
        _build(request, tokenizer, folder, on_progress)
    return TokenCache(folder)


def _whole(folder: Path) -> TokenCache | None:
    """The cache of a folder, None where there is none or it is damaged."""
    try:
        return TokenCache(folder)
    except DataError:
        return None


def cache_key(request: CacheRequest, tokenizer: Tokenizer) -> str:
    """Hash of everything that decides the tokens.

    Raises:
        DataError: the source is not there.
    """
    content = {
        "format": FORMAT,
        "code": _code_fingerprint(),
        "source": source_fingerprint(request.source, seed=request.seed, offline=request.offline),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **{name: value for name, value in asdict(request).items() if name not in ("source", "seed", "offline")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def source_fingerprint(source: str, *, seed: int, offline: bool) -> str:
    """Hash of a file's content; the bundled task's name and seed; a hub data set's name and commit."""
    path = Path(source)
    if path.is_file():
        digest = hashlib.sha256(path.suffix.lower().encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()
    if source.partition(":")[0] == TASK:
        return f"{source}, seed {seed}"
    if not path.exists() and looks_like_hub_name(source):
        return f"{source}, commit {hub_commit(source, offline=offline)}"
    stream_rows(source)  # says what is wrong with it
    return source


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of the vocabulary, the special tokens and the chat template."""
    special = [sorted(tokenizer.special_tokens.items()), sorted(tokenizer.eos_ids), tokenizer.bos_id]
    digest = hashlib.sha256(tokenizer.backend.to_str().encode())
    digest.update(json.dumps([special, tokenizer.chat_template]).encode())
    return digest.hexdigest()


@cache
def _code_fingerprint() -> str:
    """Hash of what reads, renders and tokenizes: another wording of a template makes other tokens."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Writer:
    """The growing files of a cache."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._files = {name: stack.enter_context((folder / name).open("wb")) for name in (TOKENS, LEARNED, KEYS)}
        self._offsets_file = stack.enter_context((folder / OFFSETS).open("wb"))
        self.lengths = array("i")
        self._end = 0
        self._write_offset()

    def add(self, example: Example) -> None:
        tokens = np.asarray(example.tokens, dtype=TOKEN_DTYPE)
        learned = np.asarray(example.labels) != IGNORE
        self._files[TOKENS].write(tokens.tobytes())
        self._files[LEARNED].write(learned.astype(np.uint8).tobytes())
        self._files[KEYS].write(np.asarray([example.key], dtype=KEY_DTYPE).tobytes())
        self.lengths.append(len(tokens))
        self._end += len(tokens)
        self._write_offset()

    def flush(self) -> None:
        for file in (*self._files.values(), self._offsets_file):
            file.flush()
            os.fsync(file.fileno())

    def _write_offset(self) -> None:
        self._offsets_file.write(np.asarray([self._end], dtype=OFFSET_DTYPE).tobytes())


class _Source:
    """Rows of a stream, with what was seen of it on the way."""

    def __init__(self, stream: RowStream, limit: int | None) -> None:
        self.stream, self.limit = stream, limit
        self.num_rows = self.num_bad = self.num_empty = 0
        self.bad_rows: list[BadRow] = []
        self.multi_turn = False

    def __iter__(self) -> Iterator[Row]:
        for item in self.stream.items:
            if isinstance(item, BadRow):
                self.num_bad += 1
                self.num_empty += is_empty(item.reason)
                if len(self.bad_rows) < BAD_ROWS_KEPT:
                    self.bad_rows.append(item)
                continue
            for row in item:
                if self.limit is not None and self.num_rows >= self.limit:
                    return
                self.num_rows += 1
                self.multi_turn |= "messages" in row.extra
                yield row


def _build(request: CacheRequest, tokenizer: Tokenizer, folder: Path, on_progress: OnProgress | None) -> None:
    for left_over in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed: we are alone here
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        record = _fill(temporary, request, tokenizer, on_progress)
        with (temporary / RECORD).open("w", encoding="utf-8") as file:
            json.dump(record, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, request: CacheRequest, tokenizer: Tokenizer, on_progress: OnProgress | None) -> dict[str, Any]:
    """Write all arrays; returns the record."""
    stream = stream_rows(
        request.source,
        columns=request.columns,
        check_sql=request.check_sql,
        seed=request.seed,
        offline=request.offline,
        texts=True,
    )
    template: Template = pick_template(request.template, tokenizer, stream)
    source, counter = _Source(stream, request.limit), PreflightCounter(tokenizer, template)
    num_too_long, shortest = 0, 0
    with contextlib.ExitStack() as stack:
        writer = _Writer(folder, stack)
        made_examples = iter_examples(
            source,
            tokenizer,
            template,
            max_length=request.max_length,
            too_long=request.too_long,
            learn=request.learn,
        )
        for made in made_examples:
            if isinstance(made, LeftOut):
                shortest = made.num_tokens if not num_too_long else min(shortest, made.num_tokens)
                num_too_long += 1
                continue
            counter.add(made)
            writer.add(made)
            if on_progress is not None and len(writer.lengths) % REPORT_EVERY == 0:
                on_progress(source.num_rows, counter.num_tokens)
        writer.flush()
    if not source.num_rows:
        raise no_usable_row(stream.source, source.num_bad, source.bad_rows[0])
    if not writer.lengths:
        raise nothing_fits(source.num_rows, shortest=shortest, max_length=request.max_length)
    stats = example_stats(
        np.frombuffer(writer.lengths, dtype=np.int32),
        num_labels=counter.num_labels,
        num_too_long=num_too_long,
        num_truncated=counter.num_truncated,
    )
    flight = counter.result(num_too_long=num_too_long, max_length=request.max_length)
    return {
        "format": FORMAT,
        "request": asdict(request),
        "template": template.name,
        "layout": stream.layout,
        "num_rows": source.num_rows,
        "num_bad_rows": source.num_bad,
        "bad_rows": [str(bad) for bad in source.bad_rows],
        "multi_turn": source.multi_turn,
        "stats": stats.to_dict(),
        "preflight": flight.with_bad_counts(source.num_bad, source.num_empty).to_dict(),
    }


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file; other processes wait."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing releases it
