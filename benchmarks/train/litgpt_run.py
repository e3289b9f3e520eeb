"""litgpt's model, LoRA and chunked loss in the loop of its `finetune_lora`, on rows that are tokenised already.

Its precision "bf16-true": weights, adapter and activations in bfloat16. Micro-batches are weighted by their tokens
(litgpt weights them alike) and gradients are clipped (litgpt does not), so that the losses are comparable. Its output
layer is a matrix of its own where the checkpoint ties it to the embeddings.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file
from torch import nn
from work import ALPHA, CLIP, RANK, SEED, Memory, Step, arguments, learning_rate, read_rows, report, rows_of_step

IGNORED = -100
HEAD_CHUNK = 128  # positions of one piece of the output layer, as in finetune/lora.py


def main() -> None:
    parser = arguments(__doc__)
    flags = parser.parse_args()
    if flags.method != "lora" or flags.quantize != "none" or flags.precision == "autocast" or flags.adapter:
        parser.error("this runner does LoRA in bfloat16 or float32, from its own start")
    if flags.checkpoint_every:
        parser.error("litgpt recomputes no blocks on one device")
    torch.set_num_threads(flags.threads)
    torch.manual_seed(SEED)
    started = time.perf_counter()
    model = _load(Path(flags.model), torch.bfloat16 if flags.precision == "bfloat16" else torch.float32)
    load_s = time.perf_counter() - started
    rows = read_rows(flags)
    model.max_seq_length = max(map(len, rows))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate(flags), weight_decay=0.0, fused=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.float().sum()
    memory = Memory()
    memory.mark_loaded()
    steps = [
        _step(model, parameters, optimizer, rows_of_step(rows, number, flags.rows_per_step), flags)
        for number in range(flags.warmup_steps + flags.steps)
    ]
    report(
        flags,
        steps,
        memory,
        system="litgpt",
        versions={name: version(name) for name in ("torch", "litgpt", "lightning")},
        settings={},
        trained=sum(parameter.numel() for parameter in parameters),
        load_s=load_s,
    )


def _load(folder: Path, dtype: torch.dtype) -> GPT:
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if shape["model_type"] != "llama":
        raise SystemExit(f"{folder}: expected a Llama shape, got {shape['model_type']}")
    config = Config(
        name=folder.name,
        hf_config={},
        block_size=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_embd=shape["hidden_size"],
        n_query_groups=shape["num_key_value_heads"],
        intermediate_size=shape["intermediate_size"],
        norm_eps=shape["rms_norm_eps"],
        rope_base=int(shape["rope_theta"]),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
    )
    files = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, files, dtype=dtype)
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    model = GPT(config).to(dtype)
    left = model.load_state_dict(weights, strict=False)
    if missing := [name for name in left.missing_keys if "lora_" not in name]:
        raise SystemExit(f"{folder} lacks {', '.join(missing[:3])}")
    if left.unexpected_keys:
        raise SystemExit(f"{folder} holds {', '.join(left.unexpected_keys[:3])} too many")
    mark_only_lora_as_trainable(model)
    return model.train()


def _step(
    model: GPT,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rows: list[list[int]],
    flags: argparse.Namespace,
) -> Step:
    learned = sum(len(row) - 1 for row in rows)
    begin = time.perf_counter()
    forward_s = backward_s = loss_sum = 0.0
    positions = 0
    for start in range(0, len(rows), flags.micro):
        batch = rows[start : start + flags.micro]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in batch])
        positions += ids.numel()
        at = time.perf_counter()
        logits = model(ids, lm_head_chunk_size=HEAD_CHUNK)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, labels[..., 1:]) * (sum(map(len, batch)) - len(batch)) / learned
        del logits
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


if __name__ == "__main__":
    main()
