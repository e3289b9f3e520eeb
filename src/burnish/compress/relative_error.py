"""What a linear's outputs lose by other weights, as one number."""

from __future__ import annotations

from torch import Tensor


def relative_error(weight: Tensor, other: Tensor, hessian: Tensor | None) -> float:
    """Relative error of a linear's output over the calibration inputs: |x (W - V)'| / |x W'|, Frobenius norms.

    Args:
        weight, other: (out, in), before and after; any float dtype.
        hessian: (in, in), sum or mean of x x'; None counts every input alike (the relative error of the weight itself).

    Returns:
        0.0 for no error; 0.0 also when the layer's output is all zeros before and after.
    """
    before_OI = weight.detach().float()
    lost_OI = other.detach().float() - before_OI
    if hessian is None:
        lost, whole = lost_OI.square().sum(), before_OI.square().sum()
    else:
        hessian_II = hessian.float()
        lost = (lost_OI @ hessian_II).mul_(lost_OI).sum()
        whole = (before_OI @ hessian_II).mul_(before_OI).sum()
    if float(lost) <= 0.0:
        return 0.0
    return float((lost / whole).sqrt()) if float(whole) > 0.0 else float("inf")
