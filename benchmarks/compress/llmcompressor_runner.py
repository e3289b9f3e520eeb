"""llm-compressor's GPTQModifier on the samples of the comparison, in an environment of its own."""

from __future__ import annotations

from importlib.metadata import version

import datasets
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
from work import arguments, measured, samples_of


def main() -> None:
    flags = arguments(__doc__).parse_args()
    torch.set_num_threads(flags.threads)
    samples = samples_of(flags)
    rows = [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in samples]
    dataset = datasets.Dataset.from_list(rows)
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.bfloat16)
    weights = QuantizationArgs(
        num_bits=flags.bits, type="int", symmetric=True, strategy="group", group_size=flags.group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = [GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.float().sum()

    def quantize() -> None:
        oneshot(
            model=model,
            dataset=dataset,
            recipe=recipe,
            max_seq_length=flags.length,
            num_calibration_samples=flags.samples,
        )

    versions = {name: version(name) for name in ("llmcompressor", "torch", "transformers")}
    measured(flags, quantize, system="llm-compressor", versions=versions)
    model.save_pretrained(flags.out, save_compressed=True)
    AutoTokenizer.from_pretrained(flags.model).save_pretrained(flags.out)


if __name__ == "__main__":
    main()
