from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from burnish.compress.optimise import Optimised, load_optimised
from burnish.compress.optimise_cache import cache_folder, cache_limit
from burnish.errors import ConfigError

TOKENS = torch.arange(20)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "optimised"


def _load(folder: Path, quantize: str = "int8", **options: bool) -> Optimised:
    return load_optimised(folder, quantize=quantize, dtype=torch.float32, **options)


def _entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir()) if cache.exists() else []


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_second_load_is_read_and_equal(decoder_folder: Path, cache: Path, quantize: str) -> None:
    first, second = _load(decoder_folder, quantize), _load(decoder_folder, quantize)
    assert (first.report.cached, second.report.cached) == (False, True)
    assert second.report.quantize_s == 0
    assert first.report.cache == second.report.cache == str(_entries(cache)[0])
    for name, tensor in first.decoder.state_dict().items():
        assert torch.equal(tensor, second.decoder.state_dict()[name]), name
    with torch.inference_mode():
        assert torch.equal(first.decoder(TOKENS), second.decoder(TOKENS))


def test_same_content_elsewhere_is_found_and_other_content_in_place_is_not(
    decoder_folder: Path, cache: Path, tmp_path: Path
) -> None:
    _load(decoder_folder)
    shutil.copytree(decoder_folder, tmp_path / "copy")
    assert _load(tmp_path / "copy").report.cached
    weights = tmp_path / "copy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not _load(tmp_path / "copy").report.cached
    assert len(_entries(cache)) == 2


def test_options_and_config_have_entries_of_their_own(decoder_folder: Path, cache: Path) -> None:
    _load(decoder_folder)
    _load(decoder_folder, "int4")
    load_optimised(decoder_folder, quantize="int8", dtype=torch.bfloat16)
    load_optimised(decoder_folder, quantize="int4", dtype=torch.float32, group_size=8)
    assert len(_entries(cache)) == 4
    config = json.loads((decoder_folder / "config.json").read_text())
    (decoder_folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert not _load(decoder_folder).report.cached


def _flip(entry: Path) -> None:
    weights = entry / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 4
    weights.write_bytes(content)


def _truncate(entry: Path) -> None:
    weights = entry / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _lose_record(entry: Path) -> None:
    (entry / "record.json").unlink()


def _spoil_record(entry: Path) -> None:
    (entry / "record.json").write_text("{not json")


@pytest.mark.parametrize("damage", [_flip, _truncate, _lose_record, _spoil_record])
def test_damaged_entries_are_made_anew_with_one_note(decoder_folder: Path, cache: Path, damage) -> None:
    whole = _load(decoder_folder)
    damage(_entries(cache)[0])
    again = _load(decoder_folder)
    assert not again.report.cached
    assert len(again.report.notes) == 1
    assert "made anew" in again.report.notes[0]
    with torch.inference_mode():
        assert torch.equal(whole.decoder(TOKENS), again.decoder(TOKENS))
    assert _load(decoder_folder).report.cached


def test_an_interrupted_write_is_no_entry(decoder_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        _load(decoder_folder)
    monkeypatch.undo()
    monkeypatch.setenv("BURNISH_CACHE", str(cache.parent))
    assert _entries(cache) == []
    assert not _load(decoder_folder).report.cached


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_nothing_is_kept_when_told_so(decoder_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _load(decoder_folder, cache=False).report.cache is None
    assert not cache.exists()
    monkeypatch.setenv("BURNISH_CACHE_LIMIT", "0")
    assert _load(decoder_folder).report.cache is None
    assert _entries(cache) == []


def test_entries_used_longest_ago_make_room(decoder_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [_load(decoder_folder, "int8").report.cache, _load(decoder_folder, "int4").report.cache]
    for age, folder in zip((100, 200), kept):
        os.utime(Path(str(folder)) / "record.json", (1e9 - age, 1e9 - age))
    sizes = [sum(file.stat().st_size for file in Path(str(folder)).iterdir()) for folder in kept]
    monkeypatch.setenv("BURNISH_CACHE_LIMIT", str(sum(sizes) + 1000))
    new = load_optimised(decoder_folder, quantize="int4", dtype=torch.float32, group_size=8).report.cache
    assert set(map(str, _entries(cache))) == {kept[0], new}
    assert _load(decoder_folder).report.cached


def test_a_cache_that_cannot_be_written_costs_a_note(
    decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "file"))
    report = _load(decoder_folder).report
    assert report.cache is None
    assert len(report.notes) == 1
    assert "not cached" in report.notes[0]


def test_place_and_limit_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BURNISH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/burnish/optimised")
    for text, size in (("20GiB", 20 * 2**30), ("512M", 2**29), ("7", 7), ("1.5 kb", 1536)):
        monkeypatch.setenv("BURNISH_CACHE_LIMIT", text)
        assert cache_limit() == size
    monkeypatch.setenv("BURNISH_CACHE_LIMIT", "much")
    with pytest.raises(ConfigError, match="BURNISH_CACHE_LIMIT"):
        cache_limit()
