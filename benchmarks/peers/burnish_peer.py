"""burnish: its native engine, in this process."""

from __future__ import annotations

import time

import numpy as np
import torch
from work import Pass, arguments, chosen_work, measure, report, timed_load

from burnish.engine.protocol import make_engine
from burnish.engine.sampling import SamplingParams
from burnish.measure.hardware import version_record

parser = arguments(__doc__)
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
flags = parser.parse_args()
work = chosen_work(flags)

# The keyword is passed only where it is asked for, so that the adapter also runs on a burnish that lacks it.
quantize = {} if flags.quantize == "none" else {"quantize": flags.quantize}
engine, load_s = timed_load(
    lambda: make_engine(
        flags.model,
        engine="native",
        dtype=flags.dtype,
        max_num_seqs=32,
        max_model_len=work.input_tokens + work.output_tokens + 1,
        threads=flags.threads,
        speculation="off",
        **quantize,
    )
)
params = SamplingParams(max_tokens=work.output_tokens, ignore_eos=True)


def run(prompts: np.ndarray) -> Pass:
    started = time.perf_counter()
    outputs = list(engine.generate(prompts.tolist(), params))
    wall = time.perf_counter() - started
    ttft_ms = outputs[0].metrics.ttft_ms if len(outputs) == 1 else None
    tokens = [list(output.token_ids) for output in outputs]
    return Pass(wall_s=wall, ttft_s=None if ttft_ms is None else ttft_ms / 1e3, tokens=tokens)


passes = measure(run, work, flags.runs)
settings = {"dtype": flags.dtype, "quantize": flags.quantize, "torch": torch.__version__}
report(
    flags,
    work,
    passes,
    system="burnish",
    version=version_record()["burnish"],
    settings=settings,
    load_s=load_s,
)
