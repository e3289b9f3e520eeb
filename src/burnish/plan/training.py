"""Peak memory of fine-tuning, component by component, as burnish's own loop has it.

Two ways through a block are told apart: fused (`train/fused_block.py`, compiled kernels on the CPU) and the decoder's
own forward (`activations.py`). The peak is the larger of two moments, between which heap is used again: when the first
logits exist, and when the last block goes back.
Letters: N positions of the largest micro-batch, D hidden, I intermediate, R ranks of a group of linears, O its outputs,
P parameters, A adapter parameters, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from burnish.models.config import ModelConfig
from burnish.plan import overheads
from burnish.plan.activations import loss_workspace, mask_bytes, saved_by_extras, saved_per_token, working_set
from burnish.plan.devices import Device
from burnish.plan.options import PlanOptions
from burnish.plan.weights import (
    DTYPE_BYTES,
    adapted_linears,
    adapter_parameters,
    block_linears,
    linear_groups,
    weight_bytes,
)

Components = dict[str, int]

HEAD_CHUNK_BYTES = 32 * 2**20  # logits of the fused output layer at once, in the compute dtype
HEAD_POSITIONS = 512
HEAD_STEP = 64  # labelled positions come in multiples
WIDTH_STEP, NARROW_STEP = 128, 32
"""Positions of packed rows come in multiples, of the smaller one below the larger: oneDNN builds and keeps kernels for
every new shape, which costs more time and memory than the filling."""

PADDED_STEP = 16  # the same for padded rows

TOKENS_AT_ONCE = {"cpu": 512, "cuda": 8192}
"""Most positions of a micro-batch by default. On CPUs products of more rows leave the second-level cache: with 1,024
rows they were seen to take twice as long per row (2 cores with AMX)."""

DORA_COPIES = 3  # of the widest outputs in float32
STATISTICS = 8  # bytes per position of a norm's statistics


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What the micro-batches of a run are like.

    Attributes:
        positions: N, filled up.
        labels: most learned positions of one of them.
        kinds: how many different numbers of positions there are: each has kernels of its own in the matrix library.
    """

    positions: int
    labels: int
    kinds: int


