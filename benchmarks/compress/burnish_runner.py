"""burnish's GPTQ as `burnish quantize` runs it by default, on the samples of the comparison."""

from __future__ import annotations

from pathlib import Path

import torch
from work import arguments, measured, samples_of

from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import save_quantized
from burnish.compress.quantize import quantize_model
from burnish.measure.hardware import version_record
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder


def main() -> None:
    flags = arguments(__doc__).parse_args()
    torch.set_num_threads(flags.threads)
    samples = samples_of(flags)
    config = QuantizeConfig(bits=flags.bits, group_size=flags.group_size)
    model = load_decoder(flags.model, dtype="bfloat16")
    with torch.no_grad():
        for parameter in model.parameters():  # a loaded weight may be a mapped file that nobody has read
            parameter.float().sum()
    versions = {name: text for name, text in version_record().items() if name in ("burnish", "torch")}
    measured(flags, lambda: _quantize(model, samples, config), system="burnish", versions=versions)
    save_quantized(model, flags.out, source=Path(flags.model), config=config)


def _quantize(model: Decoder, samples: list[list[int]], config: QuantizeConfig) -> None:
    quantize_model(model, samples, config)


if __name__ == "__main__":
    main()
