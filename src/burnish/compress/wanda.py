"""Wanda: weights times what they are multiplied by, compared within each output. Sun et al., 2023, arXiv:2306.11695."""

from __future__ import annotations

from torch import Tensor

from burnish.compress.sparsity_masks import feature_energy, lowest_in_rows, lowest_in_runs

# O out features, I in features


def wanda_mask(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None,
    pattern: tuple[int, int] | None = None,
    name: str = "weight",
) -> Tensor:
    """The weights of lowest |weight| * norm of the input feature, the same share of every row.

    Args:
        weight: (out_features, in_features), any float dtype.
        hessian: (in_features, in_features), mean of x x' over calibration tokens.
        sparsity: share of each row, to a whole number of weights; exact over all rows.
        pattern: (n, m) instead of it.
        name: the layer, for messages.

    Returns:
        (out, in), True where a weight is to become zero.

    Raises:
        CompressionError: NaN or infinite activations.
    """
    scores_OI = weight.detach().float().abs() * feature_energy(hessian, name).sqrt()
    if pattern is not None:
        return lowest_in_runs(scores_OI, pattern)
    assert sparsity is not None
    return lowest_in_rows(scores_OI, sparsity)
