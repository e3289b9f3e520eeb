"""transformers and PEFT in a plain loop: what most scripts do, and with --micro 1 and bfloat16 the best of the peers.

With --quantize the base is bitsandbytes'. Nothing is evaluated before training: bitsandbytes 0.50 repacks 4-bit weights
in the first evaluation on CPUs with AVX512-BF16 into a kernel without gradients, and what is trained then is wrong.
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from work import ALPHA, CLIP, RANK, SEED, TARGETS, Memory, Step, arguments, learning_rate, read_rows, report
from work import rows_of_step as of_step

HALF = torch.bfloat16


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--adapter-dtype", choices=("float32", "bfloat16"), default="bfloat16", help="PEFT's own default is float32"
    )
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--save-adapter", help="write the adapter here, as it begins, and end")
    flags = parser.parse_args()
    if flags.checkpoint_every > 1:
        parser.error("transformers recomputes all blocks or none")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(SEED)

    started = time.perf_counter()
    model = _load(flags)
    load_s = time.perf_counter() - started
    if flags.save_adapter:
        model.save_pretrained(flags.save_adapter)
        return
    rows = read_rows(flags)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate(flags), weight_decay=0.0, fused=True)
    with torch.no_grad():  # makes every page of a mapped file resident
        for parameter in model.parameters():
            parameter.detach().float().sum()
    memory = Memory()
    memory.mark_loaded()
    steps = [
        _step(model, parameters, optimizer, of_step(rows, number, flags.rows_per_step), flags)
        for number in range(flags.warmup_steps + flags.steps)
    ]
    report(
        flags,
        steps,
        memory,
        system="transformers" if flags.method == "full" else "peft",
        versions={name: version(name) for name in ("torch", "transformers", "peft", *_quantizer(flags))},
        settings={"adapter_dtype": flags.adapter_dtype, "attention": flags.attention},
        trained=sum(parameter.numel() for parameter in parameters),
        load_s=load_s,
    )


def _load(flags: argparse.Namespace) -> nn.Module:
    """The model in training mode, with its adapter."""
    options = {"attn_implementation": flags.attention}
    dtype = HALF if flags.precision == "bfloat16" else torch.float32
    if flags.quantize != "none":
        options |= {"quantization_config": _quantization(flags.quantize), "device_map": {"": "cpu"}}
    model = transformers.AutoModelForCausalLM.from_pretrained(flags.model, dtype=dtype, **options)
    model.config.use_cache = False
    if flags.quantize != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if flags.method == "lora":
        in_float32 = flags.adapter_dtype == "float32"
        if flags.adapter:
            model = PeftModel.from_pretrained(
                model, flags.adapter, is_trainable=True, autocast_adapter_dtype=in_float32
            )
        else:
            config = LoraConfig(
                r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
            )
            model = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
    if flags.checkpoint_every:
        if flags.method == "lora":
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _quantization(kind: str) -> transformers.BitsAndBytesConfig:
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=HALF,
    )


def _quantizer(flags: argparse.Namespace) -> tuple[str, ...]:
    return () if flags.quantize == "none" else ("bitsandbytes",)


def _step(
    model: nn.Module,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rows: list[list[int]],
    flags: argparse.Namespace,
) -> Step:
    """Micro-batches weighted by their tokens, so that they add up to the large batch."""
    learned = sum(len(row) - 1 for row in rows)
    begin = time.perf_counter()
    forward_s = backward_s = loss_sum = 0.0
    positions = 0
    for start in range(0, len(rows), flags.micro):
        inputs, labels = _collate(rows[start : start + flags.micro])
        positions += labels.numel()
        at = time.perf_counter()
        with torch.autocast("cpu", HALF, enabled=flags.precision == "autocast"):
            loss = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(learned)).loss
        middle = time.perf_counter()
        loss.backward()
        backward_s += time.perf_counter() - middle
        forward_s += middle - at
        loss_sum += loss.item()
    at = time.perf_counter()
    nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    end = time.perf_counter()
    return Step(
        loss=loss_sum,
        seconds=end - begin,
        tokens=sum(map(len, rows)),
        positions=positions,
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=end - at,
    )


def _collate(rows: list[list[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Padded on the right to the longest; without padding there is no mask, which lets sdpa take its fast path."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask}
    return inputs, labels


if __name__ == "__main__":
    main()
