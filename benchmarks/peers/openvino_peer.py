"""OpenVINO GenAI: its continuous batching pipeline, stepped by hand so that the first token can be timed."""

from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai
from work import Pass, arguments, chosen_work, measure, report, timed_load

parser = arguments(__doc__)
parser.add_argument("--max-batch-tokens", type=int, default=4096, help="most tokens computed in one step")
parser.add_argument("--cache-gib", type=int, default=1, help="room for the KV cache")
parser.add_argument("--property", action="append", default=[], metavar="NAME=VALUE", help="of the CPU device")
flags = parser.parse_args()
work = chosen_work(flags)

scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size = flags.cache_gib
scheduler.max_num_batched_tokens = flags.max_batch_tokens
scheduler.max_num_seqs = 32
scheduler.enable_prefix_caching = False
properties = {"INFERENCE_NUM_THREADS": flags.threads, **dict(pair.split("=", 1) for pair in flags.property)}
pipeline, load_s = timed_load(
    lambda: openvino_genai.ContinuousBatchingPipeline(flags.model, scheduler, "CPU", properties)
)

generation = openvino_genai.GenerationConfig()
generation.max_new_tokens = generation.min_new_tokens = work.output_tokens
generation.ignore_eos = True
generation.do_sample = False


def run(prompts: np.ndarray) -> Pass:
    started = time.perf_counter()
    handles = [
        pipeline.add_request(index, openvino.Tensor(row[None, :].copy()), generation)
        for index, row in enumerate(prompts)
    ]
    first = None
    while pipeline.has_non_finished_requests():
        pipeline.step()
        if first is None and handles[0].can_read():
            first = time.perf_counter() - started
    wall = time.perf_counter() - started
    tokens = [list(handle.read_all()[0].generated_ids) for handle in handles]
    return Pass(wall_s=wall, ttft_s=first if len(prompts) == 1 else None, tokens=tokens)


passes = measure(run, work, flags.runs)
settings = {"max_batch_tokens": flags.max_batch_tokens, "cache_gib": flags.cache_gib, "properties": properties}
report(
    flags,
    work,
    passes,
    system="OpenVINO GenAI",
    version=openvino_genai.__version__,
    settings=settings,
    load_s=load_s,
)
