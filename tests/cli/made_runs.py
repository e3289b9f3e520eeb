"""A run record of five variants, as the demo writes one."""

from __future__ import annotations

from burnish.measure.run_record import LossPoint, RunRecord, Sample, SampleAnswer, Stage, Variant

MIB = 1024**2
NAMES = {"base": None, "tuned": "base", "merged": "tuned", "gptq-8bit": "merged", "gptq-4bit": "merged"}


def made_run() -> RunRecord:
    variants = [
        Variant(
            name=name,
            parent=parent,
            disk_bytes=10 * MIB,
            peak_memory_bytes=200 * MIB,
            ttft_ms=9.5,
            output_tokens_per_s_1=100.0,
            output_tokens_per_s_8=500.0,
            score=0.1 if name == "base" else 0.85,
            score_low=0.05 if name == "base" else 0.8,
            score_high=0.15 if name == "base" else 0.9,
            num_rows=300,
            kl_to_parent=None if parent is None else 0.004,
            greedy_agreement=None if parent is None else 0.99,
            verdict=None if parent is None else "pass",
        )
        for name, parent in NAMES.items()
    ]
    answer = SampleAnswer(text="SELECT name FROM ship WHERE name <> '<b>'", right=True)
    return RunRecord(
        name="demo",
        created="2026-11-21T10:11:12+00:00",
        model="burnish-sql-base",
        parameters=5_000_000,
        task="text-to-sql",
        seconds=200.0,
        hardware={"cpu": "A processor", "cores": 2},
        versions={"python": "3.11.7"},
        variants=variants,
        stages=[Stage(name="tune", seconds=90.0, predicted_peak_bytes=500 * MIB, measured_peak_bytes=510 * MIB)],
        loss=[LossPoint(step=step, loss=3.0 / step) for step in range(1, 9)],
        samples=[Sample(question="Which ships?", gold="SELECT name FROM ship", answers=dict.fromkeys(NAMES, answer))],
        settings={"seed": {"seed": 0}},
    )
