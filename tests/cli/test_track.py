"""--track on every stage's command, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Cli

from burnish.pipeline.manifest import fingerprint_folder
from burnish.track.jsonl import TrackedRun, read_runs
from burnish.track.replay import Replayed


def told(path: Path) -> TrackedRun:
    """The one run of a file."""
    (run,) = read_runs(path)
    return run


def last(run: TrackedRun, name: str) -> float:
    return run.series(name)[-1][1]


def test_merge_tells_what_its_manifest_holds(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    done = cli("merge", adapter, "--out", tmp_path / "m", "--json", "--track", tmp_path / "t.jsonl")
    assert done.code == 0, done.err
    run, manifest = told(tmp_path / "t.jsonl"), json.loads((tmp_path / "m" / "burnish.json").read_text())
    assert run.status == "finished"
    assert run.params["onto"] == manifest["config"]["onto"] == "original"
    assert run.params["input.base.fingerprint"] == manifest["inputs"]["base"]["fingerprint"]
    assert run.params["result.gate.verdict"] == "pass"
    for name in ("seconds", "peak_memory_bytes", "predicted_peak_bytes", "disk_bytes"):
        assert last(run, name) == manifest["figures"][name]
    assert last(run, "gate.kl_mean") == manifest["gate"]["kl_mean"]
    assert [Path(path).name for path in run.artifacts] == ["burnish.json", "m"]


def test_quantize_and_prune_tell_their_figures(cli: Cli, merged: Path, rows_file: Path, tmp_path: Path) -> None:
    commands = {
        "quantize": ["--method", "rtn", "--bits", 8, "--group-size", 32],
        "prune": ["--method", "magnitude", "--sparsity", 0.1],
    }
    for command, given in commands.items():
        path = tmp_path / f"{command}.jsonl"
        lenient = ["--gate-rows", 4, "--max-kl", 9, "--max-kl-p99", 99, "--min-agreement", 0, "--max-score-drop", 1]
        lenient += ["--max-perplexity-ratio", 99]
        done = cli(command, merged, "--out", tmp_path / command, *given, *lenient, "--json", "--track", path)
        assert done.code == 0, done.err
        run = told(path)
        assert (run.status, run.params["stage"]) == ("finished", command)
        assert last(run, "disk_bytes") == done.json["disk_bytes"]
        assert run.params["method"] == given[1]


def test_child_that_fails_its_gate_is_told_of_and_not_logged_as_a_model(cli: Cli, merged: Path, tmp_path: Path) -> None:
    done = cli("quantize", merged, "--out", tmp_path / "q", "--method", "rtn", "--bits", 2, "--gate-rows", 0,
               "--max-kl", 1e-9, "--track", tmp_path / "t.jsonl")  # fmt: skip
    assert done.code == 4
    run = told(tmp_path / "t.jsonl")
    assert run.status == "failed"
    assert run.params["result.gate.verdict"] == "fail"
    assert [Path(path).name for path in run.artifacts] == ["burnish.json"]


def test_eval_and_bench_tell_their_records(cli: Cli, merged: Path, rows_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    done = cli("eval", merged, "--data", rows_file, "--limit", 4, "--max-tokens", 4, "--json", "--track", path)
    run = told(path)
    assert last(run, "num_rows") == done.json["num_rows"] == 4
    assert run.params["result.metric"] == done.json["metric"]
    path = tmp_path / "bench.jsonl"
    done = cli("bench", merged, "--input-tokens", 4, "--output-tokens", 4, "--repeats", 1, "--json", "--track", path)
    run = told(path)
    assert last(run, "output_tokens_per_s") == done.json["output_tokens_per_s"]
    assert last(run, "ttft_ms.p50") == done.json["ttft_ms"]["p50"]
    texts = [json.loads(line) for line in path.read_text().splitlines()]
    (whole,) = (json.loads(line["text"]) for line in texts if line["event"] == "text")
    assert whole == done.json


@pytest.mark.parametrize("command", ["merge", "quantize", "prune", "eval", "bench", "tune", "demo"])
def test_unknown_tracker_is_refused_before_the_work(cli: Cli, command: str, tmp_path: Path) -> None:
    given = {"merge": ["none"], "demo": []}.get(command, ["none"])
    out = [] if command in ("eval", "bench") else ["--out", tmp_path / "out"]
    data = ["--data", "none.json"] if command == "tune" else []
    cli(command, *given, *out, *data, "--track", "ftp://elsewhere").fails(2, "names no tracker")


def test_environment_gives_the_tracker(cli: Cli, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_TRACK", str(tmp_path / "t.jsonl"))
    cli("bench", merged, "--input-tokens", 4, "--output-tokens", 2, "--repeats", 1, "--json")
    assert told(tmp_path / "t.jsonl").status == "finished"


def test_replay_of_nothing_is_refused(cli: Cli, tmp_path: Path) -> None:
    cli("track", "replay", tmp_path / "none").fails(2, "nothing to replay")
    (tmp_path / "bad.track" / "x").mkdir(parents=True)
    (tmp_path / "bad.track" / "x" / "events.jsonl").write_text("{}\n")
    cli("track", "replay", tmp_path / "bad").fails(2, "is no spool")


def test_inputs_versions_and_hardware_are_told_and_runs_carry_the_models_name(
    cli: Cli, merged: Path, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    few = ["--data", rows_file, "--limit", 2, "--max-tokens", 2, "--json"]
    assert cli("eval", merged, *few, "--against", tiny, "--track", tmp_path / "eval.jsonl").code in (0, 4)
    short = ["--input-tokens", 4, "--output-tokens", 2, "--repeats", 1, "--json"]
    assert cli("bench", merged, *short, "--track", tmp_path / "bench.jsonl").code == 0
    expected = fingerprint_folder(merged)
    for command in ("eval", "bench"):
        run = told(tmp_path / f"{command}.jsonl")
        assert run.name == f"{command}-{merged.name}"
        assert run.params["input.model.fingerprint"] == expected
        assert run.params["version.torch"]
        assert run.params["hardware.cores"] > 0
    assert told(tmp_path / "eval.jsonl").params["input.against.fingerprint"] == fingerprint_folder(tiny)
    assert "input.against.fingerprint" not in run.params


def test_quiet_leaves_what_failed_to_be_seen(cli: Cli, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = cli(
        "bench", merged, "--input-tokens", 4, "--output-tokens", 2, "--repeats", 1, "--json", "-q",
        "--track", f"jsonl:{tmp_path / 'file' / 't.jsonl'}",
    )  # fmt: skip
    assert done.code == 0
    assert "tracking stopped at start" in done.err
    assert done.err.count("\n") == 1


def test_replay_says_what_it_sent_in_words(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Replayed(spool="s", destination="http://h", sent=12, there=3, refused=[], missing=[])
    monkeypatch.setattr("burnish.track.replay.replay", lambda path, uri: [done])
    shown = cli("track", "replay", tmp_path)
    assert (shown.code, shown.err) == (0, "http://h: 12 settings, figures and files sent, 3 were there already\n")
