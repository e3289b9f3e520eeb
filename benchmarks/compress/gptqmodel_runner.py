"""GPTQModel on the samples of the comparison, in an environment of its own.

Version 7.6.0 ends with an error on two cores unless GPTQMODEL_CPU_WORKERS is set, which is done here.
"""

from __future__ import annotations

import os
from importlib.metadata import version

from work import arguments, measured, samples_of


def main() -> None:
    flags = arguments(__doc__).parse_args()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(flags.threads))
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.set_num_threads(flags.threads)
    rows = [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in samples_of(flags)]
    model = GPTQModel.load(flags.model, QuantizeConfig(bits=flags.bits, group_size=flags.group_size), device="cpu")
    versions = {name: version(name) for name in ("gptqmodel", "torch")}
    measured(flags, lambda: model.quantize(rows, batch_size=8), system="GPTQModel", versions=versions)
    model.save(str(flags.out))


if __name__ == "__main__":
    main()
