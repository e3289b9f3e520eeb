"""Options, commands and recipes that are wrong: one line, exit code 2, and a guess where one is near."""

from __future__ import annotations

import builtins
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Cli

import burnish


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["tnue"], "tune"),
        (["generate", "MODEL", "--promt", "x"], "--prompt"),
        (["tune", "MODEL", "--data", "d", "--out", "o", "--learning-rat", "1"], "--learning-rate"),
        (["data", "inspekt"], "inspect"),
        (["bench", "MODEL", "--output-token", "3"], "--output-tokens"),
    ],
)
def test_misspelt_words_are_guessed(cli: Cli, arguments: list[str], part: str) -> None:
    cli(*arguments).fails(2, part, "Did you mean")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["generate"], "MODEL"),
        (["tune", "MODEL"], "--data"),
        (["merge", "DIR"], "--out"),
        (["bench", "MODEL", "--concurrency", "many"], "--concurrency"),
        (["generate", "MODEL"], "--prompt"),
        (["generate", "MODEL", "--prompt", "x", "--prompts", "f"], "--prompts"),
        (["plan", "a", "b"], "b"),
        (["synth", "tinylama-1.1b", "--out", "o"], "tinyllama-1.1b"),
        (["plan", "mistral-7b", "--device", "t44"], "t4"),
        (["plan", "mistral-7b", "--require", "fly"], "fly"),
        (["report", "--format", "pdf"], "run"),
        (["runs", "show", "gone"], "gone"),
        (["runs", "ls"], "burnish demo"),
        (["report"], "burnish demo"),
    ],
)
def test_unusable_command_lines_say_what_is_wrong(cli: Cli, arguments: list[str], part: str) -> None:
    cli(*arguments).fails(2, part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--dtype", "float12"], "float12"),
        (["--device", "gpu"], "gpu"),
        (["--threads", "0"], "threads"),
        (["--engine", "vllm"], "vllm"),
        (["--quantize", "int3"], "int3"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--concurrency", "0"], "concurrency"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
    ],
)
def test_generate_refuses_values_out_of_range(cli: Cli, tiny: Path, options: list[str], part: str) -> None:
    cli("generate", tiny, "--prompt", "x", *options).fails(2, part, "expected")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--method", "lorra"], "lora"),
        (["--method", "dora"], "dora"),
        (["--schedule", "cosin"], "cosine"),
        (["--precision", "float8"], "float8"),
        (["--rank", "0"], "rank"),
        (["--alpha", "0"], "alpha"),
        (["--dropout", "1.5"], "dropout"),
        (["--target-modules", "q_porj"], "q_proj"),
        (["--target-modules", ","], "target"),
        (["--steps", "0"], "steps"),
        (["--steps", "5", "--epochs", "2"], "epochs"),
        (["--epochs", "-1"], "epochs"),
        (["--micro-batch-size", "0"], "--micro-batch-size"),
        (["--gradient-accumulation", "0"], "--gradient-accumulation"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--warmup", "-1"], "warmup"),
        (["--max-seconds", "0"], "--max-seconds"),
        (["--max-length", "1"], "--max-length"),
        (["--limit", "0"], "limit"),
        (["--too-long", "cut"], "truncate"),
    ],
)
def test_tune_refuses_values_out_of_range(
    cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path, options: list[str], part: str
) -> None:
    cli("tune", tiny, "--data", rows_file, "--out", tmp_path / "out", *options).fails(2, part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--bits", "5"], "5"),
        (["--bits", "16"], "16"),
        (["--method", "awqq"], "awqq"),
        (["--group-size", "0"], "group_size"),
        (["--group-size", "-2"], "group_size"),
        (["--damping", "-1"], "damping"),
        (["--method", "rtn", "--damping", "0.1"], "rtn has no damping"),
        (["--method", "w8a8", "--samples", "8"], "w8a8 takes no calibration rows"),
        (["--samples", "0"], "samples"),
        (["--min-agreement", "2"], "agreement"),
        (["--max-kl", "-1"], "kl"),
        (["--method", "rtn", "--act-order"], "rtn"),
    ],
)
def test_quantize_refuses_values_out_of_range(
    cli: Cli, tiny: Path, tmp_path: Path, options: list[str], part: str
) -> None:
    cli("quantize", tiny, "--out", tmp_path / "out", *options).fails(2, part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--repeats", "0"], "repeats"),
        (["--input-tokens", "0"], "input-tokens"),
        (["--output-tokens", "0"], "output-tokens"),
        (["--num-requests", "0"], "num-requests"),
        (["--vs", "vllm"], "vllm"),
        (["--input-tokens", "300"], "256"),
    ],
)
def test_bench_refuses_values_out_of_range(cli: Cli, tiny: Path, options: list[str], part: str) -> None:
    cli("bench", tiny, *options).fails(2, part)


