"""TRL's SFTTrainer with its own packing: LoRA in bfloat16, rows joined without padding.

"bfd" (best fit, decreasing) is the same work in another order: a step holds about as many tokens as eight rows, and its
losses are not those of the other trainers. "wrapped" joins rows across their boundaries, which is other work.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from importlib.metadata import version
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from work import ALPHA, CLIP, RANK, SEED, TARGETS, Memory, Step, arguments, learning_rate, read_rows, report

LONGEST = 512
SPARE = 6  # packing takes this many times the rows that the steps need, to choose from


class Watch(TrainerCallback):
    """Seconds, losses and tokens of every optimizer step."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()
        self.tokens.append(0)
        self.positions.append(0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def count(self, inputs: dict[str, Any]) -> None:
        """Add the tokens of one forward pass."""
        ids = inputs["input_ids"]
        self.positions[-1] += ids.numel()
        self.tokens[-1] += ids.numel() - int((ids == self.pad_id).sum())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--packing", choices=("bfd", "wrapped", "none"), default="bfd")
    flags = parser.parse_args()
    if flags.method != "lora" or flags.quantize != "none" or flags.precision != "bfloat16" or flags.adapter:
        parser.error("this runner does LoRA in bfloat16, from its own start")
    if flags.checkpoint_every > 1:
        parser.error("transformers recomputes all blocks or none")
    torch.set_num_threads(flags.threads)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    load_s = time.perf_counter() - started
    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(flags, model, tokenizer, folder)
        watch = Watch(tokenizer.pad_token_id)
        trainer.add_callback(watch)
        plain_step = trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            watch.count(inputs)
            return plain_step(model, inputs, *args, **options)

        trainer.training_step = counted
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.detach().float().sum()
        memory = Memory()
        memory.mark_loaded()
        trainer.train()
    steps = [
        Step(loss=loss, seconds=seconds, tokens=tokens, positions=positions)
        for loss, seconds, tokens, positions in zip(watch.losses, watch.seconds, watch.tokens, watch.positions)
    ]
    report(
        flags,
        steps,
        memory,
        system="trl",
        versions={name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        settings={"packing": flags.packing, "own_order": True, "attention": model.config._attn_implementation},
        trained=sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        load_s=load_s,
    )


def _trainer(flags: argparse.Namespace, model: Any, tokenizer: Any, folder: str) -> SFTTrainer:
    packed = flags.packing != "none"
    steps = flags.warmup_steps + flags.steps
    rows = read_rows(flags)
    if packed:  # two packed rows of 512 tokens are about eight rows
        rows = (rows * SPARE)[: (steps + 1) * flags.rows_per_step * SPARE]
    per_step = max(1, flags.rows_per_step // 4) if packed else flags.rows_per_step
    micro = min(flags.micro, per_step)
    settings = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, per_step // micro),
        max_steps=steps,
        learning_rate=learning_rate(flags),
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=bool(flags.checkpoint_every),
        packing=packed,
        packing_strategy=flags.packing if packed else "bfd",
        max_length=LONGEST,
        disable_tqdm=True,
        seed=SEED,
    )
    transformers.logging.set_verbosity_error()
    return SFTTrainer(
        model,
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row} for row in rows]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    )


if __name__ == "__main__":
    main()
