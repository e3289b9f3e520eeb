"""Products of the compiled kernels against their torch twins: every format, every instruction set.

Shapes: M rows, N output features, K input features.
"""

from __future__ import annotations

import pytest
import torch
from linear_cases import FEWEST_TILED_ROWS, FEWEST_WIDENED_ROWS, FORMATS, GROUPED, assert_near, integers, make_case

from burnish.errors import ConfigError
from burnish.kernels import reference
from burnish.kernels.cpu import library as cpu_library
from burnish.kernels.cpu import single
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.packing import pack_float, pack_grouped, pack_int8

SHAPES = [(1, 1), (7, 64), (64, 7), (172, 172), (1000, 64), (172, 1000), (65, 33)]


def _activations(rows: int, num_inputs: int) -> torch.Tensor:
    return torch.randn(rows, num_inputs, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_product_equals_the_twin_for_odd_sizes(
    library: CpuLibrary, format_: str, num_inputs: int, num_outputs: int
) -> None:
    for rows in (1, 4, 5, 17, 33):
        case = make_case(library, format_, num_inputs, num_outputs, rows=rows, bias=rows % 2 == 1)
        x_MK = _activations(rows, num_inputs)
        assert_near(single.linear(library, case.packed, x_MK), case.twin(x_MK), case.magnitude(x_MK))


@pytest.mark.parametrize("format_", FORMATS)
def test_product_equals_the_twin_for_each_number_of_rows(library: CpuLibrary, format_: str) -> None:
    for rows in (*range(1, 41), 513):
        case = make_case(library, format_, 172, 72, rows=rows)
        x_MK = integers(rows, 172)
        assert_near(single.linear(library, case.packed, x_MK), case.twin(x_MK), case.magnitude(x_MK))


@pytest.mark.parametrize("format_", GROUPED)
@pytest.mark.parametrize("group_size", [8, 32, 72, 128, -1])
@pytest.mark.parametrize("ordered", [True, False])
def test_grouped_product_equals_the_twin_for_groups_that_leave_a_rest(
    library: CpuLibrary, format_: str, group_size: int, ordered: bool
) -> None:
    for num_inputs in (7, 64, 172, 200):
        for rows in (1, 3, FEWEST_TILED_ROWS, FEWEST_WIDENED_ROWS):
            case = make_case(
                library, format_, num_inputs, 40, rows=rows, group_size=group_size, bias=True, ordered=ordered
            )
            x_MK = _activations(rows, num_inputs)
            assert_near(single.linear(library, case.packed, x_MK), case.twin(x_MK), case.magnitude(x_MK))


@pytest.mark.parametrize("format_", GROUPED)
def test_tiled_grouped_product_stays_close_to_the_groups(format_: str) -> None:
    """AMX has no scale per group: a weight is rounded once more, by at most half of 1/127 of its column's largest."""
    if "amx" not in cpu_library.available_isas():
        pytest.skip("no AMX here")
    library = cpu_library.load("amx")
    assert library is not None
    exact = make_case(library, format_, 200, 40, rows=1)
    x_MK = _activations(20, 200)
    got_MN = single.linear(library, exact.packed, x_MK)
    step_N = exact.weight_NK.abs().amax(dim=1) / 127
    # What 8-bit activations may be off by comes on top of x itself.
    bound_MN = 0.5 * (x_MK.abs() * 1.01).sum(dim=1)[:, None] * step_N
    assert ((got_MN - exact.twin(x_MK)).abs() <= bound_MN).all()
    assert not torch.equal(got_MN, exact.twin(x_MK))


@pytest.mark.parametrize("format_", ["int8", *GROUPED])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16, 31, 33])
def test_integer_product_is_exact(library: CpuLibrary, format_: str, rows: int) -> None:
    for num_inputs, num_outputs in ((1, 5), (172, 40), (1000, 33)):
        case = make_case(library, format_, num_inputs, num_outputs, rows=rows, exact=True)
        x_MK = integers(rows, num_inputs)
        assert torch.equal(single.linear(library, case.packed, x_MK), case.twin(x_MK))


@pytest.mark.parametrize("format_", ["int8", *GROUPED])
@pytest.mark.parametrize("sign", [-1, 1])
def test_integer_sums_do_not_saturate(library: CpuLibrary, format_: str, sign: int) -> None:
    """All products as large as they get, past 16 bits at once, and at the most features that 32 bits hold."""
    num_inputs = 66304 if format_ == "int8" else 4096
    for rows in (1, 3, 6):
        x_MK = torch.full((rows, num_inputs), 127.0 * sign)
        if format_ == "int8":
            ints_NK = torch.full((17, num_inputs), 127, dtype=torch.int8)
            ints_NK[1::2] = -127
            packed = pack_int8(library, ints_NK, torch.ones(17))
            want_N = ints_NK.double().sum(dim=1) * 127 * sign
        else:
            bits = 4 if format_ == "int4_grouped" else 8
            groups = num_inputs // 128
            ints_NK = torch.full((17, num_inputs), (1 << bits) - 1, dtype=torch.uint8)
            ints_NK[1::2] = 0
            zeros_NG = torch.zeros(17, groups, dtype=torch.uint8)
            zeros_NG[1::2] = (1 << bits) - 1
            scales_NG = torch.ones(17, groups, dtype=torch.float16)
            packed = pack_grouped(library, ints_NK, scales_NG, zeros_NG, bits=bits, group_size=128)
            want_N = (ints_NK.double().sum(dim=1) - zeros_NG.double().sum(dim=1) * 128) * 127 * sign
        got_MN = single.linear(library, packed, x_MK)
        torch.testing.assert_close(got_MN.double(), want_N.expand(rows, -1), rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 33])
