"""Structured pruning: heads, MLP channels and whole blocks are removed, and a smaller dense decoder is left.

Heads and channels go by the norm of what they add to the residual over the calibration tokens; those that stay are
fitted by least squares to the output that all of them gave. Blocks go by their influence, 1 - cosine of a block's input
and output (Men et al., 2024, arXiv:2403.03853). How the smaller shape is written is in `smaller_config`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from burnish.compress.calibration import BlockWalk, TokenBatch, block_linears
from burnish.compress.prune_config import PruneConfig
from burnish.compress.pruning import (
    OnPruned,
    PruneProgress,
    PruneResult,
    calibration_batches,
    check_dense,
    count_tokens,
)
from burnish.compress.quantized_weight import check_weight
from burnish.compress.relative_error import relative_error
from burnish.compress.smaller_config import smaller_config, without_layers
from burnish.compress.sparsity_masks import feature_energy, share_of
from burnish.errors import CompressionError, ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

# O out features, I in features, K kept in features, U units (key-value heads or channels)

OUT, DOWN = "self_attn.o_proj", "mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Indices (int64) of what a block keeps: query features, key-value features, MLP channels."""

    query: Tensor
    key: Tensor
    channels: Tensor


@torch.no_grad()
def prune_structured(
    model: Decoder, examples: Sequence[Sequence[int]], config: PruneConfig, *, on_layer: OnPruned | None = None
) -> tuple[Decoder, PruneResult]:
    """Make a smaller dense decoder.

    Blocks are removed first, by what they do in the whole model. Then the others are visited one after another, each
    seeing what the smaller ones before it give. With nothing to remove the result equals the model.

    Args:
        model: the parent; not usable afterwards, as its weights are changed and taken over.
        examples: calibration token ids.
        config: of method "structured".
        on_layer: called after each removed block and each linear that lost inputs.

    Raises:
        ConfigError: the shape that would be left cannot be written, or nothing would be left.
        DataError: no calibration tokens, or ids outside the vocabulary.
        CompressionError: NaN or infinite weights or activations (names the layer).
    """
    if not config.is_structured:
        raise ConfigError(f"{config.method} does not remove parts", remedy="Call prune_model.")
    batches = calibration_batches(model, examples, config)
    check_dense(model)
    shape = model.config
    heads = shape.num_kv_heads - share_of(shape.num_kv_heads, config.heads)
    channels = shape.intermediate_size - share_of(shape.intermediate_size, config.channels)
    if config.layers >= shape.num_layers:
        raise ConfigError("no layer would be left", got=config.layers, expected=f"at most {shape.num_layers - 1}")
    # Before the work: a shape that has no config.json is refused now, whichever layers go.
    smaller_config(shape, num_kv_heads=heads, channels=channels, removed=tuple(range(config.layers)))
    progress = PruneProgress(on_layer)
    before = _block_weights(shape)
    model.eval()
    removed: tuple[int, ...] = ()
    if config.layers:
        influence = block_influence(model, batches)
        removed = tuple(sorted(sorted(range(len(influence)), key=influence.__getitem__)[: config.layers]))
        for layer in removed:
            progress.report(f"model.layers.{layer}", error=influence[layer], sparsity=1.0)
    smaller = smaller_config(shape, num_kv_heads=heads, channels=channels, removed=removed)
    model = _remove_layers(model, removed)
    numbers = [layer for layer in range(shape.num_layers) if layer not in removed]
    kept: list[_Kept] = []
    if heads < shape.num_kv_heads or channels < shape.intermediate_size:
        walk = BlockWalk(model, batches)
        for layer, block in enumerate(model.model.layers):
            kept.append(
                _thin_block(walk, layer, block, shape, heads, channels, config, progress, number=numbers[layer])
            )
            walk.advance(layer, block)
    child = _cut(model, smaller, kept)
    return child, PruneResult(
        config=config,
        layers=tuple(progress.layers),
        sparsity=1.0 - _block_weights(smaller) / before,
        num_weights=before,
        calibration_tokens=count_tokens(batches),
        seconds=time.perf_counter() - progress.started,
    )