def test_unknown_report_format_lists_the_known(cli: Cli, tmp_path: Path, run_folder: Path) -> None:
    cli("report", run_folder, "--format", "pdf").fails(2, "pdf", "html", "csv")


def test_yaml_sets_options_and_flags_override_it(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("max-tokens: 3\nignore_eos: true\nprompt: [SELECT, ship]\n")
    both = cli("generate", tiny, "--config", tmp_path / "r.yaml", "--json").json
    assert [len(output["token_ids"]) for output in both] == [3, 3]
    one = cli("generate", tiny, "-c", tmp_path / "r.yaml", "--max-tokens", 2, "--prompt", "x", "--json").json
    assert [len(output["token_ids"]) for output in one] == [2]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rte: 1", ("learning_rte", "Did you mean learning-rate?")),
        ("zzz: 1", ("unknown key zzz",)),
        ("- a\n- b", ("no settings", "list")),
        ("just text", ("no settings",)),
        ("a: [1", ("not YAML",)),
        ("steps: many", ("steps",)),
        ("steps: {a: 1}", ("steps",)),
        ("gradient_checkpointing: perhaps", ("gradient-checkpointing",)),
    ],
)
def test_bad_yaml_names_file_or_key(
    cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path, text: str, parts: tuple[str, ...]
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    cli("tune", tiny, "--data", rows_file, "--out", tmp_path / "o", "--config", tmp_path / "r.yaml").fails(2, *parts)


def test_missing_yaml_names_it(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    cli("generate", tiny, "--prompt", "x", "--config", tmp_path / "no.yaml").fails(2, "there is no file", "no.yaml")


def test_yaml_folder_says_so(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    cli("generate", tiny, "--prompt", "x", "--config", tmp_path).fails(2, str(tmp_path))


def test_missing_extra_is_named(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without_transformers(name: str, package: str | None = None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_transformers)
    cli("generate", tiny, "--prompt", "x", "--engine", "transformers").fails(6, "pip install 'burnish[hf]'")


def test_missing_parquet_reader_names_the_data_extra(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module
    real_import = builtins.__import__

    def gone(name: str) -> bool:
        return name.split(".")[0] in ("pyarrow", "datasets")

    def import_module(name: str, package: str | None = None):
        if gone(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    def import_statement(name: str, *rest, **named):
        if gone(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *rest, **named)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(builtins, "__import__", import_statement)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    cli("tune", tiny, "--data", tmp_path / "rows.parquet", "--out", tmp_path / "o").fails(6, "burnish[data]")


def test_interrupt_while_loading_exits_130(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import burnish.pipeline.opening as opening

    def press_ctrl_c(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(opening, "load_optimised", press_ctrl_c)
    cli("eval", tiny).fails(130, "interrupted")


def test_unforeseen_fault_is_one_line_and_says_how_to_see_more(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import burnish.pipeline.opening as opening

    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(opening, "load_optimised", fault)
    done = cli("eval", tiny)
    assert done.code == 1
    assert done.err == "error: RuntimeError: first second. Set BURNISH_TRACEBACK=1 to see where.\n"


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_running_out_of_memory_exits_5(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    import burnish.pipeline.opening as opening

    def load(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(opening, "load_optimised", load)
    cli("eval", tiny).fails(5, "out of memory")


def test_model_that_does_not_fit_exits_3(cli: Cli) -> None:
    done = cli("plan", "mistral-7b", "--device", "t4", "--dtype", "float32", "--require", "full")
    assert done.code == 3
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert "full" in done.out


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version").out == f"burnish {burnish.__version__}\n"
    done = cli("--help")
    assert done.code == 0
    for name in ("demo", "chat", "tune", "merge", "quantize", "eval", "bench", "plan", "doctor", "report", "synth"):
        assert f"  {name} " in done.out


def burnish_process(*arguments: object, **settings) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "burnish.cli.main", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["generate", "./nowhere", "--prompt", "x"], 2), (["plan", "mistral-7b", "--devise", "t4"], 2)],
)
def test_real_process_writes_one_line_and_exits_with_its_code(arguments: list[str], code: int) -> None:
    process = burnish_process(*arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_reader_that_goes_away_is_no_error() -> None:
    with burnish_process("bench", "--help") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 0
