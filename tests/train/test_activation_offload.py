"""What autograd saves goes through the hooks, weights do not, and gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from burnish.errors import ConfigError
from burnish.train.activation_offload import activations_on_host
from burnish.train.config import TrainConfig
from burnish.train.trainer import train


def test_gradients_are_those_of_a_pass_that_kept_everything(
    make_decoder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(12)[None]
    results, copied = [], []
    real = torch.Tensor.copy_

    def spy(kept: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copied.append(source)
        return real(kept, source, non_blocking)

    for offloaded in (False, True):
        model = make_decoder()
        if offloaded:
            monkeypatch.setattr(torch.Tensor, "copy_", spy)
            with activations_on_host(model, smallest_bytes=0):
                loss = model(tokens).square().sum()
            monkeypatch.undo()
        else:
            loss = model(tokens).square().sum()
        loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results))
    assert len(copied) > 20
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert not weights & {tensor.data_ptr() for tensor in copied}


def test_only_cards_have_something_to_offload(make_decoder: Callable[..., Any], make_rows: Callable[..., Any]) -> None:
    config = TrainConfig(method="full", steps=1, offload_activations=True)
    with pytest.raises(ConfigError, match="activations are offloaded from CUDA devices only"):
        train(make_decoder(), make_rows(2), config=config)
