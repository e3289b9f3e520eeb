"""What the compiled kernels do with a product's rows: store, add, activate, gate, soft cap, arg-max.

Shapes: M rows, N output features, K input features.
"""

from __future__ import annotations

import math

import pytest
import torch
from linear_cases import FORMATS, assert_near, integers, make_case
from torch import Tensor

from burnish.kernels import reference
from burnish.kernels.cpu import single
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.packing import interleaved, pack_float, pack_grouped, pack_int8
from burnish.kernels.cpu.structs import ACTIVATIONS, Finish

ROWS = (1, 2, 3, 4, 5, 6, 7, 16, 17, 33)


@pytest.mark.parametrize("format_", FORMATS)
def test_add_joins_what_is_there_and_touches_nothing_else(library: CpuLibrary, format_: str) -> None:
    for rows in ROWS:
        case = make_case(library, format_, 72, 41, rows=rows, bias=True)
        x_MK = integers(rows, 72)
        wide = torch.randn(rows + 2, 60)
        before = wide.clone()
        single.linear(library, case.packed, x_MK, finish=Finish.ADD, out=wide[1:-1, 3:44])
        want_MN = before[1:-1, 3:44] + case.twin(x_MK)
        assert_near(wide[1:-1, 3:44], want_MN, case.magnitude(x_MK) + before[1:-1, 3:44].abs())
        wide[1:-1, 3:44] = before[1:-1, 3:44]
        assert torch.equal(wide, before)


@pytest.mark.parametrize("format_", FORMATS)
def test_store_writes_nothing_past_its_features(library: CpuLibrary, format_: str) -> None:
    for rows in ROWS:
        case = make_case(library, format_, 40, 21, rows=rows)
        wide = torch.full((rows + 1, 33), 5.0)
        single.linear(library, case.packed, integers(rows, 40), out=wide[:-1, :21])
        assert wide[:, 21:].eq(5.0).all()
        assert wide[-1].eq(5.0).all()
        assert wide[:-1, :21].ne(5.0).any()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("format_", FORMATS)
def test_activation_follows_the_product(library: CpuLibrary, format_: str, activation: str) -> None:
    for rows in (1, 3, 8, 20):
        case = make_case(library, format_, 72, 41, rows=rows, bias=True)
        x_MK = integers(rows, 72) / 256
        got_MN = single.linear(library, case.packed, x_MK, finish=Finish.ACTIVATE, activation=activation)
        want_MN = reference.ACTIVATIONS[activation](case.twin(x_MK))
        assert_near(got_MN, want_MN, case.magnitude(x_MK) + 1.0, tolerance=4e-6)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("inner", [1, 16, 37, 64, 172])