@torch.no_grad()
def block_influence(model: Decoder, batches: Sequence[TokenBatch]) -> list[float]:
    """1 - mean cosine of each block's input and output over the real tokens, 0 for a block that changes nothing.

    Raises:
        CompressionError: a block's activations are NaN or infinite.
    """
    blocks = list(model.model.layers)
    sums = [0.0] * len(blocks)
    real_BT = torch.zeros(0)

    def note(layer: int, _: nn.Module, args: tuple[Tensor, ...], after_BTD: Tensor) -> None:
        cosine_BT = torch.cosine_similarity(args[0].float(), after_BTD.float(), dim=-1)
        sums[layer] += float(cosine_BT[real_BT].double().sum())

    hooks = [block.register_forward_hook(partial(note, layer)) for layer, block in enumerate(blocks)]
    try:
        for batch in batches:
            real_BT = batch.real_BT.to(model.device)
            model.hidden(batch.tokens_BT.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    for layer, total in enumerate(sums):
        if total != total:  # NaN
            raise CompressionError(
                f"the activations of model.layers.{layer} are NaN or infinite", remedy="The parent model is damaged."
            )
    return [1.0 - total / count_tokens(batches) for total in sums]


def fit_remaining(weight: Tensor, hessian: Tensor, kept: Tensor, *, damping: float) -> Tensor:
    """The weight with all but some inputs zero, those fitted to give what all of them gave over the calibration tokens.

    Least squares with a ridge towards the weights as they were: W_K + W_R H_RK (H_KK + ridge)^-1.

    Args:
        weight: (out, in).
        hessian: (in, in), mean of x x'.
        kept: (K,) int64, the inputs that stay.
        damping: ridge, as a share of the mean diagonal.

    Returns:
        (out, in), float32.
    """
    weight_OI, hessian_II = weight.detach().float(), hessian.double()
    gone_I = torch.ones(hessian_II.shape[0], dtype=torch.bool, device=weight.device)
    gone_I[kept] = False
    inner_KK = hessian_II[kept][:, kept]
    ridge = damping * float(hessian_II.diagonal().mean())
    inner_KK.diagonal().add_(ridge if ridge > 0 else 1.0)
    cross_KO = hessian_II[kept][:, gone_I] @ weight_OI[:, gone_I].double().t()
    fitted_OI = torch.zeros_like(weight_OI)
    fitted_OI[:, kept] = weight_OI[:, kept] + torch.linalg.solve(inner_KK, cross_KO).t().float()
    return fitted_OI


def _thin_block(
    walk: BlockWalk,
    layer: int,
    block: nn.Module,
    shape: ModelConfig,
    heads: int,
    channels: int,
    config: PruneConfig,
    progress: PruneProgress,
    *,
    number: int,
) -> _Kept:
    """Choose what a block keeps; the inputs of its output linears that go become zero, the others make up for them."""
    linears = block_linears(block)
    group = shape.num_heads // shape.num_kv_heads * shape.head_dim
    kept_heads = torch.arange(shape.num_kv_heads)
    kept_channels = torch.arange(shape.intermediate_size)
    for names in walk.input_groups(layer, block):
        wanted, width = (heads, group) if OUT in names else (channels, 1)
        for name in names:
            linear = linears[name]
            check_weight(linear.weight, f"model.layers.{number}.{name}")
            if name not in (OUT, DOWN) or wanted * width == linear.in_features:
                continue
            hessian_II = walk.hessian(layer, block, name)
            feature_energy(hessian_II, f"model.layers.{number}.{name}")
            norms_U = unit_norms(linear.weight, hessian_II, width=width)
            units_U = torch.sort(torch.sort(norms_U, descending=True, stable=True).indices[:wanted]).values
            columns_K = _features(units_U, width).to(linear.weight.device)
            fitted_OI = fit_remaining(linear.weight, hessian_II, columns_K, damping=config.damping)
            progress.report(
                f"model.layers.{number}.{name}",
                error=relative_error(linear.weight, fitted_OI, hessian_II),
                sparsity=1.0 - len(columns_K) / linear.in_features,
            )
            linear.weight.copy_(fitted_OI)
            if name == OUT:
                kept_heads = units_U.cpu()
            else:
                kept_channels = units_U.cpu()
    return _Kept(query=_features(kept_heads, group), key=_features(kept_heads, shape.head_dim), channels=kept_channels)


def unit_norms(weight: Tensor, hessian: Tensor, *, width: int) -> Tensor:
    """Root mean square of what each `width` consecutive inputs add to the output: (in / width,), float32."""
    weight_OI, hessian_II = weight.detach().float(), hessian.float()
    if width == 1:
        return weight_OI.norm(dim=0) * hessian_II.diagonal().clamp_min(0.0).sqrt()
    powers = []
    for start in range(0, weight_OI.shape[1], width):
        unit = slice(start, start + width)
        powers.append((weight_OI[:, unit] @ hessian_II[unit, unit]).mul_(weight_OI[:, unit]).sum())
    return torch.stack(powers).clamp_min(0.0).sqrt()


def _features(units_U: Tensor, width: int) -> Tensor:
    """Indices of all features of units that have `width` of them each."""
    return (units_U[:, None] * width + torch.arange(width, device=units_U.device)).flatten()


def _block_weights(shape: ModelConfig) -> int:
    return sum(rows * columns for name, (rows, columns) in shape.linear_shapes().items() if name != "lm_head")


def _remove_layers(model: Decoder, removed: tuple[int, ...]) -> Decoder:
    """A decoder over the blocks that stay, its parameters those of the model."""
    if not removed:
        return model
    state = model.state_dict()
    fewer = Decoder(without_layers(model.config, removed), device="meta", dtype=model.dtype)
    stay = [layer for layer in range(model.config.num_layers) if layer not in removed]
    return _with_state(fewer, {name: state[_renumbered(name, stay)] for name in fewer.state_dict()})


def _renumbered(name: str, stay: Sequence[int]) -> str:
    """Where the parameter of the smaller model stands in the parent."""
    prefix = "model.layers."
    if not name.startswith(prefix):
        return name
    layer, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{stay[int(layer)]}.{rest}"


def _cut(model: Decoder, smaller: ModelConfig, kept: Sequence[_Kept]) -> Decoder:
    """The decoder of the smaller shape, its parameters cut out of the model's."""
    child = Decoder(smaller, device="meta", dtype=model.dtype)
    state = model.state_dict()
    for layer, keeps in enumerate(kept):
        prefix = f"model.layers.{layer}."
        rows = {"q_proj": keeps.query, "k_proj": keeps.key, "v_proj": keeps.key}
        rows |= {"gate_proj": keeps.channels, "up_proj": keeps.channels}
        columns = {"o_proj": keeps.query, "down_proj": keeps.channels}
        for name in [name for name in state if name.startswith(prefix)]:
            role, what = name.split(".")[-2:]
            value = state[name]
            if role in rows:
                state[name] = value[rows[role].to(value.device)]
            elif role in columns and what == "weight":
                state[name] = value[:, columns[role].to(value.device)].contiguous()
    return _with_state(child, state)


def _with_state(decoder: Decoder, state: dict[str, Tensor]) -> Decoder:
    decoder.load_state_dict(state, assign=True)
    return decoder.eval()
