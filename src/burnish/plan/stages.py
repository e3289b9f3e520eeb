"""Peak memory of each stage, component by component.

Every predictor gives bytes by component; their sum is the peak. "runtime" is there before the stage begins. Formulas
stand in the predictors' docstrings, in training.py, activations.py and weights.py; measured constants in overheads.py.
Letters: P parameters, A adapter parameters, N tokens, D hidden, I in features, O out features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.plan import overheads
from burnish.plan.activations import comparison_workspace, working_set
from burnish.plan.devices import Device
from burnish.plan.options import PlanOptions
from burnish.plan.training import Components, predict_training
from burnish.plan.weights import (
    DTYPE_BYTES,
    QUANTIZED,
    adapter_parameters,
    block_linears,
    kv_bytes,
    running_bytes,
    weight_bytes,
)

SMALL_PARAMETERS = 100_000_000
LARGE_PARAMETERS = 1_000_000_000
KV_BLOCK = 16  # tokens of a block of the cache


def load_dtype(config: ModelConfig, device: Device, options: PlanOptions, stored_dtype: str | None) -> str:
    """The dtype "auto" stands for.

    GPUs: the checkpoint's own 16-bit dtype, else bfloat16, float16 on cards without it. CPUs: float32 below 100 million
    parameters; larger models in bfloat16 where the processor multiplies it, and beyond a billion also where the
    checkpoint is stored in 16 bits; else float32.
    """
    if options.dtype != "auto":
        return options.dtype
    half = stored_dtype in ("bfloat16", "float16")
    if device.kind == "cuda":
        if not device.bfloat16:
            return "float16"
        return stored_dtype if half and stored_dtype else "bfloat16"
    if config.num_parameters() < SMALL_PARAMETERS:
        return "float32"
    large_half = half and config.num_parameters() >= LARGE_PARAMETERS
    return "bfloat16" if device.bfloat16 or large_half else "float32"


def predict_load(config: ModelConfig, device: Device, options: PlanOptions, dtype: str) -> Components:
    """Weights in the format they run in, and a buffer for the largest tensor that has to be split or cast."""
    parts = _start(device, "load")
    parts["weights"] = _weights(config, options.weight_format or dtype, options)
    if device.kind == "cpu":
        parts["reading"] = min(64 * overheads.MIB, _largest_linear(config) * DTYPE_BYTES[dtype])
    return parts


def predict_inference(config: ModelConfig, device: Device, options: PlanOptions, dtype: str) -> Components:
    """Weights + keys and values of all sequences + the widest step's activations + logits.

    Weights: on a CPU as the compiled kernels hold them, a tied output layer beside the embeddings. KV: sequences x
    tokens (in whole blocks) x 2 x layers x K E x bytes. Activations: the larger of one prefill step and one decode
    step. Logits: one row of V per sequence, twice. Laying out, on a CPU: dense tensors that wait for it.
    """
    size = DTYPE_BYTES[dtype]
    parts = _start(device, "generate")
    weight_format = options.weight_format or dtype
    parts["weights"] = _weights(config, weight_format, options)
    if device.kind == "cpu":
        head = config.vocab_size * config.hidden_size
        if weight_format in ("int8", "int4"):
            parts["weights"] = weight_bytes(config, weight_format, group_size=options.group_size, rest_bytes=size).total
        if config.tie_word_embeddings:
            parts["output layer"] = size * head
        parts["laying out"] = min(overheads.LAYOUT_LIMIT, int(overheads.LAYOUT_SHARE * 4 * head))
    tokens = options.input_tokens + options.output_tokens
    if options.kv_cache:
        stored = -(-tokens // KV_BLOCK) * KV_BLOCK
        parts["kv"] = options.concurrency * kv_bytes(config, tokens=stored, bytes_per_element=size)
    together = max(options.concurrency, min(options.max_batch_tokens, options.concurrency * options.input_tokens))
    parts["activations"] = working_set(config, tokens=together, dtype_bytes=size, gradients=False)
    parts["logits"] = 2 * options.concurrency * config.vocab_size * size
    return parts


def predict_merge(config: ModelConfig, device: Device, options: PlanOptions, dtype: str) -> Components:
    """Base and merged model in float32 (2 x 4 P) + the adapter (4 A) + the product B A + the comparison of both.

    The sum is exact in float32 whatever the files hold; both models are there because the gate compares them.
    """
    parts = _start(device, "merge")
    parts["weights"] = parts["parent"] = 4 * config.num_parameters()
    adapter = adapter_parameters(config, rank=options.rank, target_modules=options.target_modules)
    parts["adapter"] = 2 * 4 * adapter
    parts["workspace"] = 2 * 4 * _largest_linear(config)
    parts["comparison"] = comparison_workspace(config, dtype_bytes=4)
    if device.kind == "cpu":
        parts["allocator"] = int(overheads.WRITTEN_SHARE * parts["weights"])
    return parts


def predict_quantize(config: ModelConfig, device: Device, options: PlanOptions, dtype: str) -> Components:
    """The parent and the child in `dtype`, hidden states of all calibration tokens, and one linear's work.

    GPTQ (Frantar et al., 2022, arXiv:2210.17323) visits one block at a time: calibration keeps N D numbers between two
    blocks; the block at work adds activations of one batch; its widest linear adds Hessian matrices of I x I and copies
    of its O x I weight in float32. Dense weights are freed block by block, so packed ones add one block's at a time.
    The gate's comparison comes after that work, when the child is packed: the larger of the two counts.
    """
    size = DTYPE_BYTES[dtype]
    parts = _start(device, "quantize")
    linears = block_linears(config)
    parts["weights"] = parts["parent"] = weight_bytes(config, dtype).total
    parts["packed layer"] = sum(rows * columns for rows, columns in linears) // max(1, config.num_layers)
    parts["calibration"] = options.calibration_tokens * config.hidden_size * size
    batch = min(options.calibration_batch_tokens, options.calibration_tokens)
    activations = working_set(config, tokens=batch, dtype_bytes=size, gradients=False)
    parts["activations"] = max(activations, comparison_workspace(config, dtype_bytes=size))
    if options.hessians:
        parts["hessian"] = overheads.HESSIAN_COPIES * 4 * max(columns for _, columns in linears) ** 2
    parts["workspace"] = overheads.WEIGHT_COPIES * 4 * max(rows * columns for rows, columns in linears)
    if device.kind == "cpu":
        parts["allocator"] = int(overheads.FREED_SHARE * parts["weights"])
    return parts


STAGES: dict[str, Callable[[ModelConfig, Device, PlanOptions, str], Components]] = {
    "load": predict_load,
    "inference": predict_inference,
    **{method: partial(predict_training, method=method) for method in ("lora", "qlora-8bit", "qlora-4bit", "full")},
    "merge": predict_merge,
    "quantize": predict_quantize,
}


def predict_components(
    stage: str, config: ModelConfig, device: Device, options: PlanOptions, *, stored_dtype: str | None = None
) -> Components:
    """Bytes by component at the peak of one stage.

    Args:
        stage: a name of `STAGES`.
        stored_dtype: of the checkpoint, for "auto".

    Raises:
        ConfigError: the stage is unknown.
    """
    if stage not in STAGES:
        raise ConfigError("unknown stage", got=stage, expected=", ".join(STAGES))
    return STAGES[stage](config, device, options, load_dtype(config, device, options, stored_dtype))


def _start(device: Device, kind: str) -> Components:
    if device.kind == "cuda":
        return {"runtime": overheads.RUNTIME_CUDA}
    return {"runtime": overheads.RUNTIME_CPU, "first use": overheads.FIRST_USE_CPU[kind]}


def _weights(config: ModelConfig, weight_format: str, options: PlanOptions) -> int:
    if weight_format in QUANTIZED:
        return running_bytes(config, weight_format, group_size=options.group_size)
    return weight_bytes(config, weight_format).total


def _largest_linear(config: ModelConfig) -> int:
    return max(rows * columns for rows, columns in config.linear_shapes().values())
