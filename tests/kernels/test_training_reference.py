"""The twins of fine-tuning's kernels against torch's own gradients, in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels import training_reference as twin
from burnish.kernels.reference import ACTIVATIONS, rotate

STARTS = torch.tensor([0, 1, 8, 8, 41], dtype=torch.int32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize(("kind", "offset"), [("rmsnorm", 0.0), ("rmsnorm", 1.0), ("layernorm", 0.0)])
def test_norm_is_torchs(kind: str, offset: float) -> None:
    x, weight, bias, grad = random(9, 20), random(20, seed=1), random(20, seed=2), random(9, 20, seed=3).detach()
    if kind == "layernorm":
        want, inputs = F.layer_norm(x, (20,), weight, bias, 1e-5), (x, weight, bias)
    else:
        want, inputs = F.rms_norm(x, (20,), weight + offset, 1e-5), (x, weight)
    wanted = torch.autograd.grad(want, inputs, grad)
    with torch.no_grad():
        y, stats = twin.norm_forward(
            x, weight, bias if kind == "layernorm" else None, kind=kind, eps=1e-5, offset=offset
        )
        residual = random(9, 20, seed=4)
        got = twin.norm_backward(grad, x, weight, stats, kind=kind, offset=offset, grad_residual_ND=residual)
    torch.testing.assert_close(y, want.detach())
    torch.testing.assert_close(got[0], wanted[0] + residual.detach(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got[1:], wanted[1:]):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gate_is_torchs(activation: str) -> None:
    gate, up, grad = random(9, 20), random(9, 20, seed=1), random(9, 20, seed=2).detach()
    want = ACTIVATIONS[activation](gate) * up
    wanted = torch.autograd.grad(want, (gate, up), grad)
    with torch.no_grad():
        got = twin.gate_backward(grad, gate, up, activation=activation)
        torch.testing.assert_close(twin.gate_forward(gate, up, activation=activation), want)
    for mine, theirs in zip(got, (*wanted, want)):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_inverse_rotation_is_its_gradient(interleaved: bool) -> None:
    x, grad, angles = random(9, 3, 16), random(9, 3, 16, seed=1).detach(), random(9, 5, seed=2).detach()
    want = rotate(x, angles.cos(), angles.sin(), interleaved=interleaved)
    (wanted,) = torch.autograd.grad(want, (x,), grad)
    got = twin.rotate_(grad.clone(), angles.cos(), angles.sin(), interleaved=interleaved, inverse=True)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_is_torchs(softcap: float | None) -> None:
    logits, labels = random(9, 20), torch.arange(9)
    labels[4] = -100
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = F.cross_entropy(capped, labels, ignore_index=-100, reduction="sum")
    (wanted,) = torch.autograd.grad(want, (logits,))
    got = logits.detach().clone()
    assert twin.cross_entropy_(got, labels, softcap=softcap) == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("with_slopes", [False, True])
def test_attention_is_torchs(window: int | None, with_slopes: bool) -> None:
    q, k, v = random(41, 6, 8), random(41, 2, 8, seed=1), random(41, 2, 8, seed=2)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.3, 0.01, 1.0]) if with_slopes else None
    grad = random(41, 6, 8, seed=3).detach()
    pieces = []
    for begin, end in zip(STARTS.tolist(), STARTS.tolist()[1:]):
        places = torch.arange(end - begin)
        distance = places[:, None] - places
        bias = torch.zeros(6, end - begin, end - begin)
        if slopes is not None:
            bias = bias - slopes[:, None, None] * distance
        bias = bias.masked_fill((distance < 0) | (distance >= (window or 99)), -torch.inf)
        mine, keys, values = (x[None, begin:end].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(mine, keys, values, bias, scale=0.3, enable_gqa=True)
        pieces.append(out[0].transpose(0, 1))
    want = torch.cat(pieces)
    wanted = torch.autograd.grad(want, (q, k, v), grad)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    with torch.no_grad():
        out, lse = twin.attention_forward(q, k, v, STARTS, scale=0.3, window=window, slopes_H=slopes)
        twin.attention_backward(
            grad, q, k, v, out, lse, STARTS, scale=0.3, window=window, slopes_H=slopes,
            grad_q_NHE=grads[0], grad_k_NKE=grads[1], grad_v_NKE=grads[2],
        )  # fmt: skip
    torch.testing.assert_close(out, want.detach())
    for mine, theirs in zip(grads, wanted):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
