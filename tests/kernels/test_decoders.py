"""Whole steps of the compiled kernels against the torch decoder: every kind of configuration, every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from decoder_cases import (
    CONFIGS,
    MAX_LENGTH,
    make_backend,
    make_decoder,
    make_prompts,
    make_step,
    run_chunks,
    worst_error,
)
from torch import Tensor, nn

from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.int8_linear import Int8Linear
from burnish.compress.quantized_weight import QuantizedWeight
from burnish.engine.cpu_backend import supports
from burnish.engine.torch_backend import TorchBackend
from burnish.kernels import reference
from burnish.kernels.cpu import library as cpu_library
from burnish.kernels.cpu.library import CpuLibrary
from burnish.models.decoder import Decoder
from burnish.models.linears import replace_linears

FAST_CONFIGS = ("plain", "local windows", "alibi", "output norms and soft caps")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if cpu_library.load() is None:
        pytest.skip("no compiled kernels here")


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_steps_equal_the_decoder(library: CpuLibrary, name: str) -> None:
    decoder, prompts = make_decoder(**CONFIGS[name]), make_prompts()
    assert worst_error(decoder, prompts, run_chunks(make_backend(decoder, library), prompts)) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_short_caches_equal_the_decoder_over_rounded_keys(
    library: CpuLibrary, name: str, kv_dtype: torch.dtype
) -> None:
    decoder, prompts = make_decoder(**CONFIGS[name]), make_prompts()
    logits = run_chunks(make_backend(decoder, library, kv_dtype=kv_dtype), prompts)
    # A number on the edge may be stored one step off: 1/256 of itself in bfloat16, 1/127 of the largest in int8. AMX
    # rounds queries and weights to bfloat16 as well, where heads fill its tiles.
    tiled = library.isa == "amx" and kv_dtype == torch.bfloat16 and decoder.config.head_dim % 32 == 0
    assert worst_error(decoder, prompts, logits, kv_dtype=kv_dtype) < (3e-2 if tiled else 4e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_steps_are_no_further_off_than_torchs(library: CpuLibrary, name: str) -> None:
    """Both against the same weights computed in float32."""
    short, prompts = make_decoder(dtype=torch.bfloat16, **CONFIGS[name]), make_prompts()
    logits = run_chunks(make_backend(short, library, kv_dtype=torch.bfloat16), prompts)
    with torch.inference_mode():
        torchs = [short(torch.tensor([prompt])).float()[0] for prompt in prompts]
    exact = make_decoder(dtype=torch.bfloat16, **CONFIGS[name]).float()
    assert worst_error(exact, prompts, logits) < max(1.2 * worst_error(exact, prompts, torchs), 1e-3)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_stretching_rotation_equals_torchs_steps(library: CpuLibrary, scaling: str) -> None:
    """Keys stay as they were rotated when their chunk came, so torch has to see the same chunks."""
    rope = {"rope_type": "dynamic", "factor": 4.0}
    if scaling == "longrope":
        factors = {"short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 4.0, 5.0, 8.0]}
        rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, **factors}
    decoder, prompts = make_decoder(rope_scaling=rope, max_position_embeddings=32), make_prompts()
    got = run_chunks(make_backend(decoder, library), prompts)
    want = run_chunks(TorchBackend(decoder, num_blocks=24, block_size=16), prompts)
    torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", FAST_CONFIGS)
def test_threads_change_nothing(threads: int, name: str) -> None:
    decoder, prompts = make_decoder(**CONFIGS[name]), make_prompts()
    alone = run_chunks(make_backend(decoder, None), prompts)
    together = run_chunks(make_backend(decoder, None, threads=threads), prompts)
    assert torch.equal(torch.cat(alone), torch.cat(together))


def test_more_threads_than_work_change_nothing() -> None:
    decoder = make_decoder(num_layers=1, hidden_size=8, intermediate_size=8, vocab_size=9)
    step = make_step([[3]], [0], [[0]])
    want = make_backend(decoder, None).forward(step, greedy=False)
    backend = make_backend(decoder, None, threads=6)
    assert torch.equal(backend.forward(step, greedy=False), want)
    assert backend.forward(step, greedy=True).tolist() == want.argmax(dim=-1).tolist()


def test_steps_larger_than_expected_make_the_buffers_grow(library: CpuLibrary) -> None:
    decoder, prompts = make_decoder(), make_prompts()
    roomy = run_chunks(make_backend(decoder, library), prompts)
    tight = run_chunks(make_backend(decoder, library, max_tokens=3), prompts)
    assert torch.equal(torch.cat(roomy), torch.cat(tight))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_steps_longer_than_the_cache_of_a_core_equal_single_tokens(library: CpuLibrary, kind: str) -> None:
    """Rows are multiplied in slabs that fit; 330 rows of 4096 features are several of them."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    decoder = make_decoder(num_layers=1, hidden_size=32, intermediate_size=4096, dtype=dtype)
    if kind == "int8":
        replace_linears(decoder, lambda name, linear: Int8Linear.from_linear(linear))
    tokens = torch.randint(0, 199, (330,), generator=torch.Generator().manual_seed(0)).tolist()
    backend = make_backend(decoder, library, max_model_len=512)
    table = list(range(24))
    whole = backend.forward(make_step([tokens], [0], [table]), greedy=False).clone()
    ids = backend.forward(make_step([tokens], [0], [table]), greedy=True)
    assert torch.equal(ids, whole.argmax(dim=-1))
    parts = [
        backend.forward(make_step([tokens[start : start + 66]], [start], [table]), greedy=False).clone()
        for start in range(0, 330, 66)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=2e-3)


