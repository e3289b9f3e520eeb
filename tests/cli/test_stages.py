"""tune, merge, quantize, eval, generate, bench and synth from the command line: their JSON and their tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Cli

import burnish.pipeline.merge as merge_module
from burnish.models.decoder import Decoder
from burnish.train.lora import merge_adapter
from tiny_llama import write_json


def test_tune_json_has_what_is_promised(cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    record = cli("tune", tiny, "--data", rows_file, "--out", out, "--steps", 3, "--json").json
    promised = {"tokens_per_s", "seconds", "steps", "peak_memory_bytes", "loaded_memory_bytes"}
    assert promised | {"predicted_peak_bytes", "adapter"} <= record.keys()
    assert record["adapter"] == str(out)
    assert [set(step) >= {"step", "loss", "tokens", "seconds"} for step in record["steps"]] == [True] * 3
    assert {path.name for path in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "burnish.json"}


def test_tune_shows_a_table_and_the_rows_left_out(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    row = {"question": "How many?", "context": "CREATE TABLE t (a INTEGER);", "answer": "SELECT COUNT(*) FROM t"}
    data = write_json(tmp_path / "rows.json", [row, {**row, "answer": ""}])
    done = cli("tune", tiny, "--data", data, "--out", tmp_path / "o", "--steps", 1)
    assert done.code == 0
    assert "1 used, 1 bad, 0 too long" in done.out
    assert "loss" in done.out
    assert done.err.count("left out: ") == 1
    assert "answer is empty" in done.err


def test_quiet_leaves_stderr_empty(cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    done = cli("tune", tiny, "--data", rows_file, "--out", tmp_path / "o", "--steps", 1, "--quiet", "--json")
    assert done.err == ""
    assert done.json["stopped"] == "finished"


def test_tune_full_writes_a_model_that_generates(cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    assert cli("tune", tiny, "--data", rows_file, "--out", out, "--steps", 2, "--method", "full").code == 0
    assert cli("generate", out, "--prompt", "SELECT", "--max-tokens", 2).code == 0


def test_merge_json_and_table(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    record = cli("merge", adapter, "--out", tmp_path / "a", "--json").json
    assert record["gate"]["verdict"] == "pass"
    assert {"kl_mean", "greedy_agreement", "limits"} <= record["gate"].keys()
    done = cli("merge", adapter, "--out", tmp_path / "b")
    assert done.code == 0
    assert "100.00 %" in done.out
    assert "pass" in done.out


def test_corrupt_merge_exits_4_and_is_marked(
    cli: Cli, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_merge(decoder: Decoder) -> list[str]:
        names = merge_adapter(decoder)
        with torch.no_grad():
            decoder.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(-1)
        return names

    monkeypatch.setattr(merge_module, "merge_adapter", wrong_merge)
    cli("merge", adapter, "--out", tmp_path / "out").fails(4, "worse than its parent", "--dtype")
    assert json.loads((tmp_path / "out" / "burnish.json").read_text())["gate"]["verdict"] == "fail"
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(("method", "bits"), [("rtn", 8), ("gptq", 8), ("gptq", 4)])
def test_quantize_json_has_what_is_promised(cli: Cli, merged: Path, tmp_path: Path, method: str, bits: int) -> None:
    options = ["--method", method, "--bits", bits, "--group-size", 16, "--min-agreement", 0, "--max-kl", 9]
    record = cli("quantize", merged, "--out", tmp_path / "q", *options, "--json").json
    assert {"seconds", "peak_memory_bytes", "disk_bytes", "bits_per_weight", "layers", "gate"} <= record.keys()
    assert {"name", "error"} <= record["layers"][0].keys()
    assert {"verdict", "kl_mean", "greedy_agreement"} <= record["gate"].keys()
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", bits, 16)
    assert cli("generate", tmp_path / "q", "--prompt", "SELECT", "--max-tokens", 2).code == 0


def test_two_bits_exit_4_and_name_the_worst_layers(cli: Cli, merged: Path, tmp_path: Path) -> None:
    done = cli("quantize", merged, "--out", tmp_path / "q", "--method", "rtn", "--bits", 2, "--group-size", 32)
    done.fails(4, "2-bit", "worst layers: model.layers.", "--method gptq")


def test_quantize_shows_a_table(cli: Cli, merged: Path, tmp_path: Path) -> None:
    options = ["--method", "rtn", "--bits", 8, "--group-size", 16, "--min-agreement", 0]
    done = cli("quantize", merged, "--out", tmp_path / "q", *options)
    assert done.code == 0
    for part in ("worst layers", "KL to parent", "stored bits per weight", "pass"):
        assert part in done.out


def test_eval_of_sql_has_score_and_interval(cli: Cli, merged: Path) -> None:
    record = cli("eval", merged, "--data", "text-to-sql:test:4", "--max-tokens", 4, "--json").json
    assert record["task"] == "text-to-sql"
    assert record["score_low"] <= record["score"] <= record["score_high"]
    done = cli("eval", merged, "--data", "text-to-sql:test:4", "--max-tokens", 4, "--show-answers", 2)
    assert "execution accuracy" in done.out
    assert done.out.count("question:") == 2
    assert done.out.count("gold:") == 2


def test_eval_of_perplexity_against_a_parent(cli: Cli, tiny: Path, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("All ships that were built before 1990. " * 9)
    options = ["--task", "perplexity", "--data", tmp_path / "text.txt", "--against", tiny]
    record = cli("eval", merged, *options, "--json").json
    for name in ("perplexity", "num_tokens", "kl_mean", "kl_p99", "greedy_agreement"):
        assert record[name] is not None, name
    done = cli("eval", merged, *options)
    assert "KL to parent" in done.out


def test_eval_of_bleu(cli: Cli, merged: Path, rows_file: Path) -> None:
    options = ["--task", "bleu", "--data", rows_file, "--limit", 3, "--max-tokens", 4]
    assert 0 <= cli("eval", merged, *options, "--json").json["score"] <= 100
    assert "BLEU" in cli("eval", merged, *options).out


def test_generate_prints_the_answer_and_nothing_else_on_stdout(cli: Cli, merged: Path) -> None:
    options = ["--max-tokens", 5, "--ignore-eos"]
    record = cli("generate", merged, "--prompt", "SELECT", *options, "--json").json
    assert len(record) == 1
    assert len(record[0]["token_ids"]) == 5
    assert record[0]["finish_reason"] == "length"
    done = cli("generate", merged, "--prompt", "SELECT", *options)
    assert done.out == record[0]["text"] + "\n"
    assert "1 answer, 5 tokens" in done.err
    assert cli("generate", merged, "--prompt", "SELECT", *options, "--quiet").err == ""


def test_generate_reads_prompts_from_options_files_and_stdin_alike(cli: Cli, merged: Path, tmp_path: Path) -> None:
    prompts = ["SELECT name", "How many ships?"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ["--max-tokens", 4, "--json"]

    def texts(*arguments: object, stdin: str | None = None) -> list[str]:
        return [output["text"] for output in cli("generate", merged, *arguments, *options, stdin=stdin).json]

    expected = texts("-p", prompts[0], "-p", prompts[1])
    assert texts("--prompts", tmp_path / "prompts.txt") == expected
    assert texts("--prompts", tmp_path / "prompts.jsonl") == expected
    assert texts("--prompts", "-", stdin="\n".join(prompts)) == expected
    assert texts("--prompts", tmp_path / "prompts.txt", "--no-kv-cache") == expected
    assert texts("--prompts", tmp_path / "prompts.txt", "--concurrency", 1) == expected
    done = cli("generate", merged, "--prompts", tmp_path / "prompts.txt", "--max-tokens", 4)
    assert done.out == f"[0] {expected[0]}\n[1] {expected[1]}\n"


def test_generate_chat_equals_messages(cli: Cli, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"messages": [{"role": "user", "content": "How many?"}]}\n')
    options = ["--max-tokens", 6, "--json"]
    messages = cli("generate", merged, "--prompts", tmp_path / "m.jsonl", *options).json[0]
    asked = cli("generate", merged, "--prompt", "How many?", "--chat", *options).json[0]
    plain = cli("generate", merged, "--prompt", "How many?", *options).json[0]
    assert messages["token_ids"] == asked["token_ids"]
    assert messages["metrics"]["prompt_tokens"] == asked["metrics"]["prompt_tokens"] > plain["metrics"]["prompt_tokens"]


def test_generate_with_an_adapter_equals_the_merged_model(cli: Cli, tiny: Path, adapter: Path, merged: Path) -> None:
    options = ["--prompt", "SELECT name FROM", "--max-tokens", 8, "--dtype", "float32", "--json"]
    unmerged = cli("generate", tiny, "--adapter", adapter, *options).json[0]["token_ids"]
    assert unmerged == cli("generate", adapter, *options).json[0]["token_ids"]
    assert unmerged == cli("generate", merged, *options).json[0]["token_ids"]
    assert unmerged != cli("generate", tiny, *options).json[0]["token_ids"]


def test_generate_with_a_seed_repeats_itself(cli: Cli, merged: Path) -> None:
    def sample(seed: int) -> list[int]:
        options = ["--prompt", "ship", "--max-tokens", 8, "--temperature", 2, "--seed", seed, "--json"]
        return cli("generate", merged, *options).json[0]["token_ids"]

    assert sample(1) == sample(1) != sample(2)


def test_generate_stops_at_a_string(cli: Cli, merged: Path) -> None:
    options = ["--prompt", "SELECT", "--max-tokens", 12, "--ignore-eos", "--json"]
    whole = cli("generate", merged, *options).json[0]["text"]
    mark = whole[len(whole) // 2 :][:3]
    cut = cli("generate", merged, *options, "--stop", mark).json[0]
    assert cut["text"] == whole[: whole.index(mark)]
    assert cut["finish_reason"] == "stop"


BENCH_FIELDS = {
    "model", "engine", "dtype", "quantization", "device", "threads", "num_requests", "input_tokens", "output_tokens",
    "concurrency", "load_s", "warmup_s", "wall_s", "total_tokens_per_s", "output_tokens_per_s", "ttft_ms", "tpot_ms",
    "peak_memory_bytes", "weights_bytes", "kv_bytes", "repeats", "spread",
}  # fmt: skip


def test_bench_json_has_what_is_promised(cli: Cli, merged: Path) -> None:
    options = ["--input-tokens", 8, "--output-tokens", 4, "--concurrency", 2, "--repeats", 2]
    record = cli("bench", merged, *options, "--json").json
    assert record.keys() >= BENCH_FIELDS
    assert record["model"] == str(merged)
    for name in ("ttft_ms", "tpot_ms"):
        assert 0 < record[name]["p50"] <= record[name]["p90"] <= record[name]["p99"]
    done = cli("bench", merged, *options)
    for part in ("native", "TTFT", "TPOT", "tokens/s", "2 requests, 8 in + 4 out"):
        assert part in done.out


def test_bench_beside_transformers_gives_the_ratio(cli: Cli, merged: Path) -> None:
    options = ["--input-tokens", 8, "--output-tokens", 4, "--vs", "transformers", "--repeats", 2]
    record = cli("bench", merged, *options, "--json").json
    assert record["first"].keys() >= BENCH_FIELDS
    assert record["second"]["engine"] == "transformers"
    assert record["ratio"]["total_tokens_per_s"] > 0
    assert "native over transformers" in cli("bench", merged, *options).out


def test_synth_writes_a_published_shape(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import burnish.models.shapes as shapes

    small = {"num_hidden_layers": 1, "hidden_size": 72, "intermediate_size": 96, "vocab_size": 300}
    monkeypatch.setitem(shapes.SHAPES, "135m", {**shapes.SHAPES["135m"], **small})
    record = cli("synth", "135m", "--out", tmp_path / "made", "--json").json
    assert record["shape"] == "135m"
    assert record["dtype"] == "bfloat16"
    weights = (tmp_path / "made" / "model.safetensors").stat().st_size
    assert 2 * record["parameters"] <= weights <= record["disk_bytes"]
    options = ["--input-tokens", 4, "--output-tokens", 2, "--repeats", 1, "--json"]
    assert cli("bench", tmp_path / "made", *options).json["output_tokens_per_s"] > 0
    assert "random weights" in cli("synth", "135m", "--out", tmp_path / "again").out


@pytest.mark.parametrize("option", ["--dora", "--rslora"])
def test_options_of_adapters_are_refused_for_full_tuning(
    cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path, option: str
) -> None:
    out = tmp_path / "o"
    done = cli("tune", tiny, "--data", rows_file, "--out", out, "--steps", 1, "--method", "full", option)
    assert done.code == 2
    assert f"{option} is for adapters" in done.err
    assert not out.exists()
