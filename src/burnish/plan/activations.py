"""What a forward and a backward pass keep in memory beside the weights, counted from the decoder's equations.

Counted is what autograd saves in burnish's own decoder and adapters; other trainers keep more, having fused less.
Letters: N tokens, D hidden, I intermediate, H query heads, K kv heads, E head dim, V vocabulary, L layers.
"""

from __future__ import annotations

from burnish.models.config import ModelConfig
from burnish.plan.weights import adapted_linears, block_linears

LOGITS_CHUNK_BYTES = 64 * 2**20  # float32 logits that the loss computes at once
LOGITS_MIN_POSITIONS = 64
LOGITS_COPIES = 2  # the chunk itself and its gradient
COMPARED_TOKENS = 2048  # tokens per forward when a child is compared with its parent
COMPARED_POSITIONS = 128  # of those, positions whose logits exist at once
COMPARED_COPIES = 5  # float32 (positions, V): both sides' logits and log-probabilities, and their difference
SOFTCAP_SCORE_BYTES = 8  # per query, key and head where scores are bounded, which no fused kernel does


def saved_per_token(config: ModelConfig, *, dtype_bytes: int, adapter_rank: int, full: bool, sequence: int) -> float:
    """Bytes that one token leaves for the backward pass in one layer.

    Norms: their inputs, D each (in float32 for RMS norms of a 16-bit stream), and with trained weights (`full`) the
    normalised values too. Attention: the normed input D, queries H E, keys and values 2 K E, output H E, and a float32
    number per head. MLP: the normed input D, and 4 I with a gate (gate, its activation, up, product) or 2 I without.
    Adapters: `adapter_rank` numbers per linear in 16 bits; in float32 they are folded into the weight instead.

    Args:
        sequence: tokens of the longest sequence; matters only where scores are not fused.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm_inputs = hidden * ((1 if config.shared_norm else 2) + (2 if config.output_norms else 0))
    norm_inputs += query + key if config.qk_norm else 0
    norm_bytes = 4 if config.norm == "rmsnorm" else dtype_bytes
    if full and config.norm == "rmsnorm":
        norm_bytes += dtype_bytes
    linear_inputs = hidden * (1 if config.shared_norm else 2)
    attention = 2 * query + 2 * key
    mlp = (4 if config.mlp == "gated" else 2) * inner
    adapters = adapter_rank * len(block_linears(config)) // max(1, config.num_layers) if dtype_bytes < 4 else 0
    scores = 4 * config.num_heads
    if config.attention_softcap is not None:
        scores += SOFTCAP_SCORE_BYTES * config.num_heads * sequence
    return norm_inputs * norm_bytes + (linear_inputs + attention + mlp + adapters) * dtype_bytes + scores


def saved_by_extras(
    config: ModelConfig, *, dtype_bytes: int, target_modules: str | tuple[str, ...], dora: bool, dropout: bool
) -> int:
    """Bytes that adapters with DoRA or dropout keep per token and layer beyond `saved_per_token`.

    DoRA: each adapted linear's outputs before they are scaled, O. Dropout: each one's own thinned inputs, I, and
    as much of mask; inputs that linears share are then kept by none, if all linears are adapted.
    """
    layers = max(1, config.num_layers)
    linears = adapted_linears(config, target_modules)
    total = dtype_bytes * sum(rows for rows, _ in linears) // layers if dora else 0
    if dropout:
        total += 2 * dtype_bytes * sum(columns for _, columns in linears) // layers
        if len(linears) >= len(block_linears(config)):
            shared = config.hidden_size * (1 if config.shared_norm else 2) + config.intermediate_size
            total -= dtype_bytes * shared
    return total


def mask_bytes(config: ModelConfig, *, sequence: int, dtype_bytes: int) -> int:
    """The attention mask that all layers share: (H, T, T) numbers with ALiBi, (T, T) with a window, else none.

    It is there twice: as it was made and as the fused kernel wants it.
    """
    if config.position == "alibi":
        return 2 * config.num_heads * sequence**2 * dtype_bytes
    windowed = any((config.window(layer) or sequence) < sequence for layer in range(config.num_layers))
    return sequence**2 * (1 + dtype_bytes) if windowed or config.attention_softcap is not None else 0


def saved_activations(
    config: ModelConfig,
    *,
    rows: int,
    sequence: int,
    dtype_bytes: int,
    adapter_rank: int,
    full: bool,
    checkpointing: bool,
) -> int:
    """Bytes kept from the forward to the backward pass for `rows` sequences of `sequence` tokens.

    With checkpointing, a block's input (D) per layer and everything of the one block that is being computed again.
    """
    tokens = rows * sequence
    layer = tokens * saved_per_token(
        config, dtype_bytes=dtype_bytes, adapter_rank=adapter_rank, full=full, sequence=sequence
    )
    if checkpointing:
        kept = config.num_layers * tokens * config.hidden_size * dtype_bytes + layer
    else:
        kept = config.num_layers * layer
    ends = 2 * tokens * config.hidden_size * dtype_bytes  # the final norm's input and the gradient that waits for it
    return int(kept + ends + mask_bytes(config, sequence=sequence, dtype_bytes=dtype_bytes))


def working_set(config: ModelConfig, *, tokens: int, dtype_bytes: int, gradients: bool) -> int:
    """Temporaries of the layer that is being computed, for `tokens` tokens.

    Forward: residual and block output (2 D) beside the wider of attention (H E + 2 K E, twice while they rotate) and
    MLP (2 I, or 3 I with a gate). Backward: as many gradients again as the MLP has tensors.
    """
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = (3 if config.mlp == "gated" else 2) * config.intermediate_size
    return tokens * dtype_bytes * (2 * config.hidden_size + max(2 * (query + 2 * key), mlp) * (2 if gradients else 1))


def loss_workspace(config: ModelConfig, *, tokens: int, dtype_bytes: int) -> int:
    """Logits of one chunk of positions and their gradient in float32, and the chunk in the compute dtype."""
    positions = min(tokens, max(LOGITS_MIN_POSITIONS, LOGITS_CHUNK_BYTES // (4 * config.vocab_size)))
    per_position = 4 * LOGITS_COPIES + (dtype_bytes if dtype_bytes != 4 else 0)
    return positions * config.vocab_size * per_position


def comparison_workspace(config: ModelConfig, *, dtype_bytes: int) -> int:
    """What comparing two models over held-out text needs beside their weights."""
    logits = 4 * COMPARED_COPIES * COMPARED_POSITIONS * config.vocab_size
    return logits + working_set(config, tokens=COMPARED_TOKENS, dtype_bytes=dtype_bytes, gradients=False)
