from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.engine.native import NativeEngine
from burnish.engine.protocol import make_engine
from burnish.engine.sampling import SamplingParams
from burnish.errors import CheckpointError, ConfigError, MissingExtraError, RequestError
from tiny_llama import write_tiny_llama

PROMPTS = [[7, 9, 400, 12], [900, 33], [5 + n for n in range(1, 20)]]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def test_a_folder_of_another_kind_says_how_to_convert_it(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2", reason="the extra ct2 is not installed")
    write_tiny_llama(tmp_path)
    with pytest.raises(ConfigError, match="ct2-transformers-converter --model"):
        make_engine(tmp_path, engine="ctranslate2")


def test_without_the_library_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(MissingExtraError, match="ct2"):
        make_engine(tmp_path, engine="ctranslate2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama, and what CTranslate2's own converter made of it."""
    pytest.importorskip("ctranslate2", reason="the extra ct2 is not installed")
    pytest.importorskip("transformers", reason="the converter needs transformers")
    dense = write_tiny_llama(tmp_path_factory.mktemp("dense"))
    tokenizer = json.loads((dense / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {name: tokenizer.get(name) or "<|end|>" for name in ("bos_token", "eos_token", "unk_token")}
    (dense / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **named}), encoding="utf-8")
    converted = tmp_path_factory.mktemp("ct2") / "model"
    script = (
        "import sys; from ctranslate2.converters import TransformersConverter; "
        "TransformersConverter(sys.argv[1], copy_files=sys.argv[3:]).convert(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(dense), str(converted), "tokenizer.json", "tokenizer_config.json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        pytest.skip(f"the converter does not run here: {done.stderr.strip().splitlines()[-1]}")
    return dense, converted


def test_greedy_answers_equal_the_native_engine(folders: tuple[Path, Path]) -> None:
    dense, converted = folders
    expected = [one.token_ids for one in NativeEngine(dense, dtype="float32").generate(PROMPTS, GREEDY)]
    engine = make_engine(converted, engine="ctranslate2", threads=1, max_num_seqs=2)
    outputs = list(engine.generate(PROMPTS, GREEDY))
    assert [one.token_ids for one in outputs] == expected
    assert {one.finish_reason for one in outputs} == {"length"}
    assert all(one.metrics.ttft_ms and one.metrics.tpot_ms for one in outputs)


def test_lengths_stops_and_ends_are_those_of_each_request(folders: tuple[Path, Path]) -> None:
    engine = make_engine(folders[1], engine="ctranslate2", threads=1)
    whole = next(engine.generate(PROMPTS[:1], GREEDY)).token_ids
    params = [
        SamplingParams(max_tokens=2, ignore_eos=True),
        SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(whole[4],)),
        SamplingParams(max_tokens=7, ignore_eos=True),
    ]
    outputs = list(engine.generate([PROMPTS[0]] * 3, params))
    stop = whole.index(whole[4]) + 1
    assert [one.token_ids for one in outputs] == [whole[:2], whole[:stop], whole[:7]]
    assert [one.finish_reason for one in outputs] == ["length", "stop", "length"]


def test_stream_joins_to_the_whole_text_and_can_be_closed(folders: tuple[Path, Path]) -> None:
    engine = make_engine(folders[1], engine="ctranslate2", threads=1)
    events = list(engine.stream("CREATE TABLE", GREEDY))
    output = events[-1].output
    assert output is not None
    assert "".join(event.text for event in events) == output.text
    assert sum((event.token_ids for event in events), ()) == output.token_ids
    stream = engine.stream("CREATE TABLE", SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert engine.stats().running == 0


def test_int8_is_honoured_and_shown(folders: tuple[Path, Path]) -> None:
    engine = make_engine(folders[1], engine="ctranslate2", threads=1, quantize="int8")
    assert engine.stats().dtype.startswith("int8")
    assert engine.warm_up() > 0
    with pytest.raises(ConfigError, match="int4"):
        make_engine(folders[1], engine="ctranslate2", quantize="int4")


def test_parameters_that_it_does_not_know_are_refused(folders: tuple[Path, Path]) -> None:
    engine = make_engine(folders[1], engine="ctranslate2", threads=1)
    for params in (SamplingParams(seed=1, temperature=1.0), SamplingParams(min_tokens=2), SamplingParams(min_p=0.1)):
        with pytest.raises(RequestError, match="does not know"):
            engine.generate([[5]], params)


def test_a_damaged_folder_is_one_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("config.json", "vocabulary.json"):
        (tmp_path / name).write_bytes((folders[1] / name).read_bytes())
    (tmp_path / "model.bin").write_bytes((folders[1] / "model.bin").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="CTranslate2 cannot load") as caught:
        make_engine(tmp_path, engine="ctranslate2")
    assert "\n" not in caught.value.message
