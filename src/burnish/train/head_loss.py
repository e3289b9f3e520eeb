"""The output layer and its cross-entropy in one, over a dense weight: logits become their own gradient, in place.

One chunk of labelled positions at a time has logits, in the compute dtype and once; `losses.py` has the general way,
for output layers that carry an adapter or are quantized.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.kernels.cpu.training import TrainingKernels
from burnish.train.linear_group import WeightScratch
from burnish.train.losses import IGNORED_LABEL, MIN_CHUNK, ROW_STEP, select_labelled

# N labelled positions, C positions of one chunk, D hidden, V vocabulary

CHUNK_BYTES = 32 * 2**20
MOST_POSITIONS = 512


def head_cross_entropy(
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    softcap: float | None,
    kernels: TrainingKernels,
    scratch: WeightScratch | None = None,
) -> Tensor:
    """Sum of the cross-entropy over labelled positions, in nats, as a float32 scalar.

    Args:
        hidden_BTD: final hidden states, any float dtype.
        labels_BT: label of each position (already shifted), `IGNORED_LABEL` where there is none.
        weight_VD: the output layer's; gets a gradient if it requires one, and so does `bias_V`.
        softcap: logits are c * tanh(x / c); None without.
        scratch: memory for the logits, the same ones from call to call: as blocks of their own they were seen to take
            another place in the heap now and then, and up to 90 MiB more. None is fresh memory.
    """
    hidden_ND, labels_N = select_labelled(hidden_BTD, labels_BT)
    kind = hidden_BTD.device.type
    if torch.is_autocast_enabled(kind):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(kind))
    chunk = positions_at_once(weight_VD.shape[0], hidden_ND.element_size())
    missing = -len(labels_N) % ROW_STEP
    hidden_ND, labels_N = F.pad(hidden_ND, (0, 0, 0, missing)), F.pad(labels_N, (0, missing), value=IGNORED_LABEL)
    with torch.autocast(kind, enabled=False):
        memory = WeightScratch() if scratch is None else scratch
        memory.reserve(chunk * weight_VD.shape[0])
        return _HeadLoss.apply(hidden_ND, labels_N, weight_VD, bias_V, softcap, kernels, chunk, memory)  # type: ignore[return-value]


def positions_at_once(vocab_size: int, item_bytes: int) -> int:
    """Labelled positions whose logits exist at the same time; a multiple of `ROW_STEP`."""
    fitting = CHUNK_BYTES // (item_bytes * vocab_size) // ROW_STEP * ROW_STEP
    return min(MOST_POSITIONS, max(MIN_CHUNK, fitting))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        labels_N: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        kernels: TrainingKernels,
        chunk: int,
        scratch: WeightScratch,
    ) -> Tensor:
        wants_hidden, _, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        dtype = hidden_ND.dtype
        weight = weight_VD.detach().to(dtype)
        bias = None if bias_V is None else bias_V.detach().to(dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if wants_bias and bias_V is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        wants_any = wants_hidden or wants_weight or wants_bias
        for start in range(0, len(labels_N), chunk):
            hidden_CD = hidden_ND[start : start + chunk]
            logits_CV = scratch.matrix(len(hidden_CD), len(weight), dtype=dtype, device=hidden_ND.device)
            if bias is None:
                torch.mm(hidden_CD, weight.t(), out=logits_CV)
            else:
                torch.addmm(bias, hidden_CD, weight.t(), out=logits_CV)
            total += kernels.cross_entropy_(logits_CV, labels_N[start : start + chunk], softcap=softcap, grad=wants_any)
            if grad_hidden_ND is not None:
                torch.mm(logits_CV, weight, out=grad_hidden_ND[start : start + chunk])
            if grad_weight_VD is not None:
                grad_weight_VD += logits_CV.t() @ hidden_CD
            if grad_bias_V is not None:
                grad_bias_V += logits_CV.sum(0)
        kept = [grad for grad in (grad_hidden_ND, grad_weight_VD, grad_bias_V) if grad is not None]
        ctx.wanted = (grad_hidden_ND is not None, grad_weight_VD is not None, grad_bias_V is not None)
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors]
        hidden, weight, bias = (scaled.pop(0) if wanted else None for wanted in ctx.wanted)
        return hidden, None, weight, bias, None, None, None, None
