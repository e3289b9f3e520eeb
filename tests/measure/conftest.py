"""Tiny decoders, token sequences, and a run record with every part."""

from __future__ import annotations

import pytest
import torch
from measure_fakes import VOCAB, make_decoder

from burnish.measure.report import (
    DtypeShare,
    LossPoint,
    RunRecord,
    Sample,
    SampleAnswer,
    Stage,
    Variant,
)
from burnish.models.decoder import Decoder

MIB = 1024**2


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    return make_decoder(0)


@pytest.fixture(scope="session")
def other_decoder() -> Decoder:
    return make_decoder(1)


@pytest.fixture
def sequences() -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (length,), generator=draw).tolist() for length in (2, 9, 23, 40, 11)]


@pytest.fixture
def full_run() -> RunRecord:
    """A run of five variants with every figure set."""

    def variant(name: str, parent: str | None, disk: float, score: float, verdict: str | None) -> Variant:
        return Variant(
            name=name,
            parent=parent,
            disk_bytes=int(disk * MIB),
            peak_memory_bytes=400 * MIB,
            ttft_ms=9.7,
            output_tokens_per_s_1=188.0,
            output_tokens_per_s_8=905.5,
            score=score,
            score_low=max(0.0, score - 0.04),
            score_high=min(1.0, score + 0.04),
            num_rows=300,
            kl_to_parent=None if parent is None else 0.0042,
            greedy_agreement=None if parent is None else 0.991,
            verdict=verdict,
            dtypes=[DtypeShare(dtype="float32", elements=5_000_000, bytes=20_000_000, share=1.0)],
        )

    names = ("base", "tuned", "merged", "gptq-8bit", "gptq-4bit")
    return RunRecord(
        name="demo",
        created="2026-11-21T09:14:03+00:00",
        model="burnish-sql-base",
        parameters=5_000_000,
        task="text-to-sql",
        seconds=214.8,
        hardware={"cpu": "A processor", "cores": 2, "memory_bytes": 24 * 1024**3, "instruction_sets": ["AVX2"]},
        versions={"python": "3.11.7", "torch": "2.13.0"},
        variants=[
            variant("base", None, 10.4, 0.06, None),
            variant("tuned", "base", 11.9, 0.873, None),
            variant("merged", "tuned", 10.4, 0.873, "pass"),
            variant("gptq-8bit", "merged", 6.1, 0.87, "pass"),
            variant("gptq-4bit", "merged", 3.9, 0.853, "pass"),
        ],
        stages=[
            Stage(name="tune", seconds=96.4, predicted_peak_bytes=512 * MIB, measured_peak_bytes=548 * MIB),
            Stage(name="merge", seconds=1.3, predicted_peak_bytes=66 * MIB, measured_peak_bytes=61 * MIB),
        ],
        loss=[LossPoint(step=step, loss=3.0 / step) for step in range(1, 41)],
        eval_loss=[LossPoint(step=20, loss=0.2), LossPoint(step=40, loss=0.1)],
        samples=[
            Sample(
                question="Which ships were built after 1990?",
                context="CREATE TABLE ship (name TEXT, built INTEGER);",
                gold="SELECT name FROM ship WHERE built > 1990",
                answers={
                    name: SampleAnswer(text="SELECT name FROM ship WHERE built > 1990", right=True) for name in names
                },
            )
        ],
        settings={"tune": {"rank": 16, "learning_rate": 0.002}},
    )
