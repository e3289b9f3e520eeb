from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import CHATML, MakeFolder

from burnish.data.tokenizer import Tokenizer
from burnish.errors import CheckpointError, DataError

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces\n\n\tand tabs ",
    "SELECT COUNT(*) FROM t WHERE name = 'Zoë' AND x != 3.5;",
    "日本語 😀👩‍👩‍👧 Ελλάδα \u200b e\u0301",
    "<s>spelled out</s> and on<unk>",
    "\x00\x01\ufffd",
]


def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="the reference comes with the hf extra")
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def assert_equal_to_reference(folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), reference(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids >= frozenset(theirs.all_special_ids)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_everything_equals_transformers_on_made_folders(make_folder: MakeFolder, kind: str) -> None:
    assert_equal_to_reference(make_folder(kind))


@pytest.mark.parametrize("name", ["models/stories260k", "tokenizers/gpt-neox"])
def test_everything_equals_transformers_on_real_folders(shared_data: Path, name: str) -> None:
    ours, theirs = Tokenizer.load(shared_data / name), reference(shared_data / name)
    lines = (shared_data / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8").splitlines()[:150]
    for text in [*TEXTS, *lines]:
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_gpt2_files_equal_transformers_gpt2_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "tokenizers" / "gpt2" / name, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert_equal_to_reference(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true, "add_prefix_space": true}'
    )
    assert_equal_to_reference(tmp_path)
    assert Tokenizer.load(tmp_path).encode("a", add_special_tokens=True)[0] == 50256


def test_special_tokens_as_objects_equal_transformers(make_folder: MakeFolder) -> None:
    token = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False}
    folder = make_folder(settings={"eos_token": token, "pad_token": "<pad>", "extra_special_tokens": ["<extra>"]})
    assert_equal_to_reference(folder)
    ours = Tokenizer.load(folder)
    assert ours.pad_id is not None
    assert ours.decode([*ours.encode("a<extra>b"), ours.pad_id]) == "ab"


def test_special_tokens_map_of_transformers_4_is_read(make_folder: MakeFolder) -> None:
    token = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    folder = make_folder(
        files={
            "tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"},
            "special_tokens_map.json": {"eos_token": token, "bos_token": "<s>"},
        }
    )
    assert_equal_to_reference(folder)
    assert Tokenizer.load(folder).eos_id == Tokenizer.load(folder).encode("<|im_end|>")[0]


def test_added_tokens_decoder_adds_missing_tokens_in_order(make_folder: MakeFolder) -> None:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    size = Tokenizer.load(make_folder()).vocab_size
    added = {
        str(size + 1): {"content": "<second>", "special": False, **flags},
        str(size): {"content": "<first>", "special": True, **flags},
    }
    folder = make_folder(settings={"added_tokens_decoder": added})
    assert_equal_to_reference(folder)
    assert Tokenizer.load(folder).encode("<first><second>") == [size, size + 1]


def test_begin_token_follows_the_config_without_a_post_processor(make_folder: MakeFolder) -> None:
    folder = make_folder()
    value = json.loads((folder / "tokenizer.json").read_text())
    assert value["post_processor"] is None
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "add_bos_token": True,
        "add_eos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer.load(folder)
    assert ours.encode("name", add_special_tokens=True) == [1, *ours.encode("name"), 2]
    assert ours.encode_prompt("name") == [1, *ours.encode("name")]  # a prompt is never ended
    assert ours.encode_prompt("name</s>") == [1, *ours.encode("name"), 2]  # unless its author did


def test_eos_ids_join_the_generation_config(make_folder: MakeFolder) -> None:
    one = make_folder(files={"generation_config.json": {"eos_token_id": 4}, "config.json": {"eos_token_id": 3}})
    many = make_folder(files={"generation_config.json": {"eos_token_id": [3, 4]}})
    model = make_folder(files={"config.json": {"eos_token_id": 3}})
    assert Tokenizer.load(one).eos_ids == {2, 4}
    assert Tokenizer.load(many).eos_ids == {2, 3, 4}
    assert Tokenizer.load(model).eos_ids == {2, 3}


