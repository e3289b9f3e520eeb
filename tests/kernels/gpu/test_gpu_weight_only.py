"""Weight-only products equal their torch twin and the layers they stand for, whatever the groups."""

from __future__ import annotations

import pytest
import torch
from near import MATRIX_DTYPES, assert_near, normal

pytest.importorskip("triton", reason="triton comes with the gpu extra")

from burnish.kernels.gpu import twins, weight_only
from burnish.kernels.gpu.grouped_weight import GroupedWeight, join_grouped_weights, pack_grouped_weight


def made(
    device: torch.device, out: int, inner: int, *, bits: int, group: int, shuffled: bool = False, seed: int = 0
) -> tuple[GroupedWeight, torch.Tensor]:
    """A random weight and what it stands for, (out, inner) float32."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inner // group)
    g_idx = torch.arange(inner) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(inner, generator=generator)]
    scales = (torch.rand(out, groups, generator=generator) * 0.1 + 0.01).half()
    if bits == 4:
        ints = torch.randint(0, 16, (out, inner), generator=generator).to(torch.uint8)
        zeros = torch.randint(0, 16, (out, groups), generator=generator).to(torch.uint8)
        dense = (ints.float() - zeros.float()[:, g_idx]) * scales.float()[:, g_idx]
    else:
        ints, zeros = torch.randint(-127, 128, (out, inner), generator=generator).to(torch.int8), None
        dense = ints.float() * scales.float()[:, g_idx]
    moved = [None if one is None else one.to(device) for one in (ints, scales, zeros, g_idx)]
    return pack_grouped_weight(*moved, bits=bits), dense.to(device)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "out", "inner", "group", "shuffled", "splits"),
    [
        (1, 1, 7, 7, False, 1),
        (3, 70, 172, 64, False, 2),
        (17, 64, 200, 40, False, 1),
        (2, 65, 96, 24, True, 3),
        (5, 7, 1000, 128, False, 8),
        (0, 7, 64, 64, False, 1),
    ],
)
def test_few_rows_equal_the_dense_product(
    device: torch.device, bits: int, rows: int, out: int, inner: int, group: int, shuffled: bool, splits: int
) -> None:
    weight, dense = made(device, out, inner, bits=bits, group=group, shuffled=shuffled)
    x = normal(rows, inner, seed=4, dtype=torch.float32, device=device)
    bias = normal(out, seed=5, dtype=torch.float32, device=device) if out > 1 else None
    found = weight_only.weight_only_linear(x, weight, bias, splits=splits)
    assert_near(found, torch.nn.functional.linear(x, dense, bias), dtype=torch.float32)
    assert_near(found, twins.weight_only_linear(x, weight, bias), dtype=torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("rows", [2, 70])
def test_activations_keep_their_dtype(device: torch.device, dtype: torch.dtype, bits: int, rows: int) -> None:
    weight, _ = made(device, 40, 160, bits=bits, group=64)
    x = normal(rows, 160, seed=6, dtype=dtype, device=device)
    bias = normal(40, seed=7, dtype=dtype, device=device)
    found = weight_only.weight_only_linear(x, weight, bias)
    assert found.dtype == dtype
    assert_near(found, twins.weight_only_linear(x, weight, bias), dtype=dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_go_slab_by_slab(device: torch.device, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(weight_only, "SLAB_WEIGHTS", 96 * 13)
    weight, dense = made(device, 30, 72, bits=bits, group=24, shuffled=True)
    x = normal(66, 72, seed=8, dtype=torch.float32, device=device)
    bias = normal(30, seed=9, dtype=torch.float32, device=device)
    assert_near(
        weight_only.weight_only_linear(x, weight, bias), torch.nn.functional.linear(x, dense, bias), dtype=torch.float32
    )


def test_joined_weights_give_both_results(device: torch.device) -> None:
    pairs = [made(device, out, 96, bits=4, group=32, seed=out) for out in (5, 9)]
    joined = join_grouped_weights([weight for weight, _ in pairs])
    assert joined is not None
    x = normal(2, 96, seed=1, dtype=torch.float32, device=device)
    expected = torch.nn.functional.linear(x, torch.cat([dense for _, dense in pairs]))
    assert_near(weight_only.weight_only_linear(x, joined, None), expected, dtype=torch.float32)


def test_weights_whose_columns_differ_are_not_joined(device: torch.device) -> None:
    plain, _ = made(device, 5, 96, bits=4, group=32)
    for options in ({"group": 96}, {"group": 32, "shuffled": True}):
        other, _ = made(device, 5, 96, bits=4, **options)  # type: ignore[arg-type]
        assert join_grouped_weights([plain, other]) is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_that_are_no_numbers_stay_apart(device: torch.device) -> None:
    weight, _ = made(device, 9, 64, bits=4, group=64)
    x = normal(3, 64, seed=1, dtype=torch.float32, device=device)
    x[1, 5], x[2, 0] = float("nan"), float("inf")
    found = weight_only.weight_only_linear(x, weight, None)
    assert torch.isfinite(found[0]).all()
    assert not torch.isfinite(found[1:]).any()