def test_many_heads_on_one_kv_head_equal_the_decoder(library: CpuLibrary) -> None:
    """More query rows for one token than attention takes at once."""
    decoder = make_decoder(num_heads=36, num_kv_heads=1, head_dim=8, rotary_dim=8)
    prompts = make_prompts()
    assert worst_error(decoder, prompts, run_chunks(make_backend(decoder, library), prompts)) < 1e-5


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_blocks_out_of_every_window_are_not_read(library: CpuLibrary, kv_dtype: torch.dtype) -> None:
    decoder = make_decoder(sliding_window=10)
    tokens = make_prompts((60,))[0]
    logits = []
    for freed in (False, True):
        backend = make_backend(decoder, library, kv_dtype=kv_dtype)
        backend.forward(make_step([tokens[:48]], [0], [[4, 1, 3]]), greedy=False)
        # A query at 48 sees 39 and later: block 2.
        table = [-1, -1, 3, 0] if freed else [4, 1, 3, 0]
        logits.append(backend.forward(make_step([tokens[48:]], [48], [table]), greedy=False).clone())
    assert torch.equal(logits[0], logits[1])


def test_steps_without_logits_only_fill_the_cache(library: CpuLibrary) -> None:
    decoder, prompts = make_decoder(), make_prompts()
    backend = make_backend(decoder, library)
    for greedy in (True, False):
        step = make_step([prompts[0][:30]], [0], [[0, 1, 2]])
        step.__dict__["logit_rows_L"] = step.logit_rows_L[:0]
        assert backend.forward(step, greedy=greedy).shape[0] == 0
    rest = backend.forward(make_step([prompts[0][30:]], [30], [[0, 1, 2]]), greedy=False)
    with torch.inference_mode():
        want = decoder(torch.tensor([prompts[0]]))[0, 30:]
    torch.testing.assert_close(rest, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["plain", "window", "heads of 64"])
