"""The compiled kernels of fine-tuning, on torch tensors: forward and backward passes, without torch's gradients.

Twins in plain torch, with the same arguments: `kernels/training_reference.py`. Everything is float32 or bfloat16 on the
CPU and computed in float32 between reading and storing. Rows may lie apart; the values of a row, and the heads of a
row, may not. What is written "in place" may be given as an output under another name as long as it is the same memory
from its first value on.

Shapes: N tokens (rows), D width, I inner width, H query heads, K kv heads, E head dim, F rotated frequencies, C rows of
logits, V vocabulary, R sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from burnish.kernels.cpu.library import load
from burnish.kernels.cpu.structs import ACTIVATIONS
from burnish.kernels.cpu.training_attention import AttentionKernels
from burnish.kernels.cpu.training_passes import FORMATS, check_heads, check_rows, pointer, stride_of
from burnish.kernels.cpu.training_structs import GatePass, LossPass, NormPass, RotatePass

NORMS = {"rmsnorm": 1, "layernorm": 2}
NormKind = Literal["rmsnorm", "layernorm"]


def available(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether `TrainingKernels` can be made here and takes tensors of this kind."""
    return torch.device(device).type == "cpu" and dtype in FORMATS and load() is not None


class TrainingKernels(AttentionKernels):
    """The passes, on a fixed number of threads.

    They run on the threads of torch's own OpenMP where it is found, as two sets of threads on the same cores wait for
    each other, and on a team of their own otherwise. No result depends on the number.

    Args:
        library: the loaded kernels; None is what `load` gives, which has to be there (`available`).
        threads: None is `torch.get_num_threads()` at each call.
    """

    # ---- norms -------------------------------------------------------------------------------------------------------

    def norm_forward(
        self,
        x_ND: Tensor,
        weight_D: Tensor,
        bias_D: Tensor | None = None,
        *,
        kind: NormKind,
        eps: float,
        offset: float = 0.0,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """RMSNorm as the decoder's, or LayerNorm.

        Args:
            weight_D: float32 or bfloat16; `bias_D` has the same dtype.
            offset: added to the weight, which is then applied before rounding to x's dtype; with 0 after.
            out: written to; may be `x_ND`.

        Returns:
            y_ND in x's dtype, and stats_N2, float32: mean (0 for RMSNorm) and 1 / deviation.
        """
        stats_N2 = torch.empty(x_ND.shape[0], 2)
        y_ND = self._norm(x_ND, weight_D, bias_D, stats_N2, kind=kind, eps=eps, offset=offset, out=out, again=False)
        return y_ND, stats_N2

    def norm_again(
        self,
        x_ND: Tensor,
        weight_D: Tensor,
        bias_D: Tensor | None,
        stats_N2: Tensor,
        *,
        kind: NormKind,
        offset: float = 0.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """y_ND of `norm_forward`, bit for bit, from its statistics."""
        return self._norm(x_ND, weight_D, bias_D, stats_N2, kind=kind, eps=0.0, offset=offset, out=out, again=True)

    def norm_backward(
        self,
        grad_y_ND: Tensor,
        x_ND: Tensor,
        weight_D: Tensor,
        stats_N2: Tensor,
        *,
        kind: NormKind,
        offset: float = 0.0,
        grad_residual_ND: Tensor | None = None,
        out: Tensor | None = None,
        weight_grads: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of `norm_forward`.

        Args:
            grad_residual_ND: added to the gradient of x.
            out: takes the gradient of x; may be `grad_residual_ND` or `grad_y_ND`.
            weight_grads: the second and third result are wanted.

        Returns:
            grad_x_ND in x's dtype; grad_weight_D and, for LayerNorm, grad_bias_D, float32, or None.
        """
        grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format) if out is None else out
        grad_weight_D = torch.empty(weight_D.shape) if weight_grads else None
        grad_bias_D = torch.empty(weight_D.shape) if weight_grads and kind == "layernorm" else None
        check_rows(x_ND.dtype, x_ND.shape, grad_y_ND, x_ND, grad_x_ND, grad_residual_ND)
        _check_vectors(x_ND.shape[1], weight_D)
        _check_stats(stats_N2, x_ND)
        struct = NormPass(
            format=FORMATS[x_ND.dtype],
            weight_format=FORMATS[weight_D.dtype],
            kind=NORMS[kind],
            rows=x_ND.shape[0],
            width=x_ND.shape[1],
            offset=offset,
            x=x_ND.data_ptr(),
            x_stride=x_ND.stride(0),
            weight=weight_D.data_ptr(),
            y=grad_y_ND.data_ptr(),
            y_stride=grad_y_ND.stride(0),
            stats=stats_N2.data_ptr(),
            residual=pointer(grad_residual_ND),
            residual_stride=stride_of(grad_residual_ND),
            grad_x=grad_x_ND.data_ptr(),
            grad_x_stride=grad_x_ND.stride(0),
            grad_weight=pointer(grad_weight_D),
            grad_bias=pointer(grad_bias_D),
        )
        self._call("norm_backward", struct)
        return grad_x_ND, grad_weight_D, grad_bias_D

    def _norm(
        self,
        x_ND: Tensor,
        weight_D: Tensor,
        bias_D: Tensor | None,
        stats_N2: Tensor,
        *,
        kind: NormKind,
        eps: float,
        offset: float,
        out: Tensor | None,
        again: bool,
    ) -> Tensor:
        y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format) if out is None else out
        check_rows(x_ND.dtype, x_ND.shape, x_ND, y_ND)
        _check_vectors(x_ND.shape[1], weight_D, bias_D)
        _check_stats(stats_N2, x_ND)
        struct = NormPass(
            format=FORMATS[x_ND.dtype],
            weight_format=FORMATS[weight_D.dtype],
            kind=NORMS[kind],
            rows=x_ND.shape[0],
            width=x_ND.shape[1],
            again=again,
            eps=eps,
            offset=offset,
            x=x_ND.data_ptr(),
            x_stride=x_ND.stride(0),
            weight=weight_D.data_ptr(),
            bias=pointer(bias_D),
            y=y_ND.data_ptr(),
            y_stride=y_ND.stride(0),
            stats=stats_N2.data_ptr(),
        )
        self._call("norm_forward", struct)
        return y_ND

    # ---- activations -------------------------------------------------------------------------------------------------

    def gate_forward(self, gate_NI: Tensor, up_NI: Tensor, *, activation: str, out: Tensor | None = None) -> Tensor:
        """act(gate) * up, (N, I), rounded once. Shazeer, 2020, arXiv:2002.05202."""
        return self._activate(gate_NI, up_NI, activation, out)

    def activation_forward(self, x_NI: Tensor, *, activation: str, out: Tensor | None = None) -> Tensor:
        """act(x), (N, I)."""
        return self._activate(x_NI, None, activation, out)

    def gate_backward(
        self,
        grad_NI: Tensor,
        gate_NI: Tensor,
        up_NI: Tensor,
        *,
        activation: str,
        grad_gate_NI: Tensor,
        grad_up_NI: Tensor,
        product_NI: Tensor | None = None,
    ) -> None:
        """Gradients of `gate_forward`, written to `grad_gate_NI` and `grad_up_NI`.

        Args:
            grad_gate_NI: may be `gate_NI`, and `grad_up_NI` may be `up_NI`.
            product_NI: takes the product again; may be `grad_NI`.
        """
        check_rows(gate_NI.dtype, gate_NI.shape, grad_NI, gate_NI, up_NI, grad_gate_NI, grad_up_NI, product_NI)
        self._run_gate("gate_backward", gate_NI, up_NI, activation, grad_NI, product_NI, grad_gate_NI, grad_up_NI)

    def activation_backward(
        self, grad_NI: Tensor, x_NI: Tensor, *, activation: str, out: Tensor | None = None
    ) -> Tensor:
        """grad * act'(x), (N, I); `out` may be `x_NI` or `grad_NI`."""
        out = torch.empty_like(x_NI, memory_format=torch.contiguous_format) if out is None else out
        check_rows(x_NI.dtype, x_NI.shape, grad_NI, x_NI, out)
        self._run_gate("gate_backward", x_NI, None, activation, grad_NI, None, out, None)
        return out

    def _activate(self, gate_NI: Tensor, up_NI: Tensor | None, activation: str, out: Tensor | None) -> Tensor:
        out = torch.empty_like(gate_NI, memory_format=torch.contiguous_format) if out is None else out
        check_rows(gate_NI.dtype, gate_NI.shape, gate_NI, up_NI, out)
        self._run_gate("gate_forward", gate_NI, up_NI, activation, None, out, None, None)
        return out

    def _run_gate(
        self,
        name: str,
        gate: Tensor,
        up: Tensor | None,
        activation: str,
        grad: Tensor | None,
        product: Tensor | None,
        grad_gate: Tensor | None,
        grad_up: Tensor | None,
    ) -> None:
        struct = GatePass(
            format=FORMATS[gate.dtype],
            activation=ACTIVATIONS[activation],
            rows=gate.shape[0],
            width=gate.shape[1],
            gate=gate.data_ptr(),
            up=pointer(up),
            grad=pointer(grad),
            product=pointer(product),
            grad_gate=pointer(grad_gate),
            grad_up=pointer(grad_up),
            gate_stride=gate.stride(0),
            up_stride=stride_of(up),
            grad_stride=stride_of(grad),
            product_stride=stride_of(product),
            grad_gate_stride=stride_of(grad_gate),
            grad_up_stride=stride_of(grad_up),
        )
        self._call(name, struct)

    # ---- rotation ----------------------------------------------------------------------------------------------------

    def rotate_(
        self, x_NHE: Tensor, cos_NF: Tensor, sin_NF: Tensor, *, interleaved: bool = False, inverse: bool = False
    ) -> Tensor:
        """Rotate the first 2 F features of every head in place, rounded once; the others stay. Returns `x_NHE`.

        Args:
            cos_NF: contiguous float32, as `sin_NF`; other dtypes are copied at each call.
            interleaved: pairs are (0, 1), (2, 3), ... instead of (0, F), (1, F + 1), ...
            inverse: by the negative angles, which is also the gradient.
        """
        check_heads(x_NHE.dtype, x_NHE.shape[0], x_NHE.shape[2], x_NHE)
        cos_NF, sin_NF = cos_NF.float().contiguous(), sin_NF.float().contiguous()
        assert cos_NF.shape == sin_NF.shape == (x_NHE.shape[0], cos_NF.shape[1])
        assert 2 * cos_NF.shape[1] <= x_NHE.shape[2]
        struct = RotatePass(
            format=FORMATS[x_NHE.dtype],
            interleaved=interleaved,
            inverse=inverse,
            rows=x_NHE.shape[0],
            heads=x_NHE.shape[1],
            head_dim=x_NHE.shape[2],
            pairs=cos_NF.shape[1],
            x=x_NHE.data_ptr(),
            stride=x_NHE.stride(0),
            cos=cos_NF.data_ptr(),
            sin=sin_NF.data_ptr(),
        )
        self._call("rotate", struct)
        return x_NHE

    # ---- loss --------------------------------------------------------------------------------------------------------

    def cross_entropy_(
        self,
        logits_CV: Tensor,
        labels_C: Tensor,
        *,
        softcap: float | None = None,
        grad: bool = True,
        grad_scale: float = 1.0,
    ) -> float:
        """Sum of the cross-entropy, in nats, over the rows that have a label.

        Args:
            logits_CV: contiguous; with `grad`, overwritten by the gradient of the sum times `grad_scale` with respect
                to these logits (softmax - one-hot; zeros in rows without a label).
            labels_C: int64, -100 for none.
            softcap: the loss is that of softcap * tanh(logits / softcap); the gradient passes through it.

        Raises:
            DataError: a label is outside the vocabulary; nothing was written.
        """
        assert logits_CV.is_contiguous()
        check_rows(logits_CV.dtype, logits_CV.shape, logits_CV)
        assert labels_C.dtype == torch.int64
        assert labels_C.is_contiguous()
        assert labels_C.shape == logits_CV.shape[:1]
        losses_C = torch.zeros(labels_C.shape)
        struct = LossPass(
            format=FORMATS[logits_CV.dtype],
            with_grad=grad,
            rows=logits_CV.shape[0],
            width=logits_CV.shape[1],
            softcap=softcap or 0.0,
            grad_scale=grad_scale,
            logits=logits_CV.data_ptr(),
            labels=labels_C.data_ptr(),
            losses=losses_C.data_ptr(),
        )
        self._call("loss", struct)
        return float(losses_C.sum(dtype=torch.float64))


def _check_vectors(width: int, weight_D: Tensor, bias_D: Tensor | None = None) -> None:
    for tensor in (weight_D, weight_D if bias_D is None else bias_D):
        assert tensor.dtype == weight_D.dtype
        assert tensor.dtype in FORMATS
        assert tensor.shape == (width,)
        assert tensor.is_contiguous()


def _check_stats(stats_N2: Tensor, x_ND: Tensor) -> None:
    assert stats_N2.dtype == torch.float32
    assert stats_N2.shape == (x_ND.shape[0], 2)
    assert stats_N2.is_contiguous()
