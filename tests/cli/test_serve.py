"""`burnish serve` says in one line what is wrong, with the exit code for it, before anything large is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from burnish.cli.main import run

pytest.importorskip("fastapi", reason="the extra serve brings it")
BASE = "burnish-sql-base"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere/at-all/really"], 2, "is no model"),
        ([BASE, "--adapter", "tuned"], 2, "expected NAME=DIR"),
        ([BASE, "--adapter", "a=/tmp", "--adapter", "a=/tmp"], 2, "two adapters are called a"),
        ([BASE, "--adapter", "a=/nowhere"], 2, "is no adapter"),
        ([BASE, "--concurrency", "0"], 2, "--concurrency is out of range; got 0;"),
        ([BASE, "--max-body", "0"], 2, "--max-body is out of range; got 0 bytes; expected an integer of 1024 bytes"),
        ([BASE, "--stream-interval", "-1"], 2, "--stream-interval is out of range; got -0.001 s; expected 0 s"),
        ([BASE, "--slow-reader", "0"], 2, "--slow-reader is out of range"),
        ([BASE, "--track-interval", "0.5"], 2, "--track-interval is out of range"),
        ([BASE, "--track-interval", "5"], 2, "--track-interval goes with --track"),
        ([BASE, "--port", "99999"], 2, "the port is out of range"),
        ([BASE, "--host", "no.such.host.invalid", "--port", "0"], 2, "there is no address"),
        ([BASE, "--api-keys", "/nowhere/keys"], 2, "cannot be read as API keys"),
        ([BASE, "--port", "0", "--kv-dtype", "float7"], 2, "float7"),
        ([BASE, "--port", "0", "--max-model-len", "100000"], 2, "more than the model was made for"),
    ],
)
def test_bad_usage_is_one_line(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--quiet", "--threads", "1", *words]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("option", "value"), [("--tensor-parallel", "2"), ("--pipeline-parallel", "2"), ("--slow-reader", "5")]
)
def test_what_ray_does_not_do_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", BASE, "--threads", "1", "--ray", "local", option, value]) == 2
    assert capsys.readouterr().err == f"error: {option} does not go with --ray\n"


def test_a_port_that_is_taken_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run(["serve", BASE, "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_server_open_to_others_without_keys_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", BASE, "--host", "0.0.0.0", "--port", "0", "--kv-dtype", "float7"]) == 2
    assert "give it --api-keys" in capsys.readouterr().err
