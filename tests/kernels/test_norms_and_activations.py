"""Norms and activations of the compiled kernels against their torch twins."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.kernels import reference
from burnish.kernels.cpu import single
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.packing import LANES
from burnish.kernels.cpu.structs import ACTIVATIONS

WIDTHS = (1, 7, 64, 172, 1000)
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-39, 1e-30, 88.0, 89.0, -87.0, -104.0, 1e30, -1e30, 3e38]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_equals_the_twin(library: CpuLibrary, kind: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    weight, bias = torch.randn(width, generator=generator), torch.randn(width, generator=generator)
    for scale in (1e-6, 1.0, 1e6):
        x = torch.randn(5, width, generator=generator) * scale
        if kind == "rms":
            got, want = single.norm(library, x, weight, eps=1e-5), reference.rms_norm(x, weight, eps=1e-5)
        else:
            got = single.norm(library, x, weight, eps=1e-5, bias_W=bias)
            want = reference.layer_norm(x, weight, bias, eps=1e-5)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_of_a_bad_row_spoils_that_row_only(library: CpuLibrary, kind: str, bad: float) -> None:
    x, weight = torch.randn(3, 40), torch.randn(40)
    bias = None if kind == "rms" else torch.randn(40)
    clean = single.norm(library, x, weight, eps=1e-5, bias_W=bias)
    x[1, 11] = bad
    got = single.norm(library, x, weight, eps=1e-5, bias_W=bias)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    twin = reference.rms_norm(x, weight, eps=1e-5)
    if bias is not None:
        twin = reference.layer_norm(x, weight, bias, eps=1e-5)
    torch.testing.assert_close(got[1], twin[1], equal_nan=True)
    assert got[1, 11].isnan()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e18, 1e30])
def test_norm_of_extreme_rows_is_the_twins(library: CpuLibrary, size: float) -> None:
    x = torch.full((1, 33), size) * torch.tensor([1.0, -1.0, 0.5] * 11)
    weight, bias = torch.ones(33), torch.zeros(33)
    torch.testing.assert_close(single.norm(library, x, weight, eps=1e-6), reference.rms_norm(x, weight, eps=1e-6))
    got = single.norm(library, x, weight, eps=1e-6, bias_W=bias)
    torch.testing.assert_close(got, reference.layer_norm(x, weight, bias, eps=1e-6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activation_equals_the_twin(library: CpuLibrary, activation: str) -> None:
    x = torch.linspace(-30.0, 30.0, 4000 // LANES * LANES)
    got = single.activate(library, x, activation=activation)
    # erf is good to 1.5e-7, which a factor of x multiplies.
    torch.testing.assert_close(got, reference.ACTIVATIONS[activation](x), rtol=2e-6, atol=2e-6)
    near = torch.linspace(-0.01, 0.01, 1600)
    got = single.activate(library, near, activation=activation)
    torch.testing.assert_close(got, reference.ACTIVATIONS[activation](near), rtol=2e-6, atol=2e-9)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activation_of_special_numbers_is_the_twins(library: CpuLibrary, activation: str) -> None:
    x = torch.tensor(SPECIAL + [1.0] * (-len(SPECIAL) % LANES))
    got = single.activate(library, x, activation=activation)
    # In float32 torch's gelu takes infinity for no number.
    want = reference.ACTIVATIONS[activation](x.double()).float()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gated_activation_takes_sixteens_in_turn(library: CpuLibrary, activation: str) -> None:
    gate, up = torch.randn(48), torch.randn(48)
    raw = torch.stack([gate.view(-1, LANES), up.view(-1, LANES)], dim=1).flatten()
    got = single.activate(library, raw, activation=activation, gated=True)
    torch.testing.assert_close(got, reference.gated(gate, up, activation=activation), rtol=2e-6, atol=2e-6)
