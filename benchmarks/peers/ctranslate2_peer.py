"""CTranslate2: `Generator.generate_batch`; several workers share the batch where the flags ask for them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import ctranslate2
import numpy as np
from work import Pass, arguments, chosen_work, measure, report, timed_load

parser = arguments(__doc__)
parser.add_argument("--compute-type", default="int8", help="as of ctranslate2.Generator")
parser.add_argument("--workers", type=int, default=1, help="each with its share of the threads and of the requests")
flags = parser.parse_args()
work = chosen_work(flags)
batch = -(-work.requests // flags.workers)

generator, load_s = timed_load(
    lambda: ctranslate2.Generator(
        flags.model,
        device="cpu",
        compute_type=flags.compute_type,
        inter_threads=flags.workers,
        intra_threads=flags.threads // flags.workers,
    )
)
pieces = json.loads((Path(flags.model) / "vocabulary.json").read_text(encoding="utf-8"))


def run(prompts: np.ndarray) -> Pass:
    as_pieces = [[pieces[token] for token in row] for row in prompts.tolist()]
    first: list[float] = []
    started = time.perf_counter()

    def on_token(_: ctranslate2.GenerationStepResult) -> bool:
        if not first:
            first.append(time.perf_counter() - started)
        return False

    results = generator.generate_batch(
        as_pieces,
        max_batch_size=batch,
        batch_type="examples",
        max_length=work.output_tokens,
        min_length=work.output_tokens,
        sampling_topk=1,
        end_token=[],
        include_prompt_in_result=False,
        callback=on_token if len(prompts) == 1 else None,
    )
    wall = time.perf_counter() - started
    tokens = [result.sequences_ids[0] for result in results]
    return Pass(wall_s=wall, ttft_s=first[0] if first else None, tokens=tokens)


passes = measure(run, work, flags.runs)
settings = {"compute_type": generator.compute_type, "workers": flags.workers, "batch": batch}
report(
    flags,
    work,
    passes,
    system="CTranslate2",
    version=ctranslate2.__version__,
    settings=settings,
    load_s=load_s,
)