def test_bad_activations_spoil_their_own_row_only(library: CpuLibrary, format_: str, bad: float, rows: int) -> None:
    case = make_case(library, format_, 100, 40, rows=rows, bias=True, ordered=False)
    x_MK = _activations(rows, 100)
    clean_MN = single.linear(library, case.packed, x_MK)
    row = rows // 2
    x_MK[row, 37] = bad
    got_MN = single.linear(library, case.packed, x_MK)
    kept = torch.arange(rows) != row
    assert torch.equal(got_MN[kept], clean_MN[kept])
    if format_ in ("float32", "bfloat16"):
        torch.testing.assert_close(got_MN[row], case.twin(x_MK)[row], equal_nan=True, rtol=1e-4, atol=1e-4)
        assert not got_MN[row].isfinite().any()
    else:
        assert got_MN[row].isnan().all()


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("rows", [1, 6, 20])
def test_rows_of_zeros_give_the_bias(library: CpuLibrary, format_: str, rows: int) -> None:
    case = make_case(library, format_, 72, 40, rows=rows, bias=True)
    assert case.bias_N is not None
    got_MN = single.linear(library, case.packed, torch.zeros(rows, 72))
    assert torch.equal(got_MN, case.bias_N.expand(rows, -1))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e30, 1e36])
@pytest.mark.parametrize("rows", [1, 6])
def test_tiny_and_huge_activations_stay_in_proportion(
    library: CpuLibrary, format_: str, size: float, rows: int
) -> None:
    case = make_case(library, format_, 72, 40, rows=rows)
    x_MK = integers(rows, 72) / 32 * size
    got_MN = single.linear(library, case.packed, x_MK)
    assert got_MN.isfinite().all()
    # Subnormal numbers may count as zeros: processors' matrix units drop them.
    off_MN = (got_MN.double() - case.twin(x_MK).double()).abs()
    assert (off_MN <= 4e-6 * case.magnitude(x_MK) + 1e-35 * case.weight_NK.abs().sum(dim=1)).all()


@pytest.mark.parametrize("format_", ["int8", *GROUPED])
def test_tiny_and_huge_weight_scales_are_held(library: CpuLibrary, format_: str) -> None:
    """Float16 subnormals, zero and the largest float16 among the scales; a column of zeros alone."""
    x_MK = integers(3, 64)
    if format_ == "int8":
        scale_N = torch.tensor([1e-38, 1e-20, 0.0, 1e20, 1.0])
        ints_NK = torch.randint(-127, 128, (5, 64)).to(torch.int8)
        got_MN = single.linear(library, pack_int8(library, ints_NK, scale_N), x_MK)
        want_MN = reference.linear_int8(x_MK, ints_NK, scale_N)
    else:
        bits = 4 if format_ == "int4_grouped" else 8
        scales_NG = torch.tensor([[6e-8, 6e-5], [0.0, 0.0], [65504.0, 65504.0], [1e-6, 1.0]]).to(torch.float16)
        ints_NK = torch.randint(0, 1 << bits, (4, 64)).to(torch.uint8)
        zeros_NG = torch.tensor([[0, 1], [3, 4], [15, 0], [7, 8]], dtype=torch.uint8)
        packed = pack_grouped(library, ints_NK, scales_NG, zeros_NG, bits=bits, group_size=32)
        got_MN = single.linear(library, packed, x_MK)
        want_MN = reference.linear_grouped(x_MK, ints_NK, scales_NG, zeros_NG, group_size=32)
    torch.testing.assert_close(got_MN, want_MN, rtol=2e-6, atol=1e-36)


def test_rows_that_lie_apart_are_read_in_place(library: CpuLibrary) -> None:
    weight_NK = torch.randn(20, 30)
    x_MK = torch.randn(4, 50)[:, :30]
    got_MN = single.linear(library, pack_float(library, weight_NK), x_MK)
    torch.testing.assert_close(got_MN, x_MK @ weight_NK.t(), rtol=1e-5, atol=1e-5)


def test_weight_that_is_a_view_packs_as_its_copy(library: CpuLibrary) -> None:
    whole = torch.randn(40, 60)
    x_MK = torch.randn(2, 20)
    view_NK = whole.t()[:30, :20]
    got = single.linear(library, pack_float(library, view_NK), x_MK)
    assert torch.equal(got, single.linear(library, pack_float(library, view_NK.clone()), x_MK))


def test_groups_of_broken_eights_are_refused(library: CpuLibrary) -> None:
    ints_NK = torch.zeros(2, 24, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="whole eights"):
        pack_grouped(library, ints_NK, torch.ones(2, 2), torch.ones(2, 2), bits=4, group_size=12)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
def test_instruction_sets_agree_with_the_plain_one(library: CpuLibrary, format_: str, rows: int) -> None:
    """Integer sums are exact everywhere; only the scaling after them may round differently (fused multiply-add)."""
    if format_ in GROUPED and library.isa == "amx" and rows >= FEWEST_WIDENED_ROWS:
        pytest.skip("AMX rounds grouped weights once more; see the twin's `requantized`")
    plain = cpu_library.load("generic")
    assert plain is not None
    case = make_case(library, format_, 172, 72, rows=rows, bias=True)
    x_MK = integers(rows, 172)
    got_MN = single.linear(library, case.packed, x_MK)
    want_MN = single.linear(plain, case.packed, x_MK)
    if format_ == "int8":
        unbiased = make_case(library, format_, 172, 72)
        assert torch.equal(single.linear(library, unbiased.packed, x_MK), single.linear(plain, unbiased.packed, x_MK))
    assert_near(got_MN, want_MN, case.magnitude(x_MK), tolerance=1e-6)
