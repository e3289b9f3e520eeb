"""stories260k through llm-compressor: round to nearest and GPTQ, one scale per output channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from held_out import Logits, arguments, calibration_and_evaluation, report
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    flags = arguments(__doc__)
    calibration, evaluation = calibration_and_evaluation(flags.model, flags.text)
    parent = load(flags.model)

    def made(modifier: type, bits: int, observer: str, symmetric: bool) -> Callable[[], tuple[Logits, dict[str, Any]]]:
        def make() -> tuple[Logits, dict[str, Any]]:
            model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()
            weights = QuantizationArgs(
                num_bits=bits, type="int", symmetric=symmetric, strategy="channel", observer=observer
            )
            scheme = QuantizationScheme(targets=["Linear"], weights=weights)
            recipe = modifier(config_groups={"all": scheme}, ignore=["lm_head"])
            rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration]
            oneshot(
                model=model,
                dataset=datasets.Dataset.from_list(rows),
                recipe=[recipe],
                max_seq_length=calibration.shape[1],
                num_calibration_samples=len(calibration),
            )
            model.eval()
            return (lambda tokens: model(tokens, use_cache=False).logits), {"bits": bits, "symmetric": symmetric}

        return make

    kinds = (("rtn", QuantizationModifier), ("gptq", GPTQModifier))
    settings = {
        f"{name}-{bits} {observer} {'symmetric' if symmetric else 'asymmetric'}": made(
            modifier, bits, observer, symmetric
        )
        for bits in flags.bits
        for name, modifier in kinds
        for observer, symmetric in (("minmax", True), ("mse", True), ("mse", False))
        if name == "gptq" or symmetric
    }
    report("llm-compressor", settings, parent, evaluation)


def load(folder: Any) -> Logits:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda tokens: model(tokens, use_cache=False).logits


if __name__ == "__main__":
    main()
