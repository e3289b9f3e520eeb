"""Reading what is submitted: every malformed line is named, nothing is sent of a file that has one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from queue_fakes import write_prompts

from burnish.errors import DataError, RequestError
from burnish.scale.items import digest_of, merged_params, rank_of, read_items


def read(path: Path, **options: object) -> list[object]:
    return list(read_items(path, name=path.name, **options))  # type: ignore[arg-type]


def test_rows_keep_prompt_id_params_and_priority(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "id": 7, "params": {"max_tokens": 4}, "priority": "high"},
        {"messages": [{"role": "user", "content": "b"}]},
        {"prompt": [1, 2, 3]},
    ]
    first, second, third = read_items(write_prompts(tmp_path / "p.jsonl", rows), name="p.jsonl")
    assert (first.prompt, first.name, first.params, first.rank) == ("a", "7", {"max_tokens": 4}, 0)
    assert (second.prompt, second.rank) == ([{"role": "user", "content": "b"}], 1)
    assert third.prompt == [1, 2, 3]


def test_text_lines_are_prompts_and_become_messages_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one\n\ntwo words\n")
    assert [item.prompt for item in read_items(file, name="p.txt", rank=2)] == ["one", "two words"]
    [first, _] = read_items(file, name="p.txt", as_chat=True)
    assert first.prompt == [{"role": "user", "content": "one"}]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no JSON object"),
        ('{"promt": "a"}', "Did you mean prompt"),
        ('{"prompt": "a", "messages": []}', "needs one prompt"),
        ('{"id": "a"}', "needs one prompt"),
        ('{"prompt": 5}', "malformed prompt"),
        ('{"messages": [{"role": "user"}]}', "malformed prompt"),
        ('{"messages": []}', "malformed prompt"),
        ('{"prompt": "a", "params": {"max_token": 3}}', "no parameter 'max_token'"),
        ('{"prompt": "a", "params": {"top_p": 3}}', "top_p is out of range"),
        ('{"prompt": "a", "params": [1]}', "malformed params"),
        ('{"prompt": "a", "id": true}', "malformed id"),
        ('{"prompt": "a", "priority": "urgent"}', "no such priority"),
        ('{"prompt": "a", "id": ' + "1" * 5000 + "}", "line 2"),  # more digits than Python reads
        ('{"prompt": "a \\ud83d b"}', "half of a surrogate pair"),
        ('{"prompt": "a", "id": "a\\u0000"}', "malformed id"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, part: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read(file)
    assert "p.jsonl line 2" in caught.value.message
    assert part in caught.value.message


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no prompts"):
        read(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as text"):
        read(tmp_path / "binary.txt")


def test_items_params_go_over_the_jobs() -> None:
    assert merged_params({"max_tokens": 5, "seed": 1}, {"seed": 2}).seed == 2
    assert merged_params({"max_tokens": 5}, None).max_tokens == 5
    with pytest.raises(RequestError, match="Did you mean temperature"):
        merged_params({"temprature": 1}, None)
    with pytest.raises(RequestError):
        merged_params({"stop": 5}, None)


def test_digest_tells_files_and_params_apart(tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", ["a", "b"])
    other = write_prompts(tmp_path / "q.jsonl", ["a", "c"])
    digests = {
        digest_of(read_items(path, name="x.jsonl", rank=rank), params)
        for path, params, rank in ((file, {}, 1), (other, {}, 1), (file, {"seed": 1}, 1), (file, {}, 0))
    }
    assert len(digests) == 4
    assert digest_of(read_items(file, name="x.jsonl"), {})[0] == 2


def test_params_that_do_not_go_with_the_jobs_name_their_item(tmp_path: Path) -> None:
    rows = ["a", {"prompt": "b", "params": {"json_schema": {}}}]
    file = write_prompts(tmp_path / "p.jsonl", rows)
    assert digest_of(read_items(file, name="p.jsonl"), {})[0] == 2
    with pytest.raises(DataError, match="item 1: json_schema and ignore_eos exclude each other"):
        digest_of(read_items(file, name="p.jsonl"), {"ignore_eos": True})


def test_whole_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "\\ud83d\\udca1"}\n')
    assert [item.prompt for item in read_items(file, name="p.jsonl")] == ["\N{ELECTRIC LIGHT BULB}"]


def test_ranks_are_in_order() -> None:
    assert [rank_of(name, where="x") for name in ("high", "normal", "low")] == [0, 1, 2]


def test_key_of_a_message_survives_and_others_do_not() -> None:
    from burnish.scale.items import Key
    from burnish.scale.rabbit import from_body, hidden, to_body

    assert from_body(to_body(Key("job", 3))) == Key("job", 3)
    for body in (b"", b"[]", b"{}", b'{"job": 1, "item": 2}', b'{"job": "a", "item": true}', json.dumps("x").encode()):
        assert from_body(body) is None
    assert hidden("amqp://me:secret@host:1/") == "amqp://me:***@host:1/"


def test_keys_of_a_bias_are_token_ids_though_json_makes_them_texts(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "params": {"logit_bias": {"100": 3, "7": -1.5}}}]
    [item] = read_items(write_prompts(tmp_path / "p.jsonl", rows), name="p.jsonl")
    assert merged_params({}, item.params).biases == ((7, -1.5), (100, 3.0))
    for bias in ({"seven": 1}, {"-7": 1}, {"7": 1, "07": 2}):
        with pytest.raises(RequestError, match="logit_bias is out of range"):
            merged_params({"logit_bias": bias}, None)
