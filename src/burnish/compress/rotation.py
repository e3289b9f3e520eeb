"""Rotating the residual stream and the attention's heads before rounding, so that no channel stands out.

Ashkboos et al., 2024, arXiv:2404.00456, the part that folds into the weights: the computation stays as it was and
nothing runs online. With an orthogonal Q, an RMSNorm without weights gives norm(x Q) = norm(x) Q; so its weight moves
into the linears behind it, what writes into the residual is multiplied by Q and what reads from it by Q'. Inside the
attention the values of each head are rotated by R and the output projection takes it back.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from burnish.compress.quantized_weight import check_weight
from burnish.errors import CompressionError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Block, Decoder, RMSNorm

# D hidden, E head dim, O out features, I in features, V vocabulary


def check_rotation(config: ModelConfig) -> None:
    """Refuse what cannot be rotated without changing its function.

    Raises:
        CompressionError: norms that centre, or norms on what joins the residual.
    """
    for reason, applies in (
        ("its norms subtract the mean", config.norm != "rmsnorm"),
        ("it norms what its layers add to the residual", config.output_norms or config.residual_from_norm),
        ("it norms its embeddings", config.embedding_norm),
    ):
        if applies:
            raise CompressionError(
                f"the residual of a {config.family} model cannot be rotated: {reason}", remedy="Leave the rotation out."
            )


@torch.no_grad()
def rotate_model(model: Decoder, *, seed: int = 0) -> None:
    """Rotate a dense decoder in place; its logits stay the same up to rounding in its dtype.

    A tied output layer becomes one of its own, because the last norm's weight moves into it: the embeddings count twice
    afterwards, and `model.config` says so.

    Args:
        seed: of the random signs, and of the factor that is no power of two.

    Raises:
        CompressionError: as `check_rotation`; NaN or infinite weights, which would spread (names the layer).
    """
    config = model.config
    check_rotation(config)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            check_weight(module.weight, name)
    generator = torch.Generator().manual_seed(seed)
    rotation_DD = random_rotation(config.hidden_size, generator).to(model.device)
    trunk = model.model
    head = model.lm_head
    if head is None:
        embedding = trunk.embed_tokens.weight
        rows, width = embedding.shape
        head = nn.Linear(width, rows, bias=False, device=embedding.device, dtype=embedding.dtype)
        head.weight.copy_(embedding)
        head.weight.requires_grad_(embedding.requires_grad)
        model.lm_head = head.train(model.training)
        model.config = replace(config, tie_word_embeddings=False)
    _absorb(trunk.norm, [head])
    _rotate_inputs([head], rotation_DD)
    embeddings = [trunk.embed_tokens] + ([] if trunk.embed_positions is None else [trunk.embed_positions])
    for embedding in embeddings:
        embedding.weight.copy_(embedding.weight.float() @ rotation_DD)
    for block in trunk.layers:
        assert isinstance(block, Block)
        _rotate_block(block, rotation_DD, random_rotation(config.head_dim, generator).to(model.device))


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix whose entries are as even as the width allows: (width, width), float32.

    Random signs times a Hadamard matrix of the width's largest power of two; the odd rest is a random rotation of its
    own.
    """
    power = width & -width
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < power:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    odd, _ = torch.linalg.qr(torch.randn(width // power, width // power, generator=generator, dtype=torch.float64))
    signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1.0
    return signs[:, None] * torch.kron(odd.float().contiguous(), hadamard * power**-0.5)


def _rotate_block(block: Block, rotation_DD: Tensor, heads_EE: Tensor) -> None:
    attention, mlp = block.self_attn, block.mlp
    attention_readers = [attention.q_proj, attention.k_proj, attention.v_proj]
    mlp_readers = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
    if block.post_attention_layernorm is None:
        _absorb(block.input_layernorm, attention_readers + mlp_readers)
    else:
        _absorb(block.input_layernorm, attention_readers)
        _absorb(block.post_attention_layernorm, mlp_readers)
    _rotate_inputs(attention_readers + mlp_readers, rotation_DD)
    for writer in (attention.o_proj, mlp.down_proj):
        _rotate_outputs(writer, rotation_DD)
    _rotate_outputs(attention.v_proj, heads_EE)
    _rotate_inputs([attention.o_proj], heads_EE)


def _absorb(norm: nn.Module, readers: list[nn.Linear]) -> None:
    """Move an RMSNorm's weight into the linears behind it."""
    assert isinstance(norm, RMSNorm)
    scale_I = norm.weight.float() + norm.offset
    for linear in readers:
        linear.weight.copy_(linear.weight.float() * scale_I)
    norm.weight.fill_(1.0 - norm.offset)


def _rotate_inputs(linears: list[nn.Linear], rotation: Tensor) -> None:
    """Expect inputs that are rotated, whole or in pieces of the rotation's width."""
    for linear in linears:
        pieces = linear.weight.float().unflatten(1, (-1, rotation.shape[0]))
        linear.weight.copy_((pieces @ rotation).flatten(1))


def _rotate_outputs(linear: nn.Linear, rotation: Tensor) -> None:
    """Give outputs rotated, whole or in pieces of the rotation's width."""
    pieces = linear.weight.float().unflatten(0, (-1, rotation.shape[0]))
    linear.weight.copy_((rotation.t() @ pieces).flatten(0, 1))
    if linear.bias is not None:
        linear.bias.copy_((linear.bias.float().unflatten(0, (-1, rotation.shape[0])) @ rotation).flatten())
