"""stories260k through torchao's weight-only quantization: one scale per output channel, plain and with HQQ's scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from held_out import Logits, arguments, calibration_and_evaluation, report
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis
from torchao.quantization.quant_primitives import MappingType
from transformers import AutoModelForCausalLM


def main() -> None:
    flags = arguments(__doc__)
    _, evaluation = calibration_and_evaluation(flags.model, flags.text)
    dense = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()

    def made(bits: int, mapping: MappingType, algorithm: str) -> Callable[[], tuple[Logits, dict[str, Any]]]:
        def make() -> tuple[Logits, dict[str, Any]]:
            model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()
            config = IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{bits}"),
                granularity=PerAxis(0),
                mapping_type=mapping,
                intx_choose_qparams_algorithm=algorithm,
            )
            quantize_(model.model.layers, config)
            symmetric = mapping == MappingType.SYMMETRIC
            return (lambda tokens: model(tokens, use_cache=False).logits), {"bits": bits, "symmetric": symmetric}

        return make

    kinds = {
        "symmetric": (MappingType.SYMMETRIC, "affine"),
        "asymmetric": (MappingType.ASYMMETRIC, "affine"),
        "hqq": (MappingType.SYMMETRIC, "hqq_scale_only"),
    }
    settings = {f"rtn-{bits} {name}": made(bits, *kind) for bits in flags.bits for name, kind in kinds.items()}
    report("torchao", settings, lambda tokens: dense(tokens, use_cache=False).logits, evaluation)


if __name__ == "__main__":
    main()
