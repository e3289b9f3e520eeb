"""`burnish chat` through a pipe: answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import re
from pathlib import Path

from command_line import Cli

SHORT = ("--max-tokens", 6, "--dtype", "float32")
FIGURES = re.compile(
    r"\[\d+ tokens in, \d+ out \| TTFT [\d.,]+ m?s \| TPOT [\d.,]+ m?s \| "
    r"[\d.,]+ tokens/s in \+ out \| peak memory [\d.]+ [MG]iB\]"
)


def test_answers_go_to_stdout_and_figures_to_stderr(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, stdin="How many ships?\nWhich ships?\n")
    asked = [
        cli("generate", merged, "--chat", "--prompt", prompt, *SHORT, "--json").json[0]["text"]
        for prompt in ("How many ships?", "Which ships?")
    ]
    assert done.code == 0
    assert done.out == f"{asked[0]}\n{asked[1]}\n"
    assert len(FIGURES.findall(done.err)) == 2, done.err
    assert "warm-up" in done.err
    assert "native engine, float32 on cpu" in done.err


def test_quiet_shows_answers_only(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, "--quiet", stdin="How many ships?\n/stats\n")
    assert done.err == ""
    assert done.out.count("\n") >= 1


def test_json_gives_one_line_per_answer(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, "--json", stdin="How many ships?\n\nWhich ships?\n")
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [answer["finish_reason"] for answer in answers] == ["length", "length"]
    for name in ("prompt_tokens", "output_tokens", "ttft_ms", "tpot_ms", "total_tokens_per_s", "peak_memory_bytes"):
        assert answers[0]["metrics"][name] > 0, name
    assert done.err == ""


def test_help_and_unknown_commands_answer_on_stderr(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, stdin="/help\n/hlep\n/quit\nnever asked\n")
    assert done.code == 0
    assert done.out == ""
    for name in ("/help", "/context", "/system", "/reset", "/stats", "/quit"):
        assert name in done.err
    assert "no /hlep" in done.err
    assert max(map(len, done.err.split("/help  ")[1].splitlines())) < 80


def test_stats_add_up(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, stdin="How many ships?\nWhich ships?\n/stats\n")
    answers = [tuple(map(int, pair)) for pair in re.findall(r"\[(\d+) tokens in, (\d+) out", done.err)]
    total = f"2 answers, {sum(n for n, _ in answers)} tokens in, {sum(n for _, n in answers)} out"
    assert total in done.err
    assert "KV" in done.err


def test_context_stands_before_every_question(cli: Cli, merged: Path, tmp_path: Path) -> None:
    def tokens_in(text: str, *options: object) -> list[int]:
        done = cli("chat", merged, *SHORT, *options, "--json", stdin=text)
        return [json.loads(line)["metrics"]["prompt_tokens"] for line in done.out.splitlines()]

    (bare,) = tokens_in("How many?\n")
    first, second, after = tokens_in(
        "/context CREATE TABLE t (a INTEGER);\nHow many?\nHow many?\n/context\nHow many?\n"
    )
    assert first == second > bare
    assert after == bare
    (tmp_path / "schema.sql").write_text("CREATE TABLE t (a INTEGER);\n")
    assert tokens_in("How many?\n", "--context", "@schema.sql") == [first]
    assert tokens_in("How many?\n", "--context", "CREATE TABLE t (a INTEGER);") == [first]


def test_plain_model_remembers_and_reset_forgets(cli: Cli, tiny: Path) -> None:
    def tokens_in(text: str, *options: object) -> list[int]:
        done = cli("chat", tiny, *SHORT, *options, "--json", stdin=text)
        return [json.loads(line)["metrics"]["prompt_tokens"] for line in done.out.splitlines()]

    first, second, after = tokens_in("How many?\nHow many?\n/reset\nHow many?\n")
    assert first < second
    assert after == first
    with_system, without = tokens_in("/system You are a clerk.\nHow many?\n/system\nHow many?\n")
    assert with_system > without == first
    assert tokens_in("How many?\n", "--system", "You are a clerk.") == [with_system]


def test_tuned_model_takes_each_question_alone(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, stdin="How many ships?\nHow many ships?\n")
    first, second = done.out.splitlines()
    assert first == second


def test_backslash_joins_lines(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, "--json", stdin="How many\\\nships?\n")
    assert len(done.out.splitlines()) == 1


def test_without_cache_the_text_is_the_same(cli: Cli, merged: Path) -> None:
    question = "How many ships are there? (0)\n"
    cached = cli("chat", merged, *SHORT, "--quiet", stdin=question)
    assert cached.out.strip()
    assert cli("chat", merged, *SHORT, "--quiet", "--no-kv-cache", stdin=question).out == cached.out


def test_adapter_answers_as_the_merged_model(cli: Cli, tiny: Path, adapter: Path, merged: Path) -> None:
    question = "How many ships are there? (0)\n"
    expected = cli("chat", merged, *SHORT, "--quiet", stdin=question).out
    assert cli("chat", tiny, "--adapter", adapter, *SHORT, "--quiet", stdin=question).out == expected
    assert cli("chat", adapter, *SHORT, "--quiet", stdin=question).out == expected


def test_quantized_while_loading_runs_and_says_so(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, "--quantize", "int8", stdin="How many?\n")
    assert done.code == 0
    assert "quantized to int8" in done.err
    cli("chat", merged, "--quantize", "int7", stdin="x\n").fails(2, "int7", "int8, int4")
    cli("chat", merged, "--quantize", "int8", "--engine", "transformers", stdin="x\n").fails(2, "native")


def test_small_models_are_not_quantized_unasked_and_it_says_why(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, stdin="How many?\n")
    assert "not quantized" in done.err
    assert "million parameters" in done.err


def test_transformers_engine_gives_the_same_answer(cli: Cli, merged: Path) -> None:
    question = "How many ships are there? (0)\n"
    expected = cli("chat", merged, *SHORT, "--quiet", "--template", "chat", stdin=question).out
    theirs = cli("chat", merged, *SHORT, "--quiet", "--template", "chat", "--engine", "transformers", stdin=question)
    assert theirs.code == 0
    assert theirs.out == expected


def test_empty_input_ends_well(cli: Cli, merged: Path) -> None:
    done = cli("chat", merged, *SHORT, "--quiet", stdin="")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_real_story_is_the_known_one(cli: Cli, shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260k"
    options = ["--dtype", "float32", "--max-tokens", 60, "--quiet"]
    known = "there was a little girl named Lily. She loved to play outside in the park."
    done = cli("chat", folder, *options, stdin="Once upon a time\n")
    assert done.code == 0
    assert known in done.out
    assert cli("generate", folder, "-p", "Once upon a time", *options).out.startswith(f", {known}")