def test_one_sequences_nan_stays_with_it(library: CpuLibrary, kv_dtype: torch.dtype, name: str) -> None:
    """Beside it in a step, and in blocks that it leaves to others."""
    decoder, prompts = make_decoder(**CONFIGS[name]), make_prompts((21, 21))
    bad = 7
    prompts = [[token if token != bad else 8 for token in prompt] for prompt in prompts]
    clean = make_backend(decoder, library, kv_dtype=kv_dtype)
    step = make_step([prompts[0], prompts[1]], [0, 0], [[0, 1], [2, 3]])
    want = clean.forward(step, greedy=False).clone()
    with torch.no_grad():
        decoder.model.embed_tokens.weight[bad] = math.nan
    backend = make_backend(decoder, library, kv_dtype=kv_dtype)
    step = make_step([prompts[0], [bad] * 21], [0, 0], [[0, 1], [2, 3]])
    assert torch.equal(backend.forward(step, greedy=False)[:21], want[:21])
    assert backend.forward(step, greedy=True)[21:].tolist() == [-1] * 21
    # Shorter than what lay there: what the last block still holds behind its end is not to be read.
    for length in (11, 18):
        reused = make_step([prompts[1][:length]], [0], [[2, 3]])
        got = backend.forward(reused, greedy=False)
        torch.testing.assert_close(got, want[21 : 21 + length], rtol=1e-4, atol=1e-4)


def test_reset_forgets_the_cache(library: CpuLibrary) -> None:
    decoder, prompts = make_decoder(), make_prompts((20,))
    backend = make_backend(decoder, library, kv_dtype=torch.int8)
    step = make_step([prompts[0]], [0], [[0, 1]])
    want = backend.forward(step, greedy=False).clone()
    held = backend.kv_bytes
    for tensor in backend._cache:
        tensor.fill_(math.nan if tensor.is_floating_point() else 127)
    backend.reset()
    assert not any(tensor.any() for tensor in backend._cache)
    assert backend.kv_bytes == held
    assert torch.equal(backend.forward(step, greedy=False), want)


@pytest.mark.parametrize("name", FAST_CONFIGS)
def test_taking_the_weights_over_changes_nothing(name: str) -> None:
    decoder, prompts = make_decoder(**CONFIGS[name]), make_prompts()
    want = run_chunks(make_backend(decoder, None), prompts)
    backend = make_backend(decoder, None, consume=True)
    layer = decoder.model.layers[0]
    assert layer.mlp.down_proj.weight.numel() == 0
    assert torch.equal(torch.cat(run_chunks(backend, prompts)), torch.cat(want))


# ---- quantized linears -----------------------------------------------------------------------------------------------


class TwinGrouped(nn.Module):
    """A grouped linear by its torch twin, 8-bit activations included."""

    def __init__(self, layer: GroupQuantizedLinear) -> None:
        super().__init__()
        whole = layer.quantized()
        order_K = torch.argsort(whole.g_idx, stable=True)
        self.twin: Callable[[Tensor], Tensor] = lambda x_MK: reference.linear_grouped(
            x_MK,
            whole.ints[:, order_K],
            whole.scales,
            whole.zeros,
            group_size=layer.group_size,
            order_K=order_K,
            bias_N=layer.bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _group_quantized(linear: nn.Linear, *, bits: int, group_size: int, ordered: bool, seed: int = 0) -> nn.Module:
    weight_NK = linear.weight.detach()
    num_outputs, num_inputs = weight_NK.shape
    width = num_inputs if group_size == -1 else group_size
    g_idx = torch.arange(num_inputs) // width
    if not ordered:
        g_idx = g_idx[torch.randperm(num_inputs, generator=torch.Generator().manual_seed(seed))]
    groups = int(g_idx.max()) + 1
    top = (1 << bits) - 1
    scales_NG, zeros_NG = torch.empty(num_outputs, groups), torch.empty(num_outputs, groups)
    for group in range(groups):
        low_N, high_N = torch.aminmax(weight_NK[:, g_idx == group], dim=1)
        scales_NG[:, group] = ((high_N.clamp_min(0) - low_N.clamp_max(0)) / top).clamp_min(1e-4)
        zeros_NG[:, group] = (-low_N.clamp_max(0) / scales_NG[:, group]).round().clamp(1, top)
    scales_NG = scales_NG.to(torch.float16)
    ints_NK = (weight_NK / scales_NG.float()[:, g_idx] + zeros_NG[:, g_idx]).round().clamp(0, top)
    quantized = QuantizedWeight(
        ints=ints_NK.to(torch.uint8),
        scales=scales_NG,
        zeros=zeros_NG.to(torch.uint8),
        g_idx=g_idx.to(torch.int32),
        bits=bits,
        group_size=group_size,
    )
    bias = None if linear.bias is None else linear.bias.detach()
    return GroupQuantizedLinear.from_quantized(quantized, bias=bias)


def _quantized_pair(*, bits: int, group_size: int, ordered: bool, **fields: object) -> tuple[Decoder, Decoder]:
    """A decoder with packed grouped linears, and one with their twins."""
    pair = []
    for twin in (False, True):
        decoder = make_decoder(hidden_size=64, intermediate_size=104, **fields)

        def swap(name: str, linear: nn.Linear, twin: bool = twin) -> nn.Module:
            layer = _group_quantized(linear, bits=bits, group_size=group_size, ordered=ordered)
            assert isinstance(layer, GroupQuantizedLinear)
            return TwinGrouped(layer) if twin else layer

        replace_linears(decoder, swap)
        pair.append(decoder)
    return pair[0], pair[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "ordered"), [(32, True), (8, False), (24, False), (-1, True)], ids=lambda value: str(value)
)
def test_grouped_decoder_equals_its_twin(library: CpuLibrary, bits: int, group_size: int, ordered: bool) -> None:
    decoder, twin = _quantized_pair(bits=bits, group_size=group_size, ordered=ordered, qkv_bias=True)
    prompts = make_prompts()
    worst = worst_error(twin, prompts, run_chunks(make_backend(decoder, library), prompts))
    # AMX rounds the weights once more (see the twin's `requantized`); an activation on the edge may go either way.
    assert worst < (0.15 if library.isa == "amx" else 2e-2)


