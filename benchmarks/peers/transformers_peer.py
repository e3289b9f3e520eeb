"""transformers: `generate` on one static batch (the prompts have one length, so nothing is padded)."""

from __future__ import annotations

import time

import numpy as np
import torch
import transformers
from transformers.generation.streamers import BaseStreamer
from work import Pass, arguments, chosen_work, measure, report, timed_load

parser = arguments(__doc__)
parser.add_argument("--dtype", default="bfloat16")
flags = parser.parse_args()
work = chosen_work(flags)
torch.set_num_threads(flags.threads)


class FirstToken(BaseStreamer):
    """Notes when the second piece comes: the first one is the prompt."""

    def __init__(self) -> None:
        self.pieces = 0
        self.at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self.pieces += 1
        if self.pieces == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


model, load_s = timed_load(
    lambda: transformers.AutoModelForCausalLM.from_pretrained(
        flags.model, dtype=getattr(torch, flags.dtype), attn_implementation="sdpa"
    ).eval()
)


def run(prompts: np.ndarray) -> Pass:
    streamer = FirstToken() if len(prompts) == 1 else None
    started = time.perf_counter()
    ids = torch.from_numpy(prompts)
    with torch.inference_mode():
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            do_sample=False,
            max_new_tokens=work.output_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    wall = time.perf_counter() - started
    ttft = streamer.at - started if streamer is not None and streamer.at is not None else None
    return Pass(wall_s=wall, ttft_s=ttft, tokens=answer[:, prompts.shape[1] :].tolist())


passes = measure(run, work, flags.runs)
settings = {"dtype": flags.dtype, "attention": "sdpa", "torch": torch.__version__}
report(
    flags,
    work,
    passes,
    system="transformers",
    version=transformers.__version__,
    settings=settings,
    load_s=load_s,
)
