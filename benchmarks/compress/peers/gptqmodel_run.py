"""stories260k through GPTQModel: GPTQ with one scale per output channel, with and without activation order."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it, it fails on machines with two cores

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from held_out import Logits, arguments, calibration_and_evaluation, report
from transformers import AutoModelForCausalLM


def main() -> None:
    flags = arguments(__doc__)
    calibration, evaluation = calibration_and_evaluation(flags.model, flags.text)
    dense = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()

    def made(bits: int, symmetric: bool, order: bool) -> Callable[[], tuple[Logits, dict[str, Any]]]:
        def make() -> tuple[Logits, dict[str, Any]]:
            config = QuantizeConfig(
                bits=bits, group_size=-1, sym=symmetric, desc_act=order, act_group_aware=False, device="cpu"
            )
            loaded = GPTQModel.load(str(flags.model), config, dtype=torch.float32)
            rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration]
            loaded.quantize(rows, batch_size=8, backend=BACKEND.TORCH)
            # In memory the model is packed for the file; it runs once it is read back, in 16 bits.
            with tempfile.TemporaryDirectory() as folder:
                loaded.save(folder)
                model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.bfloat16).model.eval()
            return (lambda tokens: model(tokens, use_cache=False).logits), {"bits": bits, "symmetric": symmetric}

        return make

    settings = {
        f"gptq-{bits} {'symmetric' if symmetric else 'asymmetric'}{', act-order' if order else ''}": made(
            bits, symmetric, order
        )
        for bits in flags.bits
        for symmetric, order in ((True, False), (True, True), (False, True))
    }
    report("GPTQModel", settings, lambda tokens: dense(tokens, use_cache=False).logits, evaluation)


if __name__ == "__main__":
    main()