def test_prepared_grouped_linears_equal_packed_ones() -> None:
    decoder, _ = _quantized_pair(bits=4, group_size=16, ordered=False)
    prompts = make_prompts()
    packed = run_chunks(make_backend(decoder, None), prompts)
    for module in decoder.modules():
        if isinstance(module, GroupQuantizedLinear):
            module.prepare()
    assert torch.equal(torch.cat(run_chunks(make_backend(decoder, None), prompts)), torch.cat(packed))


@pytest.mark.parametrize("name", FAST_CONFIGS)
def test_int8_decoder_equals_its_twin(library: CpuLibrary, name: str) -> None:
    decoder, prompts = make_decoder(**CONFIGS[name]), make_prompts()
    replace_linears(decoder, lambda name, linear: Int8Linear.from_linear(linear))
    logits = run_chunks(make_backend(decoder, library), prompts)
    assert worst_error(decoder, prompts, logits) < 2e-2


def test_columns_in_different_orders_are_left_to_torch() -> None:
    decoder = make_decoder(hidden_size=64)
    seeds = iter(range(1000))
    replace_linears(
        decoder,
        lambda name, linear: _group_quantized(linear, bits=4, group_size=16, ordered=False, seed=next(seeds)),
    )
    reason = supports(decoder, torch.float32)
    assert reason is not None
    assert "order their columns differently" in reason


def test_groups_of_broken_eights_are_left_to_torch() -> None:
    decoder = make_decoder(hidden_size=64)
    replace_linears(decoder, lambda name, linear: _group_quantized(linear, bits=4, group_size=12, ordered=True))
    assert "group size is 12" in (supports(decoder, torch.float32) or "")


def test_longest_sequence_fits_the_buffers(library: CpuLibrary) -> None:
    """The last position of the longest sequence, in a cache whose last block is the last."""
    decoder = make_decoder(num_layers=1)
    tokens = make_prompts((MAX_LENGTH,))[0]
    backend = make_backend(decoder, library, num_blocks=MAX_LENGTH // 16)
    table = list(range(MAX_LENGTH // 16))
    backend.forward(make_step([tokens[:-1]], [0], [table]), greedy=False)
    last = backend.forward(make_step([tokens[-1:]], [MAX_LENGTH - 1], [table]), greedy=False)
    with torch.inference_mode():
        want = decoder(torch.tensor([tokens]))[0, -1:]
    torch.testing.assert_close(last, want, rtol=1e-4, atol=1e-4)
