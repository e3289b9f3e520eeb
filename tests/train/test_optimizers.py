"""Optimizers against their papers, their states, and what they refuse."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from burnish.errors import ConfigError
from burnish.train.adamw import AdamW
from burnish.train.config import OPTIMIZERS, TrainConfig
from burnish.train.host_optimizer import HostOptimizer
from burnish.train.optimizers import check_device, make_optimizer

HERE = [name for name in OPTIMIZERS if "8bit" not in name]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=source)) for shape in ((6, 10), (3, 4), (7,))]


def give_gradients(trained: list[nn.Parameter], *, seed: int) -> None:
    source = torch.Generator().manual_seed(100 + seed)
    for parameter in trained:
        parameter.grad = torch.randn(*parameter.shape, generator=source).to(parameter.dtype)


def run(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], *, first: int = 0, steps: int = 4) -> None:
    for step in range(first, first + steps):
        give_gradients(trained, seed=step)
        optimizer.step()


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"learning_rate": 0.03, "weight_decay": 0.1, **settings})


def test_lion_follows_its_paper() -> None:
    trained, expected = parameters(), [parameter.detach().clone() for parameter in parameters()]
    momenta = [torch.zeros_like(value) for value in expected]
    optimizer = make_optimizer(trained, config(optimizer="lion"))
    for step in range(4):
        give_gradients(trained, seed=step)
        for value, momentum, parameter in zip(expected, momenta, trained):
            assert parameter.grad is not None
            direction = torch.sign(0.9 * momentum + 0.1 * parameter.grad)
            decay = 0.1 if value.ndim > 1 else 0.0
            value -= 0.03 * (direction + decay * value)
            momentum.mul_(0.99).add_(parameter.grad, alpha=0.01)
        optimizer.step()
    for value, parameter in zip(expected, trained):
        torch.testing.assert_close(parameter.detach(), value)


def test_adafactor_equals_torch_without_its_relative_step() -> None:
    trained, theirs = parameters(), parameters()
    run(make_optimizer(trained, config(optimizer="adafactor", weight_decay=0.0)), trained)
    reference = torch.optim.Adafactor(theirs, lr=0.03, eps=(1e-30, 100.0))  # rate = max(100, rms of weights) * lr
    for group in reference.param_groups:
        group["lr"] = 0.03 / 100.0
    run(reference, theirs)
    for ours, other in zip(trained, theirs):
        torch.testing.assert_close(ours.detach(), other.detach(), rtol=1e-4, atol=1e-6)


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix() -> None:
    trained = parameters()
    optimizer = make_optimizer(trained, config(optimizer="adafactor"))
    run(optimizer, trained)
    sizes = [sum(v.numel() for v in optimizer.state[p].values() if torch.is_tensor(v)) for p in trained]
    assert sizes == [16, 7, 7]


@pytest.mark.parametrize("name", HERE)
def test_decay_falls_on_matrices_only(name: Any) -> None:
    trained = parameters()
    optimizer = make_optimizer(trained, config(optimizer=name))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(parameter)] for parameter in trained] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", HERE)
def test_restored_state_continues_bit_for_bit(name: Any, offload: bool) -> None:
    def make(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        if offload:
            return HostOptimizer(trained, lambda copies: make_optimizer(copies, config(optimizer=name)))
        return make_optimizer(trained, config(optimizer=name))

    straight, stopped = parameters(), parameters()
    run(make(straight), straight, steps=6)
    first = make(stopped)
    run(first, stopped, steps=3)
    state = copy.deepcopy(first.state_dict())
    for entry in state["state"].values():
        for value in entry.values():
            assert type(value) in (torch.Tensor, int, float)
            assert not torch.is_tensor(value) or value.dtype == torch.float32
    again = make(stopped)
    again.load_state_dict(state)
    run(again, stopped, first=3, steps=3)
    for one, other in zip(straight, stopped):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", HERE)
def test_update_on_the_host_equals_the_update_in_place(name: Any) -> None:
    here, there = parameters(), parameters()
    plain = make_optimizer(here, config(optimizer=name))
    hosted = HostOptimizer(there, lambda copies: make_optimizer(copies, config(optimizer=name)))
    for step in range(4):
        if step == 2:  # a checkpoint was loaded, and the rate changed
            with torch.no_grad():
                here[0].mul_(0.5)
                there[0].mul_(0.5)
        for optimizer in (plain, hosted):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
        run(plain, here, first=step, steps=1)
        run(hosted, there, first=step, steps=1)
    for one, other in zip(here, there):
        assert torch.equal(one, other)
    assert hosted.state
    hosted.zero_grad(set_to_none=True)
    assert there[0].grad is None


def test_parameters_without_a_gradient_are_left_alone() -> None:
    for name in HERE:
        trained = parameters()
        before = trained[1].detach().clone()
        optimizer = make_optimizer(trained, config(optimizer=name))
        give_gradients(trained, seed=0)
        trained[1].grad = None
        optimizer.step()
        assert torch.equal(trained[1], before)


def test_what_cannot_be_honoured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'adam'.*adamw, adamw-8bit"):
        TrainConfig(optimizer="adam")  # type: ignore[arg-type]
    for name in ("adamw-8bit", "paged-adamw-8bit"):
        with pytest.raises(ConfigError, match=f"{name} runs on CUDA devices only; got cpu"):
            make_optimizer(parameters(), config(optimizer=name))
        with pytest.raises(ConfigError, match="keeps its state on the device"):
            check_device(name, "cuda", offload=True)
    with pytest.raises(ConfigError, match="offloaded from CUDA devices only"):
        make_optimizer(parameters(), config(offload_optimizer=True))
    with pytest.raises(ConfigError, match="adafactor has no betas"):
        TrainConfig(optimizer="adafactor", betas=(0.9, 0.99))
    with pytest.raises(ConfigError, match="lion has no epsilon"):
        TrainConfig(optimizer="lion", epsilon=1e-6)
    with pytest.raises(ConfigError, match="betas are out of range"):
        TrainConfig(betas=(0.9, 1.0))


def test_adamw_is_torchs_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(7, 5, generator=generator), torch.randn(6, generator=generator)]
    grads = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(5)]
    results = []
    for kind in (AdamW, lambda groups, **settings: torch.optim.AdamW(groups, fused=True, **settings)):
        parameters = [nn.Parameter(p.clone()) for p in start]
        optimizer = kind(parameters, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
        for step in grads:
            for parameter, grad in zip(parameters, step):
                parameter.grad = grad.clone()
            optimizer.step()
        results.append([*parameters, *(value for state in optimizer.state.values() for value in state.values())])
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_training_imports_no_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from burnish.train.adafactor import Adafactor\n"
        "from burnish.train.adamw import AdamW\n"
        "from burnish.train.lion import Lion\n"
        "kind = {each.__name__: each for each in (AdamW, Adafactor, Lion)}[sys.argv[1]]\n"
        "p = torch.nn.Parameter(torch.ones(3)); o = kind([p]); p.sum().backward(); o.step(); o.zero_grad()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    for name in ("AdamW", "Adafactor", "Lion"):
        subprocess.run([sys.executable, "-c", code, name], check=True)