def test_eos_and_bos_come_from_the_configs_where_the_tokenizer_names_none(make_folder: MakeFolder) -> None:
    files = {"tokenizer_config.json": {}, "generation_config.json": {"eos_token_id": [4, 2], "bos_token_id": 1}}
    ours = Tokenizer.load(make_folder(files=files))
    assert (ours.eos_id, ours.bos_id, ours.eos_ids) == (4, 1, {2, 4})


def test_truncation_and_padding_saved_in_the_file_are_off(make_folder: MakeFolder) -> None:
    folder = make_folder()
    value = json.loads((folder / "tokenizer.json").read_text())
    value["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(value))
    text = "many words in here, more than two"
    assert Tokenizer.load(folder).decode(Tokenizer.load(folder).encode(text)) == text


def test_sentencepiece_model_equals_sentencepiece_ids(shared_data: Path) -> None:
    ours = Tokenizer.load(shared_data / "tokenizers" / "mistral-v1")
    # Made with sentencepiece 0.2.3; runs of spaces tell a wrong order of merges.
    assert ours.encode_prompt("Hello wörld 日本\n\n  x 😀") == [
        1, 22557, 275, 2024, 417, 28705, 29142, 29119, 13, 13, 28705, 1318, 28705, 30575,
    ]  # fmt: skip
    assert ours.decode(ours.encode("a    b\tc")) == "a    b\tc"
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 32000)


def test_sentencepiece_model_equals_sentencepiece_on_real_text(shared_data: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the reference comes with the hf extra")
    folder = shared_data / "tokenizers" / "mistral-v1"
    ours = Tokenizer.load(folder)
    theirs = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    rows = json.loads((shared_data / "alpaca" / "alpaca_data_1k.json").read_text(encoding="utf-8"))[:200]
    for text in (row["output"] for row in rows):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


def test_broken_tokenizer_files_are_one_line(make_folder: MakeFolder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no tokenizer in .*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        Tokenizer.load(tmp_path / "nowhere")
    folder = make_folder(files={"tokenizer.json": '{"version": "1.0", '})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.load(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read as JSON"):
        Tokenizer.load(make_folder(files={"tokenizer_config.json": "{"}))
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        Tokenizer.load(make_folder(settings={"added_tokens_decoder": {"x": 1}}))
    with pytest.raises(CheckpointError, match="token id"):
        Tokenizer.load(make_folder(files={"generation_config.json": {"eos_token_id": "</s>"}}))


@pytest.mark.parametrize("content", [b"", b"\x0a\xff", b"not a protocol buffer", b"\x0a\x05\x0a\x03abc"])
def test_broken_sentencepiece_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be read as a SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_lone_surrogates_are_a_data_error(make_folder: MakeFolder) -> None:
    with pytest.raises(DataError, match="surrogates"):
        Tokenizer.load(make_folder()).encode("a\ud800b")


def test_chat_ids_equal_transformers(make_folder: MakeFolder) -> None:
    folder = make_folder(settings={"chat_template": CHATML})
    messages = [{"role": "user", "content": "How many?"}]
    theirs = reference(folder).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Tokenizer.load(folder).encode_chat(messages) == theirs


def test_bundled_tokenizer_round_trips_any_text() -> None:
    from burnish.data.bundled import BUNDLED

    folder = BUNDLED["burnish-sql-base"]
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the bundled model is not built yet")
    ours = Tokenizer.load(folder)
    assert ours.eos_id is not None
    assert ours.chat_template is not None
    for text in ["SELECT name FROM t WHERE a = 'é 日本 😀'", " leading", "tabs\t\n\nlines  "]:
        assert ours.decode(ours.encode(text)) == text
    prompt = ours.encode_chat([{"role": "user", "content": "CREATE TABLE t (a INTEGER)\n\nHow many rows?"}])
    assert ours.decode(prompt, skip_special_tokens=False).count("How many rows?") == 1
    assert ours.unk_id is None or ours.unk_id not in prompt
