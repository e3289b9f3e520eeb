"""Moving a factor per channel out of a linear's input and into its weight, which leaves the model's function as it was.

x W' = (x / s) (W s)': the division is folded into what makes x, a norm's weight and bias or the rows of the linear
before it, and the multiplication into the columns of every linear that reads x. Nothing is added to the model.
Xiao et al., 2022, arXiv:2211.10438 and Lin et al., 2023, arXiv:2306.00978 both rest on it; which s to take is their
business (`awq`, `smoothquant`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.models.config import ModelConfig
from burnish.models.decoder import RMSNorm

# O out features, I in features of the readers, C channels of the source (fewer than I where kv heads are shared)


@dataclass(frozen=True, kw_only=True)
class ScaleSite:
    """A place in a block where channels can be scaled.

    Attributes:
        source: the norm or linear whose output is divided, by its name in the block.
        readers: every linear that reads it, by name in the block, in the order of the forward.
        repeats: query heads that share a kv head; the readers' input holds each group of `width` channels so often.
        width: channels that repeat together (a head); only read where `repeats` is above 1.
    """

    source: str
    readers: tuple[str, ...]
    repeats: int = 1
    width: int = 1

    def spread(self, scale_C: Tensor) -> Tensor:
        """One factor per input feature of the readers, (I,), from one per channel of the source."""
        if self.repeats == 1:
            return scale_C
        return scale_C.unflatten(0, (-1, 1, self.width)).expand(-1, self.repeats, -1).flatten()

    def pooled(self, value_I: Tensor) -> Tensor:
        """The mean of a figure per input feature over the features that one channel of the source becomes, (C,)."""
        if self.repeats == 1:
            return value_I
        return value_I.unflatten(0, (-1, self.repeats, self.width)).mean(dim=1).flatten()


def scale_sites(config: ModelConfig) -> list[ScaleSite]:
    """Where a block of this shape can be scaled, in the order of its forward.

    A norm whose output is also the residual stays as it is; a linear behind an activation is reached only through a
    gate or a ReLU, the activations that a positive factor passes.
    """
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    mlp = ["mlp.gate_proj", "mlp.up_proj"] if config.mlp == "gated" else ["mlp.up_proj"]
    sites = []
    if not config.residual_from_norm:
        sites.append(
            ScaleSite(source="input_layernorm", readers=tuple(attention + (mlp if config.shared_norm else [])))
        )
    sites.append(
        ScaleSite(
            source="self_attn.v_proj",
            readers=("self_attn.o_proj",),
            repeats=config.num_heads // config.num_kv_heads,
            width=config.head_dim,
        )
    )
    if not config.residual_from_norm and not config.shared_norm:
        sites.append(ScaleSite(source="post_attention_layernorm", readers=tuple(mlp)))
    if config.mlp == "gated" or config.activation == "relu":
        sites.append(ScaleSite(source="mlp.up_proj", readers=("mlp.down_proj",)))
    return sites


@torch.no_grad()
def fold_scale(block: nn.Module, site: ScaleSite, scale_C: Tensor) -> Tensor:
    """Divide the source's output by a factor per channel and make the readers expect it, in place.

    A norm's weight is rounded to its dtype, and the readers are multiplied by what the rounded weight really divides
    by, so that 16-bit norms add no error of their own.

    Args:
        scale_C: (channels of the source,), float32, positive.

    Returns:
        The factors as they came out after rounding, (channels of the source,), float32.
    """
    source = block.get_submodule(site.source)
    if isinstance(source, nn.Linear):
        source.weight.div_(scale_C.to(source.weight.dtype)[:, None])
        if source.bias is not None:
            source.bias.div_(scale_C.to(source.bias.dtype))
        scale_C = scale_C.to(source.weight.dtype).float()
    else:
        scale_C = _fold_into_norm(source, scale_C)
    scale_I = site.spread(scale_C)
    for name in site.readers:
        weight_OI = block.get_parameter(f"{name}.weight")
        weight_OI.copy_(weight_OI.float() * scale_I)
    return scale_C


def positive(value_C: Tensor) -> Tensor:
    """Magnitudes of channels to take factors from: channels that are never used count as the least used one."""
    used_C = value_C[value_C > 0]
    return value_C.clamp_min(float(used_C.min()) if used_C.numel() else 1.0)


def _fold_into_norm(norm: nn.Module, scale_C: Tensor) -> Tensor:
    """Divide a norm's weight and bias; returns the factors as they came out after rounding."""
    assert isinstance(norm, (RMSNorm, nn.LayerNorm))
    offset = norm.offset if isinstance(norm, RMSNorm) else 0.0
    before_C = norm.weight.float() + offset
    divided_C = (before_C / scale_C - offset).to(norm.weight.dtype)
    after_C = divided_C.float() + offset
    # A channel that is silent, or that rounding would silence, stays as it is.
    audible_C = (after_C != 0) & (before_C != 0)
    norm.weight.copy_(torch.where(audible_C, divided_C, norm.weight))
    real_C = torch.where(audible_C, before_C / torch.where(audible_C, after_C, 1.0), 1.0)
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        norm.bias.copy_(norm.bias.float() / real_C)
    return real_C
