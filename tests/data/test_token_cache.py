from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from made_tokenizers import CHATML, MakeFolder

from burnish.data import token_cache_building
from burnish.data.examples import make_examples
from burnish.data.preflight import Preflight
from burnish.data.rows import read_rows
from burnish.data.templates import pick_template
from burnish.data.token_cache import TOKENS
from burnish.data.token_cache_building import CacheRequest, open_token_cache
from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError

ROWS: list[Any] = [
    *[{"prompt": f"How many are older than {number}?", "completion": f"SELECT {number}"} for number in range(40)],
    {"prompt": "empty", "completion": ""},
    {"prompt": "How many are older than 3?", "completion": "SELECT 3"},
    {"prompt": "long " * 200, "completion": "x"},
]


@pytest.fixture
def tokenizer(make_folder: MakeFolder) -> Tokenizer:
    return Tokenizer.load(make_folder())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_cached_examples_equal_those_in_memory(tokenizer: Tokenizer, source: Path, tmp_path: Path) -> None:
    cache = open_token_cache(CacheRequest(source=str(source), max_length=120), tokenizer, root=tmp_path)
    rows = read_rows(source)
    made = make_examples(rows.rows, tokenizer, pick_template("auto", tokenizer, rows), max_length=120)
    assert len(cache) == len(made) == 41
    for cached, example in zip(cache, made.examples):
        assert (cached.tokens, cached.labels) == (example.tokens, example.labels)
    assert cache[-1] == cache[40]
    assert cache[3:5] == [cache[3], cache[4]]
    assert list(cache.lengths) == [len(example.tokens) for example in made.examples]
    assert list(cache.keys) == [example.key for example in made.examples]
    assert cache.record["stats"] == made.stats.to_dict()
    expected = made.preflight.with_bad_rows([bad.reason for bad in rows.bad_rows])
    assert Preflight.from_dict(cache.record["preflight"]) == expected
    assert (expected.num_empty_answers, expected.num_duplicates, expected.num_too_long) == (1, 1, 1)
    assert cache.record["bad_rows"] == [str(bad) for bad in rows.bad_rows]
    with pytest.raises(IndexError):
        cache[41]


def test_conversations_in_the_cache_equal_those_in_memory(make_folder: MakeFolder, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    source = write(tmp_path / "chats.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    cache = open_token_cache(CacheRequest(source=str(source)), tokenizer, root=tmp_path)
    rows = read_rows(source)
    made = make_examples(rows.rows, tokenizer, pick_template("auto", tokenizer, rows), max_length=512)
    assert [example.labels for example in cache] == [example.labels for example in made.examples]
    assert cache.record["multi_turn"]
    last = open_token_cache(CacheRequest(source=str(source), learn="last"), tokenizer, root=tmp_path)
    assert last[0].labels != cache[0].labels


def test_cache_is_made_once_and_again_when_anything_changes(
    tokenizer: Tokenizer, make_folder: MakeFolder, source: Path, tmp_path: Path
) -> None:
    calls: list[int] = []

    def open_it(using: Tokenizer = tokenizer, **options: Any) -> Path:
        request = CacheRequest(source=str(source), **options)
        return open_token_cache(request, using, root=tmp_path / "caches").folder

    with pytest.MonkeyPatch.context() as patch:
        real = token_cache_building._build
        patch.setattr(token_cache_building, "_build", lambda *a: calls.append(1) or real(*a))
        first = open_it()
        assert open_it() == first
        assert len(calls) == 1
        others = [open_it(max_length=100), open_it(too_long="truncate"), open_it(template="plain"), open_it(limit=7)]
        others.append(open_it(Tokenizer.load(make_folder("byte-fallback"))))
        write(source, ROWS[:-1])
        others.append(open_it())
        assert len({first, *others}) == len(calls) == 7


def test_damaged_cache_is_made_anew(tokenizer: Tokenizer, source: Path, tmp_path: Path) -> None:
    request = CacheRequest(source=str(source))
    cache = open_token_cache(request, tokenizer, root=tmp_path / "caches")
    first = cache[0]
    path = cache.folder / TOKENS
    path.write_bytes(path.read_bytes()[:-4])
    again = open_token_cache(request, tokenizer, root=tmp_path / "caches")
    assert again[0] == first
    path.write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        again[1]


def test_failed_build_leaves_nothing_behind(
    tokenizer: Tokenizer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "caches"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache_building._Writer, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        open_token_cache(CacheRequest(source=str(source)), tokenizer, root=root)
    assert [path.name for path in root.iterdir() if not path.name.endswith(".lock")] == []
    monkeypatch.undo()
    killed = root / f".{token_cache_building.cache_key(CacheRequest(source=str(source)), tokenizer)}.1.tmp"
    killed.mkdir()
    assert len(open_token_cache(CacheRequest(source=str(source)), tokenizer, root=root)) == 41
    assert not killed.exists()


def test_subset_is_a_view(tokenizer: Tokenizer, source: Path, tmp_path: Path) -> None:
    cache = open_token_cache(CacheRequest(source=str(source)), tokenizer, root=tmp_path)
    part = cache.subset(np.array([5, 2, 9])).subset(np.array([2, 0]))
    assert [part[0], part[1]] == [cache[9], cache[5]]
    assert list(part.lengths) == [len(cache[9].tokens), len(cache[5].tokens)]
    assert list(part.keys) == [cache.keys[9], cache.keys[5]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": ""}] * 3, "all 3 rows of .* are unusable"),
        ([{"prompt": "a " * 99, "completion": "b"}] * 2, "all 2 rows are longer than 30 tokens; got the shortest"),
        ([{"a": 1}], "fit no known layout"),
    ],
)
def test_unusable_source_is_one_line(tokenizer: Tokenizer, tmp_path: Path, rows: list[Any], message: str) -> None:
    source = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=message):
        open_token_cache(CacheRequest(source=str(source), max_length=30), tokenizer, root=tmp_path / "caches")
    with pytest.raises(DataError, match="there is no file"):
        open_token_cache(CacheRequest(source=str(tmp_path / "no.jsonl")), tokenizer, root=tmp_path)


def test_memory_stays_bounded_however_many_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    count = 60_000
    source = tmp_path / "large.jsonl"
    with source.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"text": f"{number} employee name"}) + "\n")
    open_token_cache(CacheRequest(source=str(source), limit=100), tokenizer, root=tmp_path)  # imports, first pages
    process = psutil.Process()
    before = process.memory_info().rss
    reported: list[int] = []
    cache = open_token_cache(
        CacheRequest(source=str(source)),
        tokenizer,
        on_progress=lambda rows, tokens: reported.append(rows),
        root=tmp_path,
    )
    total = sum(len(cache[row].tokens) for row in range(0, count, 3))
    grown = process.memory_info().rss - before
    assert total > count
    assert reported[-1] == count
    assert grown < 24 << 20, f"{grown >> 20} MiB for {count} rows"  # as a list of examples: 49 MiB
    shutil.rmtree(cache.folder)