def filled(positions: int) -> int:
    """Positions of a packed micro-batch after filling up."""
    step = WIDTH_STEP if positions > WIDTH_STEP else NARROW_STEP
    return max(step, -(-positions // step) * step)


def widths(options: PlanOptions, device: Device) -> Widths:
    """The options' own where they were counted from data; otherwise of rows of all lengths up to the longest."""
    row = max(1, options.sequence_tokens - 1)
    learned = min(row, options.label_tokens or row)
    if not options.packing:
        positions = options.micro_batch_size * -(-row // PADDED_STEP) * PADDED_STEP
        kinds = -(-row // PADDED_STEP)
    else:
        most = options.micro_batch_tokens or TOKENS_AT_ONCE[device.kind]
        positions = filled(min(max(most, row), options.micro_batch_size * row))
        kinds = sum(1 for width in (32, 64, 96) if width < positions) + -(-positions // WIDTH_STEP)
    return Widths(
        positions=options.positions or positions,
        labels=options.labels or min(positions, options.micro_batch_size * learned),
        kinds=options.widths or kinds,
    )


def predict_training(
    config: ModelConfig, device: Device, options: PlanOptions, dtype: str, *, method: str
) -> Components:
    """Bytes by component at the peak of a training run.

    Weights: P in their dtype, 2 P more where float32 weights compute in 16 bits (frozen: cast; full: joined copies of
    the blocks' linears in the compute dtype, whatever it is). Joined adapters: A and a dense (O, R) per group of
    linears. Gradients 4 bytes and Adam 8 per trained number.

    Args:
        dtype: that the weights are loaded in.
        method: "lora", "qlora-8bit", "qlora-4bit" or "full".
    """
    return _Prediction(config, device, options, dtype, method).components()


def fuses(config: ModelConfig, device: Device, options: PlanOptions) -> bool:
    """Whether blocks run fused: on a CPU, packed, blocks that are put together plainly, adapters without extras."""
    plain = not (config.output_norms or config.qk_norm or config.residual_from_norm)
    plain = plain and not options.dora and not options.dropout
    return compiled(device, options) and plain and _plain_scores(config)


def compiled(device: Device, options: PlanOptions) -> bool:
    """Whether attention and the output layer run on the compiled kernels, in blocks that do not fuse too."""
    return device.kind == "cpu" and options.packing and options.fused


def _plain_scores(config: ModelConfig) -> bool:
    return config.attention_softcap is None and not config.alibi_bfloat16


class _Prediction:
    def __init__(self, config: ModelConfig, device: Device, options: PlanOptions, dtype: str, method: str) -> None:
        self.config, self.device, self.options, self.method = config, device, options, method
        self.full = method == "full"
        self.size = training_bytes(device, options, dtype)
        self.stored = 4 if self.full or (dtype == "float16" and not device.bfloat16) else DTYPE_BYTES[dtype]
        self.widths = widths(options, device)
        self.compiled, self.fused = compiled(device, options), fuses(config, device, options)
        self.dora = options.dora and not self.full
        self.rank = 0 if self.full else options.rank
        self.roles = () if self.full else options.target_modules
        self.groups = linear_groups(config)
        self.body = sum(rows * columns for rows, columns in block_linears(config))
        self.head = config.vocab_size * config.hidden_size

    def components(self) -> Components:
        config, device, options = self.config, self.device, self.options
        parts: Components = {"runtime": overheads.RUNTIME_CPU}
        if device.kind == "cuda":
            parts["runtime"] = overheads.RUNTIME_CUDA
        else:
            parts["first use"] = overheads.FIRST_USE_CPU["train"]
        parts |= self._weights()
        trained = config.num_parameters()
        if not self.full:
            trained = adapter_parameters(config, rank=options.rank, target_modules=options.target_modules)
            if self.dora:
                trained += sum(rows for rows, _ in adapted_linears(config, options.target_modules))
            parts["adapter"] = 4 * trained
            if self.fused:
                parts["joined adapters"] = self._joined_adapters()
        parts["gradients"] = overheads.GRADIENT_BYTES * trained
        parts["optimizer"] = self._optimizer(trained)
        parts["activations"] = self._kept()
        head, back = self._head_workspace(), self._backward_workspace()
        parts["logits"] = head
        if back > head:
            parts["temporaries"] = back - head
        if device.kind == "cpu":
            if self.size == 2:
                parts["matrix kernels"] = self.widths.kinds * self._kernel_bytes()
            parts["allocator"] = self._allocator(parts["activations"] + max(head, back))
        return {name: size for name, size in parts.items() if size > 0}

    # ---- what stays --------------------------------------------------------------------------------------------------

    def _weights(self) -> Components:
        config, size = self.config, self.size
        whole = config.num_parameters()
        if self.method in ("qlora-4bit", "qlora-8bit"):
            linears = block_linears(config)
            packed = weight_bytes(config, "nf4")
            four = self.method == "qlora-4bit"
            base = packed.packed + packed.scales if four else self.body + 4 * sum(rows for rows, _ in linears)
            parts = {"weights": base + (whole - self.body) * self.stored}
            if self.stored == 4 and size == 2:
                parts["cast weights"] = 2 * (whole - self.body)
            return parts
        parts = {"weights": whole * self.stored}
        if self.full and self.fused:
            parts["cast weights"] = size * self.body
        elif self.stored == 4 and size == 2:
            parts["cast weights"] = 2 * whole
        return parts

    def _ranks(self, roles: tuple[str, ...]) -> int:
        """Ranks of a group of linears: those of its members that carry an adapter."""
        chosen = self.roles
        if chosen == "all-linear":
            return self.rank * len(roles)
        chosen = (chosen,) if isinstance(chosen, str) else chosen
        return self.rank * sum(role in chosen for role in roles)

    def _joined_adapters(self) -> int:
        """A over each group's inputs, and the block-diagonal B over its outputs."""
        numbers = sum(self._ranks(roles) * (columns + rows) for roles, rows, columns in self.groups)
        return self.size * self.config.num_layers * numbers

    def _optimizer(self, trained: int) -> int:
        kind, config = self.options.optimizer, self.config
        if kind == "lion":
            # The update's directions exist for all parameters at once.
            return 8 * trained
        if kind == "adafactor":
            shapes = (
                config.linear_shapes().values() if self.full else adapted_linears(config, self.options.target_modules)
            )
            return 4 * sum(rows + columns + 2 * self.rank for rows, columns in shapes)
        return 2 * trained if kind.endswith("8bit") else overheads.ADAM_BYTES * trained

    # ---- activations -------------------------------------------------------------------------------------------------

    def _layer_per_position(self) -> float:
        """Bytes of one layer that one position leaves for the backward pass."""
        config, size = self.config, self.size
        if not self.fused:
            options = self.options
            row = options.sequence_tokens
            kept = saved_per_token(config, dtype_bytes=size, adapter_rank=self.rank, full=self.full, sequence=row)
            return kept + (0 if self.full else self._kept_by_extras())
        heads = config.num_heads * config.head_dim
        inputs = config.hidden_size * (1 if config.parallel_residual else 2)
        numbers = inputs + heads + sum(rows + self._ranks(roles) for roles, rows, _ in self.groups if _kept(roles))
        numbers += sum(self._ranks(roles) for roles, _, _ in self.groups if not _kept(roles))
        return size * numbers + 2 * STATISTICS + 4 * config.num_heads

    def _kept_by_extras(self) -> int:
        options = self.options
        return saved_by_extras(
            self.config,
            dtype_bytes=self.size,
            target_modules=options.target_modules,
            dora=self.dora,
            dropout=options.dropout,
        )

    def _kept(self) -> int:
        """From the forward to the backward pass: layers, the final norm's input, rotations and masks."""
        config, count, size = self.config, self.widths.positions, self.size
        layer = count * self._layer_per_position()
        if self.options.gradient_checkpointing:
            again = math.ceil(config.num_layers / self.options.checkpoint_every)
            kept = again * count * config.hidden_size * size + (config.num_layers - again) * layer
        else:
            kept = config.num_layers * layer
        ends = 2 * count * config.hidden_size * (4 if self.full else size)
        masks = 0
        if not (self.compiled and _plain_scores(config)):
            masks = mask_bytes(config, sequence=self.options.sequence_tokens, dtype_bytes=size)
        tables = 2 * count * config.rotary_dim * (4 + size)
        return int(kept + ends + masks + tables)

    def _head_workspace(self) -> int:
        """Logits of one chunk, the hidden states that they come from, and the output layer's cast and gradients."""
        config, size, labels = self.config, self.size, self.widths.labels
        learned = -(-labels // HEAD_STEP) * HEAD_STEP
        rows = 3 * learned * config.hidden_size * size
        gradient = 0
        if self.full:
            # The sum, one chunk's product, and the sum scaled on the way back while it still exists.
            gradient = self.head * (4 + max(4, size))
        if not self.compiled:
            return rows + gradient + loss_workspace(config, tokens=labels, dtype_bytes=size)
        cast = 2 * self.head if self.full and size == 2 else 0
        return rows + gradient + cast + self._scratch()

    def _scratch(self) -> int:
        """Of fused training, there from the first forward pass to the end: logits of one chunk or rebuilt weights."""
        size, vocabulary = self.size, self.config.vocab_size
        learned = -(-self.widths.labels // HEAD_STEP) * HEAD_STEP
        fitting = HEAD_CHUNK_BYTES // (size * vocabulary) // HEAD_STEP * HEAD_STEP
        chunk = min(learned, HEAD_POSITIONS, max(HEAD_STEP, fitting))
        return max(chunk * vocabulary * size, self._rebuilt())

    def _rebuilt(self) -> int:
        """The largest group of quantized linears in the compute dtype."""
        if self.full or self.method == "lora":
            return 0
        return overheads.REBUILT_COPIES * self.size * max(rows * columns for _, rows, columns in self.groups)

    def _backward_workspace(self) -> int:
        """The block that goes back: its own activations where they are computed again, gradients of its wider half."""
        config, size, count = self.config, self.size, self.widths.positions
        total = 0
        if self.options.gradient_checkpointing:
            total += int(count * self._layer_per_position()) + count * config.hidden_size * size
        if self.fused:
            total += self._widest_half() + self._scratch()
        else:
            total += working_set(config, tokens=count, dtype_bytes=size, gradients=True) + self._rebuilt()
            total += self._scaling() + (self._scratch() if self.compiled else 0)
        if self.full:
            # A second micro-batch's gradients of a half beside those that are kept, and the tied output layer's, which
            # wait for the embeddings' own at the very end.
            largest = max(rows * columns for _, rows, columns in self.groups)
            total += 4 * largest * 2 + size * largest
            total += 4 * self.head
        return total

    def _scaling(self) -> int:
        """DoRA: of the widest linear, its outputs and two gradients in float32, and a rebuilt weight for its norms."""
        if not self.dora:
            return 0
        linears = adapted_linears(self.config, self.options.target_modules)
        rebuilt = 0 if self.method == "lora" else 4 * max(rows * columns for rows, columns in linears)
        return 4 * DORA_COPIES * self.widths.positions * max(rows for rows, _ in linears) + rebuilt

    def _widest_half(self) -> int:
        """Gradients alive in the half that needs most: its output's twice, and those around its first linears."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        halves = []
        for roles, rows, _ in self.groups:
            if _kept(roles):
                first = rows + self._ranks(roles)
                inner_width = inner if "up_proj" in roles else config.num_heads * config.head_dim
                halves.append(3 * hidden + first + inner_width)
        return self.size * self.widths.positions * max(halves)

    # ---- the machine -------------------------------------------------------------------------------------------------

    def _kernel_bytes(self) -> int:
        """Compiled matrix products of one width: forward 2 and backward 4 per group, and the output layer's 2."""
        products = 2 if self.full else 6
        count = products * len(self.groups) + 2
        widest = max(columns for _, _, columns in self.groups)
        return int(count * (overheads.KERNEL_BYTES + overheads.KERNEL_BYTES_PER_INPUT * widest))

    def _allocator(self, kept: int) -> int:
        if self.fused:
            return int(overheads.ALLOCATOR_SHARE[self.size] * kept)
        if self.compiled and not self.full:
            return int(overheads.ALLOCATOR_SHARE_UNFUSED["dense" if self.method == "lora" else "quantized"] * kept)
        layer = self.widths.positions * self._layer_per_position()
        return min(overheads.ALLOCATOR_LIMIT, int(overheads.ALLOCATOR_LAYERS * layer))


def training_bytes(device: Device, options: PlanOptions, dtype: str = "float32") -> int:
    """Bytes of the compute dtype: weights in bfloat16 compute so, others as the device likes it best."""
    if options.precision == "auto":
        return 2 if device.bfloat16 or dtype == "bfloat16" else 4
    return 2 if options.precision == "bfloat16" else 4


def _kept(roles: tuple[str, ...]) -> bool:
    """Whether a group's outputs are kept: the first linears of each half."""
    return "q_proj" in roles or "up_proj" in roles
