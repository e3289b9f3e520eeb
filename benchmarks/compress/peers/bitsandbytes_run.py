"""stories260k through bitsandbytes: LLM.int8, NF4 and FP4, by transformers' integration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from held_out import Logits, arguments, calibration_and_evaluation, report
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    flags = arguments(__doc__)
    _, evaluation = calibration_and_evaluation(flags.model, flags.text)
    dense = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()

    def made(bits: int, config: BitsAndBytesConfig) -> Callable[[], tuple[Logits, dict[str, Any]]]:
        def make() -> tuple[Logits, dict[str, Any]]:
            model = AutoModelForCausalLM.from_pretrained(
                flags.model, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
            ).eval()
            return (lambda tokens: model(tokens, use_cache=False).logits), {"bits": bits, "symmetric": True}

        return make

    def four(kind: str) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)

    settings = {}
    if 8 in flags.bits:
        settings["LLM.int8"] = made(8, BitsAndBytesConfig(load_in_8bit=True))
    if 4 in flags.bits:
        settings |= {"NF4": made(4, four("nf4")), "FP4": made(4, four("fp4"))}
    report("bitsandbytes", settings, lambda tokens: dense(tokens, use_cache=False).logits, evaluation)


if __name__ == "__main__":
    main()
