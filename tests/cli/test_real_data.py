"""The bundled base on real rows: training runs, the loss falls, and PEFT reads the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from command_line import Cli
from peft import PeftModel

from burnish.data.bundled import bundled_path
from burnish.pipeline.opening import Source, open_decoder

STEPS = ("--steps", 6, "--micro-batch-size", 4, "--learning-rate", 3e-3, "--rank", 8, "--precision", "float32")
TOKENS = torch.tensor([[7, 300, 12, 2999, 41, 8, 500, 6, 77, 1000]])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("sql/spider_create_context_train.json", ["--check-sql", "--limit", 100]),
        ("alpaca/alpaca_en_demo_1000.json", ["--limit", 100, "--template", "alpaca"]),
    ],
)
def test_bundled_base_learns_from_real_rows(
    cli: Cli, shared_data: Path, tmp_path: Path, file: str, options: list[object]
) -> None:
    out = tmp_path / "adapter"
    command = ["tune", "burnish-sql-base", "--data", shared_data / file, "--max-length", 192, "--out", out]
    done = cli(*command, *options, *STEPS, "--json")
    record = done.json
    losses = [step["loss"] for step in record["steps"]]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert record["num_examples"] + record["num_too_long"] == 100
    if "--check-sql" in options:
        assert record["num_bad_rows"] == 2
        assert "spider_create_context_train.json, row 81: " in done.err
    ours = open_decoder(str(out), Source(dtype="float32")).decoder
    base = transformers.AutoModelForCausalLM.from_pretrained(bundled_path("burnish-sql-base"), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_rows_that_do_not_run_are_reported_with_their_numbers(cli: Cli, shared_data: Path) -> None:
    file = shared_data / "sql" / "spider_create_context_train.json"
    done = cli("data", "inspect", file, "--check-sql", "--limit", 100, "--rows", 1)
    assert done.code == 0
    assert "row 81: the context is no database" in " ".join(done.out.split())
