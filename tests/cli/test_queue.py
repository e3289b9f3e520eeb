"""`burnish queue` from submit to collect, its errors, its signals, and what must not load torch."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Cli

from burnish.cli.queue_processes import without_workers
from burnish.scale.supervising import Supervisor, card_of


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"question {number}", "id": f"r{number}"} for number in range(6)]
    rows.append({"prompt": "word " * 500, "id": "long"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_job_goes_from_submit_to_collect(cli: Cli, tiny: Path, prompts: Path, tmp_path: Path) -> None:
    submitted = cli("queue", "submit", prompts, "--job", "first", "--max-tokens", 5, "--ignore-eos", "--json").json
    assert submitted == {"job_id": "first", "queue": "default", "num_items": 7, "published": 7}
    cli("queue", "collect", "first").fails(1, "7 of 7 items are still to be done", "--wait")
    report = cli("queue", "work", tiny, "--until-empty", "--concurrency", 4, "--json").json
    assert (report["done"], report["errors"], report["dead"]) == (6, 1, 0)
    status = cli("queue", "status", "first", "--json").json
    assert (status["jobs"][0]["done"], status["jobs"][0]["error"], status["broker"]) == (6, 1, None)
    assert "first" in cli("queue", "status").out
    record = cli("queue", "collect", "first", "--out", "out.jsonl", "--json").json
    assert (record["rows"], record["errors"]) == (7, 1)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    direct = cli("generate", tiny, "--prompts", prompts, "--max-tokens", 5, "--ignore-eos", "--json")
    direct.fails(2, "too long")
    for row in rows[:6]:
        alone = cli(
            "generate", tiny, "-p", f"question {row['item']}", "--max-tokens", 5, "--ignore-eos", "--json", "--quiet"
        ).json
        assert (row["text"], row["output_tokens"]) == (alone[0]["text"], 5)
    assert "too long for the model" in rows[6]["error"]
    [failed] = cli("queue", "dead", "first", "--json").json
    assert (failed["id"], failed["attempts"]) == ("long", 1)
    assert "too long" in cli("queue", "dead").out
    assert cli("queue", "retry", "first", "--json").json == {"job_id": "first", "retried": 1}
    assert cli("queue", "status", "first", "--json").json["jobs"][0]["pending"] == 1


def test_stdin_and_messages_are_taken(cli: Cli) -> None:
    done = cli("queue", "submit", "-", "--priority", "high", stdin="one\ntwo\n")
    assert done.code == 0
    assert cli("queue", "status", done.out.strip(), "--json").json["jobs"][0]["source"] == "stdin"


def test_same_job_again_adds_nothing_and_another_is_refused(cli: Cli, prompts: Path) -> None:
    for published in (7, 0):
        done = cli("queue", "submit", prompts, "--job", "same", "--json").json
        assert done["published"] == published
    assert cli("queue", "status", "same", "--json").json["jobs"][0]["pending"] == 7
    cli("queue", "submit", prompts, "--job", "same", "--max-tokens", 9).fails(2, "there is a job same already")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["submit", "none.jsonl"], ["there is no file none.jsonl"]),
        (["submit", "p.jsonl", "--job", "a b"], ["--job is malformed"]),
        (["submit", "p.jsonl", "--queue", "a/b"], ["--queue is malformed"]),
        (["submit", "p.jsonl", "--priority", "urgent"], ["no such priority", "low, normal, high"]),
        (["submit", "p.jsonl", "--top-p", "7"], ["top_p is out of range"]),
        (["submit", "p.jsonl", "--max-attempts", "0"], ["max-attempts is out of range"]),
        (["submit", "p.jsonl", "--store", "oracle://a/b"], ["--store names no database"]),
        (["submit", "p.jsonl", "--broker", "http://a"], ["--broker is malformed"]),
        (["collect", "none"], ["there is no queue in sqlite:///burnish-queue.db", "--store"]),
        (["collect", "none", "--wait", "--out", "."], ["--out . is no file"]),
        (["collect", "none", "--wait", "--out", "p.jsonl"], ["is there already"]),
        (["collect", "none", "--out", "p.jsonl/x.jsonl"], ["no folder p.jsonl"]),
        (["collect", "none", "--out", "s3://bucket"], ["--out is malformed"]),
        (["collect", "none", "--wait", "--partial"], ["exclude each other"]),
        (["collect", "none", "--json"], ["cannot both go to stdout"]),
        (["collect", "none", "--format", "csv"], ["no such format"]),
        (["status"], ["there is no queue in"]),
        (["retry", "none"], ["there is no queue in"]),
        (["dead"], ["there is no queue in"]),
        (["status", "--store", "p.jsonl"], ["not a database"]),
        (["status", "--store", "."], ["unable to open database file"]),
        (["status", "--store", "sqlite:///:memory:"], ["--store names no database"]),
        (["retry", "none", "--state", "done"], ["--state is out of range"]),
        (["work", "nowhere", "--lease", "1"], ["lease is out of range"]),
        (["work", "nowhere", "--lease", "30", "--broker", "amqp://a"], ["--lease does not go with --broker"]),
        (["work", "nowhere", "--concurrency", "0"], ["concurrency is out of range"]),
        (["work", "nowhere", "--workers", "2", "--json"], ["--json tells of one worker"]),
    ],
)
def test_wrong_use_is_one_line(cli: Cli, words: list[str], parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    cli("queue", *words).fails(2, *parts)


def test_job_that_is_not_there_is_named(cli: Cli, prompts: Path) -> None:
    cli("queue", "submit", prompts)
    for command, name in itertools.product(("collect", "status", "retry", "dead"), ("none", "nürgends")):
        cli("queue", command, name).fails(2, f"there is no job {name}")


def test_malformed_line_stores_nothing(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": 5}\n')
    cli("queue", "submit", "p.jsonl").fails(2, "p.jsonl line 2")
    assert cli("queue", "status", "--json").json["jobs"] == []


def test_missing_extra_is_named(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    for module in ("pymysql", "psycopg", "aio_pika"):
        monkeypatch.setitem(sys.modules, module, None)
    for words in (
        ["--store", "mysql://a@b/c"],
        ["--store", "postgresql://a@b/c"],
        ["--broker", "amqp://localhost/"],
    ):
        cli("queue", "submit", "p.jsonl", *words).fails(6, "burnish[queue]")


def test_light_commands_load_no_torch(prompts: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from burnish.cli.main import run\n"
        "for words in (['submit', sys.argv[1], '--job', 'j'], ['status'], ['retry', 'j'], ['dead'],\n"
        "              ['collect', 'j', '--partial', '--out', 'o.jsonl']):\n"
        "    assert run(['queue', *words]) == 0, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(prompts)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _work(tiny: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "burnish", "queue", "work", str(tiny), "--concurrency", "2", *words]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def _counts(cli: Cli) -> dict[str, int]:
    return cli("queue", "status", "long", "--json").json["jobs"][0]


@pytest.mark.slow
def test_signals_drain_first_and_end_then(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"question {number}\n" for number in range(3000)))
    cli("queue", "submit", "p.txt", "--job", "long", "--max-tokens", 40, "--ignore-eos")
    first = _work(tiny, tmp_path)
    _until(lambda: _counts(cli)["done"] > 0, first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(300) == 0
    counts = _counts(cli)
    assert counts["running"] == 0
    assert counts["pending"] > 0
    second = _work(tiny, tmp_path, "--lease", "3")
    _until(lambda: _counts(cli)["done"] > counts["done"], second)
    os.kill(second.pid, signal.SIGSTOP)  # so that it cannot drain between the two
    second.send_signal(signal.SIGTERM)
    second.send_signal(signal.SIGINT)
    os.kill(second.pid, signal.SIGCONT)
    assert second.wait(300) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert _counts(cli)["running"] > 0
    for process in (first, second):
        assert process.stderr is not None
        process.stderr.close()


def _until(true: object, process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 300
    while not true():  # type: ignore[operator]
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_supervisor_starts_again_what_died_and_stops_when_all_are_done(tmp_path: Path) -> None:
    (tmp_path / "burnish").mkdir()
    (tmp_path / "burnish" / "__init__.py").touch()
    (tmp_path / "burnish" / "__main__.py").write_text(
        "import os, pathlib, sys\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "if not place.exists():\n"
        "    place.write_text('')\n"
        "    os.kill(os.getpid(), 9)\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    told: list[str] = []
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert Supervisor(command=["once", "0"], count=1, say=told.append).run() == 0
        assert told == ["worker 1 ended by signal 9; starting it again"]
        # A wrong command line is not tried again.
        assert Supervisor(command=["once", "2"], count=2, say=told.append).run() == 2
        assert len(told) == 1
    finally:
        os.chdir(before)


@pytest.mark.skipif(sys.platform != "linux", reason="the system has to tell it")
def test_workers_are_drained_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    (tmp_path / "burnish").mkdir()
    (tmp_path / "burnish" / "__init__.py").touch()
    (tmp_path / "burnish" / "__main__.py").write_text(
        "import os, signal\n"
        "def drain(*_):\n"
        "    os.write(1, b'drained ' + os.environ['OWN'].encode())\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, drain)\n"
        "os.write(1, b'ready\\n')\n"
        "while True:\n"
        "    signal.pause()\n"
    )
    program = (
        "import sys\n"
        "sys.path.pop(0)\n"  # the package, and not the one above
        "from burnish.scale.supervising import Supervisor\n"
        "Supervisor(command=[], count=1, own=lambda number: {'OWN': f'as {number}'}).run()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == b"ready\n"
        supervisor.kill()
        assert supervisor.stdout.read() == b"drained as 0"


def test_each_worker_has_cards_of_its_own() -> None:
    assert card_of(2, visible=None) == {"CUDA_VISIBLE_DEVICES": "2"}
    assert card_of(1, visible=None, each=2) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert card_of(1, visible="4,GPU-a,6") == {"CUDA_VISIBLE_DEVICES": "GPU-a"}
    assert card_of(1, visible="4") == {"CUDA_VISIBLE_DEVICES": ""}  # the worker then says that it has none


def test_worker_of_a_supervisor_gets_the_same_words() -> None:
    words = ["queue", "work", "m", "--workers", "3", "--queue", "q"]
    assert without_workers(words) == ["queue", "work", "m", "--queue", "q", "--workers", "1"]
    assert without_workers(["work", "--workers=3"]) == ["work", "--workers", "1"]
