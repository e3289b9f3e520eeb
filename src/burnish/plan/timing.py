"""How long a stage takes at least, by the roofline: the slower of its arithmetic and its memory traffic.

Williams et al., 2009, "Roofline: an insightful visual performance model". What programs reach of the peaks differs, so
the bounds are divided by two named efficiencies; they are estimates for planning, not promises.
"""

from __future__ import annotations

from dataclasses import dataclass

from burnish.models.config import ModelConfig
from burnish.plan.devices import Device
from burnish.plan.options import PlanOptions
from burnish.plan.weights import block_linears, kv_bytes

COMPUTE_EFFICIENCY = 0.5  # of the peak rate, in large matrix products
BANDWIDTH_EFFICIENCY = 0.7  # of the peak bandwidth, reading weights


@dataclass(frozen=True, kw_only=True)
class GenerationTime:
    """Estimates for one batch of requests: all prompts, then one step per token.

    Attributes:
        ttft_ms: first token of all requests, when they come together.
        tpot_ms: between two tokens of one request.
        output_tokens_per_s: over all requests, prompts included in the time.
        seconds: the whole batch.
    """

    ttft_ms: float
    tpot_ms: float
    output_tokens_per_s: float
    seconds: float


def generation_time(
    config: ModelConfig, device: Device, options: PlanOptions, *, dtype: str, weights: int
) -> GenerationTime | None:
    """Time of `options.concurrency` requests; None where the device's rates are unknown.

    Prompts are bound by arithmetic: 2 operations per weight and token, and attention. A decode step reads all weights
    and all keys and values once, or computes 2 operations per weight and sequence, whichever is slower.

    Args:
        weights: bytes of the weights as they are read.
    """
    rate, bandwidth = device.rate(dtype), device.bandwidth
    if rate is None or bandwidth is None:
        return None
    rate, bandwidth = rate * COMPUTE_EFFICIENCY, bandwidth * BANDWIDTH_EFFICIENCY
    batch, prompt, answer = options.concurrency, options.input_tokens, options.output_tokens
    body = sum(rows * columns for rows, columns in block_linears(config))
    head = config.vocab_size * config.hidden_size
    arithmetic = 2 * batch * (prompt * body + head) + _attention_operations(config, rows=batch, sequence=prompt)
    prefill = max(arithmetic / rate, weights / bandwidth)
    element = 4 if dtype == "float32" else 2
    cached = batch * kv_bytes(config, tokens=prompt + answer // 2, bytes_per_element=element)
    step = max((weights + cached) / bandwidth, 2 * batch * (body + head) / rate)
    seconds = prefill + (answer - 1) * step
    return GenerationTime(
        ttft_ms=1e3 * prefill,
        tpot_ms=1e3 * step,
        output_tokens_per_s=batch * answer / seconds,
        seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOperations:
    """What forward and backward cost: operations per token, per learned token, and per squared length of a row."""

    per_token: float
    per_label: float
    per_square: float

    def of(self, *, tokens: float, label_tokens: float, squared_lengths: float) -> float:
        """Operations of rows with so many tokens, learned tokens and this sum of their lengths squared."""
        return self.per_token * tokens + self.per_label * label_tokens + self.per_square * squared_lengths


def training_operations(
    config: ModelConfig,
    *,
    trained: int,
    adapter: int = 0,
    head_trained: bool = False,
    recomputed: float = 0.0,
) -> TrainingOperations:
    """Operations of training, a multiply-add counted as two.

    Per weight of the blocks' linears and token: 2 forward, 2 for the gradient of the input, 2 more for its own gradient
    where it is trained, 2 more where its block is computed again (Kaplan et al., 2020, arXiv:2001.08361, section 2.1,
    counts the first 6). The output layer computes learned tokens only. Attention costs its forward three times, and
    once more where it is computed again. Norms, activations and embeddings are left out.

    Args:
        trained: weights of the blocks' linears that are trained themselves.
        adapter: weights of adapters beside them, all trained.
        head_trained: the output layer is trained (also as a tied embedding).
        recomputed: share of the blocks that the backward pass computes again, 0..1.
    """
    body = sum(rows * columns for rows, columns in block_linears(config))
    head = config.vocab_size * config.hidden_size
    return TrainingOperations(
        per_token=2 * ((2 + recomputed) * body + trained + (3 + recomputed) * adapter),
        per_label=2 * (3 if head_trained else 2) * head,
        per_square=(3 + recomputed) * _attention_operations(config, rows=1, sequence=1),
    )


def training_seconds(
    config: ModelConfig, device: Device, options: PlanOptions, *, dtype: str, full: bool
) -> float | None:
    """Time of `options.train_tokens` tokens, as `training_operations` counts; None without that number or the rate."""
    rate = device.rate(dtype)
    if rate is None or options.train_tokens is None:
        return None
    operations = training_operations(
        config,
        trained=sum(rows * columns for rows, columns in block_linears(config)) if full else 0,
        head_trained=full,
        recomputed=1.0 / options.checkpoint_every if options.gradient_checkpointing else 0.0,
    )
    length = options.sequence_tokens
    learned = min(length, options.label_tokens or length) / length
    total = operations.of(
        tokens=options.train_tokens,
        label_tokens=options.train_tokens * learned,
        squared_lengths=options.train_tokens * length,
    )
    return total / (rate * COMPUTE_EFFICIENCY)


def quantization_seconds(config: ModelConfig, device: Device, options: PlanOptions) -> float | None:
    """Time of GPTQ in float32; None where the device's rate is unknown.

    The calibration forward three times, 2 I^2 operations per token for each Hessian, and I^3 + 2 O I^2 per linear.
    """
    if device.fp32 is None:
        return None
    linears = block_linears(config)
    tokens = options.calibration_tokens
    forward = 2 * tokens * sum(rows * columns for rows, columns in linears)
    hessians = 2 * tokens * sum(columns**2 for _, columns in linears)
    solving = sum(columns**3 + 2 * rows * columns**2 for rows, columns in linears)
    return (3 * forward + hessians + solving) / (device.fp32 * COMPUTE_EFFICIENCY)


def _attention_operations(config: ModelConfig, *, rows: float, sequence: int) -> float:
    """Scores and their product with the values over the causal half: 2 x T^2 x H E per layer and row."""
    return 2 * rows * sequence**2 * config.num_heads * config.head_dim * config.num_layers
