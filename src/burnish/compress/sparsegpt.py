"""SparseGPT: columns are pruned one after another, and those that follow make up for what each one lost.

Frantar and Alistarh, 2023, arXiv:2301.00774, Algorithm 1. The inverse Hessian's factor is the one that `gptq` uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.compress.gptq import inverse_factor
from burnish.compress.quantized_weight import check_weight
from burnish.compress.sparsity_masks import lowest, lowest_in_runs, share_of
from burnish.errors import CompressionError

# O out features, I in features, B columns of one block


def prune_weight(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    factor: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """Prune one linear weight.

    A weight's score is what its loss costs once the columns after it have made up for what they can. Input features
    that calibration never excited cost nothing and go first.

    Args:
        weight: (out_features, in_features), any float dtype; not modified.
        hessian: (in_features, in_features), sum or mean of x x' over calibration tokens; not modified.
        sparsity: share of the weights, to the nearest whole number, shared out evenly among blocks of columns.
        pattern: (n, m) instead of it: n of every m consecutive columns are kept, the ragged end is.
        damping: share of the mean diagonal added to the diagonal.
        block_size: columns among which a mask is chosen, and between two updates of all the rest.
        factor: `inverse_factor` of this Hessian, where other linears share it; its damping counts then.
        name: the layer, for messages.

    Returns:
        (out, in), float32.

    Raises:
        CompressionError: NaN or infinite weights or Hessian, shapes that do not fit, a Hessian that is not positive
            definite after damping.
    """
    check_weight(weight, name)
    out_features, in_features = weight.shape
    if hessian.shape != (in_features, in_features):
        raise CompressionError(
            f"the Hessian of {name} does not fit", got=tuple(hessian.shape), expected=(in_features, in_features)
        )
    factor_II = inverse_factor(hessian, damping=damping, name=name) if factor is None else factor
    cost_I = factor_II.diagonal().square().reciprocal()
    cost_I[hessian.diagonal() <= 0] = 0.0
    # Columns as rows, so that each one is contiguous.
    weight_IO = weight.detach().float().t().clone(memory_format=torch.contiguous_format)
    step = block_size if pattern is None else max(pattern[1], block_size // pattern[1] * pattern[1])
    num_pruned = 0
    for start in range(0, in_features, step):
        end = min(start + step, in_features)
        block_BO, factor_BB = weight_IO[start:end], factor_II[start:end, start:end]
        mask_BO = torch.zeros(block_BO.shape, dtype=torch.bool, device=block_BO.device)
        if pattern is None:
            assert sparsity is not None
            wanted = share_of(end * out_features, sparsity) - num_pruned
            mask_BO = lowest(block_BO.square() * cost_I[start:end, None], wanted)
            num_pruned += wanted
        errors_BO = torch.empty_like(block_BO)
        for column, pivot in enumerate(factor_BB.diagonal().tolist()):
            if pattern is not None and column % pattern[1] == 0:
                run = slice(column, column + pattern[1])
                scores_MO = block_BO[run].square() * cost_I[start:end][run, None]
                mask_BO[run] = lowest_in_runs(scores_MO.t(), pattern).t()
            errors_BO[column] = block_BO[column].where(mask_BO[column], 0.0).div_(pivot)
            block_BO[column].masked_fill_(mask_BO[column], 0.0)
            if column + 1 < len(block_BO):
                block_BO[column + 1 :].addr_(factor_BB[column, column + 1 :], errors_BO[column], alpha=-1.0)
        if end < in_features:
            weight_IO[end:].addmm_(factor_II[start:end, end:].t(), errors_BO, alpha=-1.0)
    return weight_IO.t().contiguous()
