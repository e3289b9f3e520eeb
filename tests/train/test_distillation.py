from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.train.distillation import distillation_loss
from burnish.train.losses import IGNORED_LABEL

# B rows, T tokens, D hidden, V vocabulary


def _case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_BTD, parent_BTD = (torch.randn(3, 40, 8, generator=generator) for _ in range(2))
    labels_BT = torch.randint(0, 11, (3, 40), generator=generator)
    labels_BT[torch.rand(3, 40, generator=generator) < 0.4] = IGNORED_LABEL
    return hidden_BTD, parent_BTD, labels_BT, torch.randn(11, 8, generator=generator)


@pytest.mark.parametrize("chunk", [None, 64, 7])
def test_loss_and_gradient_are_those_of_the_divergence_at_labelled_positions(chunk: int | None) -> None:
    hidden_BTD, parent_BTD, labels_BT, head_VD = _case()
    hidden_BTD.requires_grad_()
    loss = distillation_loss(
        hidden_BTD, parent_BTD, labels_BT, logits=lambda h: h @ head_VD.t(), vocab_size=11, chunk_positions=chunk
    )
    (found,) = torch.autograd.grad(loss / 5, hidden_BTD)
    there = labels_BT != IGNORED_LABEL
    child, parent = ((each[there] @ head_VD.t()).log_softmax(-1) for each in (hidden_BTD, parent_BTD))
    expected = torch.nn.functional.kl_div(child, parent, reduction="sum", log_target=True)
    (wanted,) = torch.autograd.grad(expected / 5, hidden_BTD)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not found[~there].any()


def test_a_child_that_is_its_parent_has_nothing_to_learn() -> None:
    hidden_BTD, _, labels_BT, head_VD = _case()
    child_BTD = hidden_BTD.clone().requires_grad_()
    loss = distillation_loss(child_BTD, hidden_BTD, labels_BT, logits=lambda h: h @ head_VD.t(), vocab_size=11)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert child_BTD.grad is not None
    assert not child_BTD.grad.any()


def test_loss_without_gradient_is_the_same() -> None:
    hidden_BTD, parent_BTD, labels_BT, head_VD = _case()

    def loss(hidden: Tensor) -> Tensor:
        return distillation_loss(hidden, parent_BTD, labels_BT, logits=lambda h: h @ head_VD.t(), vocab_size=11)

    with torch.no_grad():
        still = loss(hidden_BTD)
    assert not still.requires_grad
    assert torch.equal(still, loss(hidden_BTD.requires_grad_()).detach())
