"""The masked, chunked cross-entropy against torch's own over all positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.train.losses import masked_cross_entropy, used_by_head

B, T, D, V = 3, 7, 12, 31


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    labels_BT = torch.randint(0, V, (B, T))
    labels_BT[:, :3] = -100
    labels_BT[1, 5:] = -100
    return torch.randn(B, T, D, requires_grad=True), labels_BT, nn.Linear(D, V)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_sum_and_gradients_equal_torch_for_any_chunk(
    case: tuple[torch.Tensor, torch.Tensor, nn.Linear], chunk: int
) -> None:
    hidden, labels, head = case
    inputs = (hidden, head.weight, head.bias)
    ours = masked_cross_entropy(
        hidden, labels, logits=head, vocab_size=V, head_parameters=[head.weight, head.bias], chunk_positions=chunk
    )
    theirs = nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    assert torch.allclose(ours, theirs, rtol=1e-6)
    for mine, other in zip(torch.autograd.grad(ours / 5, inputs), torch.autograd.grad(theirs / 5, inputs)):
        assert torch.allclose(mine, other, atol=1e-6)


def test_masked_positions_reach_neither_the_head_nor_the_gradient(
    case: tuple[torch.Tensor, torch.Tensor, nn.Linear],
) -> None:
    hidden, labels, head = case
    seen: list[torch.Tensor] = []

    def logits(hidden_CD: torch.Tensor) -> torch.Tensor:
        seen.append(hidden_CD.detach())
        return head(hidden_CD)

    loss = masked_cross_entropy(hidden, labels, logits=logits, vocab_size=V, chunk_positions=4)
    rows = torch.cat(seen)
    assert torch.equal(rows[:10], hidden[labels != -100])
    assert len(rows) == 12
    assert not rows[10:].any()
    assert max(len(part) for part in seen) == 4
    (grad,) = torch.autograd.grad(loss, (hidden,))
    assert not grad[labels == -100].any()
    assert grad[labels != -100].abs().sum(-1).min() > 0
    changed = torch.where((labels == -100)[..., None], torch.full_like(hidden, 1e4), hidden)
    assert torch.equal(masked_cross_entropy(changed, labels, logits=head, vocab_size=V, chunk_positions=4), loss)


def test_loss_without_gradients_is_the_same_number(case: tuple[torch.Tensor, torch.Tensor, nn.Linear]) -> None:
    hidden, labels, head = case
    loss = masked_cross_entropy(hidden, labels, logits=head, vocab_size=V)
    with torch.no_grad():
        assert torch.equal(masked_cross_entropy(hidden, labels, logits=head, vocab_size=V), loss)


def test_head_alone_gets_gradients_when_hidden_states_need_none(
    case: tuple[torch.Tensor, torch.Tensor, nn.Linear],
) -> None:
    hidden, labels, head = case
    loss = masked_cross_entropy(
        hidden.detach(), labels, logits=head, vocab_size=V, head_parameters=[head.weight], chunk_positions=3
    )
    theirs = nn.functional.cross_entropy(head(hidden.detach()).flatten(0, 1), labels.flatten(), reduction="sum")
    mine, other = torch.autograd.grad(loss, head.weight)[0], torch.autograd.grad(theirs, head.weight)[0]
    assert torch.allclose(mine, other, atol=1e-5)


def test_bfloat16_hidden_states_give_a_float32_loss(case: tuple[torch.Tensor, torch.Tensor, nn.Linear]) -> None:
    hidden, labels, head = case
    exact = masked_cross_entropy(hidden, labels, logits=head, vocab_size=V)
    loss = masked_cross_entropy(hidden.bfloat16(), labels, logits=head.bfloat16(), vocab_size=V)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)


def test_probe_finds_the_parameters_of_the_head() -> None:
    head, other = nn.Linear(D, V), nn.Linear(D, D)
    found = used_by_head(head, torch.zeros(1, D), [other.weight, head.weight, head.bias])
    assert [id(parameter) for parameter in found] == [id(head.weight), id(head.bias)]