def test_gate_multiplies_pairs_of_panels(library: CpuLibrary, format_: str, inner: int) -> None:
    for rows in (1, 4, 5, 33):
        x_MK = integers(rows, 72) / 256
        gate_NK, up_NK = (_weights(format_, inner, 72, seed=seed) for seed in (1, 2))
        packed = _packed(library, format_, tuple(interleaved(*pair) for pair in zip(gate_NK, up_NK)))
        got_MN = single.linear(library, packed, x_MK, finish=Finish.GATE, activation="silu")
        gate_MN, up_MN = (_product(library, format_, parts, x_MK) for parts in (gate_NK, up_NK))
        want_MN = reference.gated(gate_MN, up_MN, activation="silu")
        torch.testing.assert_close(got_MN[:, :inner], want_MN, rtol=2e-5, atol=2e-5)
        assert got_MN[:, inner:].eq(0.0).all()


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("num_outputs", [1, 7, 64, 172, 1000])
def test_arg_max_is_that_of_the_stored_rows(
    library: CpuLibrary, format_: str, softcap: float, num_outputs: int
) -> None:
    for rows in (1, 3, 6, 40):
        case = make_case(library, format_, 24, num_outputs, rows=rows, group_size=8, bias=True)
        x_MK = integers(rows, 24) / 64
        stored_MN = single.linear(library, case.packed, x_MK, softcap=softcap)
        got_M = single.linear(library, case.packed, x_MK, finish=Finish.ARG_MAX, softcap=softcap)
        assert torch.equal(got_M, reference.arg_max(stored_MN))
        assert_near(
            stored_MN, reference.softcapped(case.twin(x_MK), softcap), case.magnitude(x_MK) + 5.0, tolerance=4e-6
        )


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 6, 20])
def test_arg_max_takes_the_lowest_of_equals(library: CpuLibrary, format_: str, rows: int) -> None:
    """Equal features a lane, a panel and a tile of panels apart."""
    for places in ((0, 5), (5, 6), (3, 19), (15, 16), (31, 32), (20, 70, 99), (97, 98)):
        bias_N = torch.zeros(100)
        bias_N[list(places)] = 1.0
        weights = tuple(
            torch.zeros_like(part) if index < 1 else part for index, part in enumerate(_weights(format_, 100, 16))
        )
        if format_.endswith("grouped"):
            weights = (weights[0], weights[1], torch.zeros_like(weights[2]))
        packed = _packed(library, format_, weights, bias_N=bias_N)
        got_M = single.linear(library, packed, integers(rows, 16), finish=Finish.ARG_MAX)
        assert got_M.tolist() == [places[0]] * rows


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("rows", [1, 4, 6, 33])
def test_arg_max_is_minus_one_for_a_row_with_nan_only(library: CpuLibrary, format_: str, rows: int) -> None:
    case = make_case(library, format_, 24, 50, rows=rows, group_size=8)
    x_MK = integers(rows, 24)
    clean_M = single.linear(library, case.packed, x_MK, finish=Finish.ARG_MAX)
    x_MK[rows // 2, 3] = math.nan
    got_M = single.linear(library, case.packed, x_MK, finish=Finish.ARG_MAX)
    kept = torch.arange(rows) != rows // 2
    assert int(got_M[rows // 2]) == -1
    assert torch.equal(got_M[kept], clean_M[kept])


@pytest.mark.parametrize("place", [0, 17, 40, 49])
def test_arg_max_sees_one_nan_and_infinities(library: CpuLibrary, place: int) -> None:
    """A NaN may come from the bias alone; all of minus infinity is still a choice."""
    weight_NK = torch.zeros(50, 8)
    for value, want in ((math.nan, -1), (math.inf, place)):
        bias_N = torch.zeros(50)
        bias_N[place] = value
        packed = pack_float(library, weight_NK, bias_N=bias_N)
        assert single.linear(library, packed, torch.ones(3, 8), finish=Finish.ARG_MAX).tolist() == [want] * 3
    packed = pack_float(library, weight_NK, bias_N=torch.full((50,), -math.inf))
    assert single.linear(library, packed, torch.ones(1, 8), finish=Finish.ARG_MAX).tolist() == [0]


def _weights(format_: str, num_outputs: int, num_inputs: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    """A weight as its format's tensors, output features first."""
    generator = torch.Generator().manual_seed(seed)
    if format_ in ("float32", "bfloat16"):
        return (torch.randn(num_outputs, num_inputs, generator=generator).to(getattr(torch, format_)),)
    if format_ == "int8":
        ints_NK = torch.randint(-127, 128, (num_outputs, num_inputs), generator=generator).to(torch.int8)
        return ints_NK, torch.rand(num_outputs, generator=generator) / 64
    top = 16 if format_ == "int4_grouped" else 256
    ints_NK = torch.randint(0, top, (num_outputs, num_inputs), generator=generator).to(torch.uint8)
    groups = -(-num_inputs // 8)
    # Scales of one size let AMX's bytes hold the weights without loss.
    scales_NG = torch.full((num_outputs, groups), 2.0**-7, dtype=torch.float16)
    return ints_NK, scales_NG, torch.full((num_outputs, groups), top // 2, dtype=torch.uint8)


def _packed(library: CpuLibrary, format_: str, parts: tuple[Tensor, ...], *, bias_N: Tensor | None = None):
    if len(parts) == 1:
        return pack_float(library, parts[0], bias_N=bias_N)
    if len(parts) == 2:
        return pack_int8(library, parts[0], parts[1], bias_N=bias_N)
    return pack_grouped(library, *parts, bits=4 if format_ == "int4_grouped" else 8, group_size=8, bias_N=bias_N)


def _product(library: CpuLibrary, format_: str, parts: tuple[Tensor, ...], x_MK: Tensor) -> Tensor:
    return single.linear(library, _packed(library, format_, parts), x_MK)
