"""stories260k through burnish: every scheme with one scale per output channel, and those that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from held_out import Logits, arguments, calibration_and_evaluation, report

from burnish.compress.config import QuantizeConfig
from burnish.compress.folder_formats import quantize_for_folder
from burnish.models.loading import load_decoder

WHOLE: dict[str, Any] = {"match_parent": True, "refine": 3}
SCHEMES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {},
    "gptq, whole range": {"scale_search": False},
    "gptq, act-order": {"activation_order": True},
    "gptq, matched, refined": WHOLE,
    "gptq, matched, refined, asymmetric": {**WHOLE, "symmetric": False},
    "awq": {"method": "awq"},
    "awq-gptq, matched, refined, asymmetric": {"method": "awq-gptq", **WHOLE, "symmetric": False},
}
FIXED: dict[str, dict[str, Any]] = {
    "w8a8": {"bits": 8, "group_size": -1},
    "smoothquant": {"bits": 8, "group_size": -1},
    "llm.int8": {"bits": 8, "group_size": -1},
    "nf4": {"bits": 4, "group_size": 64},
}


def main() -> None:
    flags = arguments(__doc__)
    calibration, evaluation = calibration_and_evaluation(flags.model, flags.text)
    parent = load_decoder(flags.model, dtype="float32")

    def made(**options: Any) -> Callable[[], tuple[Logits, dict[str, Any]]]:
        def make() -> tuple[Logits, dict[str, Any]]:
            config = QuantizeConfig(**options)
            child = load_decoder(flags.model, dtype="float32")
            examples = calibration.tolist() if config.needs_calibration else None
            result, _ = quantize_for_folder(child, examples, config)
            return child, {
                "bits": config.bits,
                "symmetric": config.symmetric,
                "bits_per_weight": result.bits_per_weight,
            }

        return make

    settings = {
        f"{name.replace('gptq', f'gptq-{bits}', 1) if name.startswith('gptq') else f'{name}-{bits}'}": made(
            bits=bits, group_size=-1, **options
        )
        for bits in flags.bits
        for name, options in SCHEMES.items()
    }
    for name, options in FIXED.items():
        if options["bits"] in flags.bits:
            settings[name] = made(method=name, **options)
    report("burnish", settings, parent, evaluation)


if __name__ == "__main__":
    main()
