"""Norms with their residual sum and gates equal their torch twins on odd widths, NaN and infinities included."""

from __future__ import annotations

import pytest
import torch
from near import assert_near, normal

pytest.importorskip("triton", reason="triton comes with the gpu extra")

from burnish.kernels.gpu import rows, twins

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "offset"), [(1, 1, 0.0), (3, 172, 0.0), (2, 1000, 1.0), (1, 7, 1.0)])
@pytest.mark.parametrize("adds", [True, False])
def test_norm_equals_its_twin(
    device: torch.device, dtype: torch.dtype, tokens: int, width: int, offset: float, adds: bool
) -> None:
    x = normal(tokens, width, seed=1, dtype=dtype, device=device, scale=3.0)
    added = normal(tokens, width, seed=2, dtype=dtype, device=device) if adds else None
    weight = normal(width, seed=3, dtype=dtype, device=device) + 1
    found = rows.add_rmsnorm(x, added, weight, eps=1e-6, offset=offset)
    expected = twins.add_rmsnorm(x, added, weight, eps=1e-6, offset=offset)
    assert_near(found[0], expected[0], dtype=dtype)
    assert_near(found[1], expected[1], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(rows.GATES))
@pytest.mark.parametrize(("tokens", "inner"), [(1, 1), (3, 172), (2, 1100)])
def test_gate_equals_its_twin(
    device: torch.device, dtype: torch.dtype, activation: str, tokens: int, inner: int
) -> None:
    gate_up = normal(tokens, 2 * inner, seed=inner, dtype=dtype, device=device, scale=8.0)
    assert_near(rows.gated(gate_up, activation=activation), twins.gated(gate_up, activation=activation), dtype=dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("activation", sorted(rows.GATES))
def test_what_is_no_number_stays_so(device: torch.device, activation: str) -> None:
    gate_up = torch.tensor([[float("nan"), 1.0, float("inf"), -60.0, 1.0, float("nan"), 1.0, 1.0]], device=device)
    found, expected = (kernel.gated(gate_up, activation=activation) for kernel in (rows, twins))
    torch.testing.assert_close(found, expected, equal_nan=True)
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]], device=device)
    weight = torch.ones(3, device=device)
    assert rows.add_rmsnorm(x, None, weight, eps=1e-6, offset=0.0)[1].isnan().tolist() == [[True] * 3, [False] * 3]
