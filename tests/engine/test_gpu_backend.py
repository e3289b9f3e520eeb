"""The Triton backend decodes as the torch one and transformers do; here on the CPU under Triton's interpreter.

The interpreter takes about a millisecond for a program, hence so few and so short prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_cache import make_sequence

pytest.importorskip("triton", reason="triton comes with the gpu extra")

from burnish.compress.optimised_layers import quantize_in_place
from burnish.engine.gpu_backend import GpuBackend, supports
from burnish.engine.gpu_graphs import BUCKETS, Outputs
from burnish.engine.gpu_step import tile_starts
from burnish.engine.model_runner import pack_rows
from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.engine.scheduler import Row
from burnish.engine.sequence import Sequence
from burnish.engine.step import StepInputs
from burnish.engine.torch_backend import TorchBackend
from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the card runs tests/engine/test_gpu_card.py")

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [50, 51, 52]]


class ReplayedOnCpu:
    """Stands in for a captured graph: computes from the same inputs into the same outputs every time."""

    made = 0

    def __init__(self, compute: Callable[[], Outputs]) -> None:
        ReplayedOnCpu.made += 1
        self.compute = compute
        self.outputs = tuple(output.clone() for output in compute())

    def replay(self) -> Outputs:
        for kept, new in zip(self.outputs, self.compute()):
            kept.copy_(new)
        return self.outputs[0], self.outputs[1]


def backends(decoder: Decoder, **options: Any) -> tuple[TorchBackend, GpuBackend]:
    """The same weights twice: the gpu backend takes its own copy over."""
    twin = Decoder(decoder.config).to(decoder.dtype).eval()
    twin.load_state_dict(decoder.state_dict())
    return (
        TorchBackend(decoder, num_blocks=8, block_size=4, kv_dtype=options.get("kv_dtype")),
        GpuBackend(
            twin,
            num_blocks=8,
            block_size=4,
            max_model_len=32,
            **{"kv_dtype": decoder.dtype, "make_graph": ReplayedOnCpu, **options},
        ),
    )


def sequences() -> tuple[Sequence, Sequence]:
    first, second = (make_sequence(index, list(prompt)) for index, prompt in enumerate(PROMPTS))
    first.block_table.extend([6, 1, 3])
    second.block_table.extend([2])
    return first, second


def step_of(*rows: tuple[Sequence, int, int, int]) -> StepInputs:
    made = [
        Row(sequence=one, start=start, end=end, num_logits=wanted, drafts=(), samples=False)
        for one, start, end, wanted in rows
    ]
    return pack_rows(made, block_size=4)


def decoder_of(**fields: Any) -> Decoder:
    settings: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rotary_dim": 8,
        "max_position_embeddings": 256,
    }
    return Decoder(ModelConfig(**{**settings, **fields})).initialize(std=0.3, seed=3).eval()


def mixed_steps() -> list[StepInputs]:
    first, second = sequences()
    return [
        step_of((first, 0, 5, 2), (second, 0, 2, 0)),
        step_of((second, 2, 3, 1), (first, 5, 7, 2)),
        step_of((first, 5, 6, 1), (second, 1, 2, 1)),
    ]


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16, torch.int8])
def test_mixed_steps_equal_the_torch_backend(kv_dtype: torch.dtype) -> None:
    torch_backend, gpu = backends(decoder_of(), kv_dtype=kv_dtype, graphs=False)
    assert gpu.kv_bytes == torch_backend.kv_bytes
    tolerance = 1e-4 if kv_dtype == torch.float32 else 0.05
    for step in mixed_steps():
        found, expected = (backend.forward(step, greedy=False) for backend in (gpu, torch_backend))
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    ids_L = gpu.forward(step, greedy=True)
    assert ids_L.dtype == torch.int64
    assert ids_L.tolist() == found.argmax(-1).tolist()
    nothing = step_of((sequences()[0], 0, 2, 0))
    assert gpu.forward(nothing, greedy=True).tolist() == []


def test_float16_stays_near_float32() -> None:
    torch_backend, _ = backends(decoder_of(), graphs=False)
    gpu = GpuBackend(
        decoder_of().half(), num_blocks=8, block_size=4, kv_dtype=torch.float16, max_model_len=32, graphs=False
    )
    for step in mixed_steps():
        found, expected = (backend.forward(step, greedy=False) for backend in (gpu, torch_backend))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_linears_equal_their_dense_weights(quantize: str) -> None:
    quantized = decoder_of()
    quantize_in_place(quantized, quantize=quantize, group_size=32)
    dense = decoder_of()
    for name, module in dense.named_modules():
        twin = quantized.get_submodule(name)
        if hasattr(twin, "dequantize"):
            module.weight.data.copy_(twin.dequantize())  # type: ignore[operator, union-attr]
    linears, rest = [], []
    for name, parameter in dense.named_parameters():
        (linears if "proj" in name or "lm_head" in name else rest).append(parameter)
    torch_backend = TorchBackend(dense, num_blocks=8, block_size=4)
    gpu = GpuBackend(quantized, num_blocks=8, block_size=4, kv_dtype=torch.float32, max_model_len=32, graphs=False)
    for step in mixed_steps()[:2]:
        found, expected = (backend.forward(step, greedy=False) for backend in (gpu, torch_backend))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    # Embeddings and norms stay dense; the scales of so small groups weigh a quarter.
    most = sum(one.numel() for one in linears) * (1.0 if quantize == "int4" else 1.2)
    assert gpu.weights_bytes - sum(one.nbytes for one in rest) < most


def test_decoding_runs_in_buckets_whose_padding_touches_nothing() -> None:
    torch_backend, gpu = backends(decoder_of(), graphs=True)
    first, second = sequences()
    third = make_sequence(2, [9, 8])
    third.block_table.extend([4])
    prefill = step_of((first, 0, 6, 0), (second, 0, 2, 0), (third, 0, 1, 0))
    for backend in (torch_backend, gpu):
        backend.forward(prefill, greedy=True)
    assert gpu.captured == []
    before = [layer.clone() for layer in gpu._store.keys]
    ReplayedOnCpu.made = 0
    step = step_of((first, 6, 7, 1), (second, 2, 3, 1), (third, 1, 2, 1))
    found, expected = (backend.forward(step, greedy=False) for backend in (gpu, torch_backend))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert gpu.captured == [4]
    changed = torch.cat([(old != new).any(-1).any(-1).flatten() for old, new in zip(before, gpu._store.keys)])
    assert int(changed.sum()) == 2 * 3
    again = gpu.forward(step_of((second, 2, 3, 1), (first, 6, 7, 1)), greedy=True)
    assert gpu.captured == [2, 4]
    assert again.tolist() == expected.argmax(-1)[[1, 0]].tolist()
    gpu.forward(step, greedy=True)
    assert ReplayedOnCpu.made == 2


def test_steps_that_are_not_plain_decoding_are_not_replayed() -> None:
    _, gpu = backends(decoder_of(), graphs=True)
    first, second = sequences()
    for rows in ([(first, 0, 1, 0)], [(first, 0, 2, 2)], [(first, 0, 2, 1), (second, 0, 1, 1)]):
        gpu.forward(step_of(*rows), greedy=True)
    assert gpu.captured == []
    gpu.warm_up(3)
    assert gpu.captured == [1, 2, 4]


@pytest.mark.parametrize("mlp", ["gated", "plain"])
def test_adapters_are_added_to_their_own_sequences(mlp: str) -> None:
    plain = decoder_of(mlp=mlp)
    torch_backend, gpu = backends(plain, graphs=True)
    generator = torch.Generator().manual_seed(1)
    matrices = {
        f"model.layers.1.{role}": (torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator))
        for role, inner, out in (("self_attn.k_proj", 32, 16), ("mlp.up_proj", 32, 64), ("mlp.down_proj", 64, 32))
    }
    first, second = sequences()
    second.adapter = 0
    step = step_of((first, 0, 1, 1), (second, 0, 1, 1))
    base = gpu.forward(step_of((first, 0, 1, 1)), greedy=False).clone()
    for backend in (torch_backend, gpu):
        backend.set_adapters([matrices])
    found, expected = (backend.forward(step, greedy=False) for backend in (gpu, torch_backend))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[:1], base, atol=1e-4, rtol=1e-4)
    assert gpu.captured == [1]


def test_reset_forgets_in_place() -> None:
    _, gpu = backends(decoder_of(), graphs=False, kv_dtype=torch.int8)
    first, _ = sequences()
    gpu.forward(step_of((first, 0, 4, 1)), greedy=True)
    tensors = [*gpu._store.keys, *gpu._store.values, *gpu._store.key_scales, *gpu._store.value_scales]
    assert all(tensor.any() for tensor in tensors)
    gpu.reset()
    assert not any(tensor.any() for tensor in tensors)
    assert tensors[0] is gpu._store.keys[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_are_no_numbers_are_marked() -> None:
    broken = decoder_of()
    with torch.no_grad():
        broken.model.embed_tokens.weight[8] = float("nan")
    _, gpu = backends(broken, graphs=False)
    first, second = sequences()
    ids = gpu.forward(step_of((first, 2, 5, 2), (second, 0, 1, 1)), greedy=True).tolist()
    assert [token_id == -1 for token_id in ids] == [True, True, False]


def test_tiles_cover_every_token_once() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = generator.integers(1, 40, size=generator.integers(1, 9))
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        short, long = tile_starts(starts, few=4, many=16)
        covered = np.zeros(starts[-1], dtype=int)
        for tiles, size in ((short, 4), (long, 16)):
            for sequence, token in tiles.T:
                assert starts[sequence] <= token < starts[sequence + 1]
                covered[token : min(token + size, starts[sequence + 1])] += 1
        assert (covered == 1).all()


def test_buckets_rise() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert BUCKETS[0] == 1


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gpt2", "gemma2", "falcon-rw", "phi3-longrope", "codegen"])
def test_greedy_equals_transformers(tiny_model: Callable[[str], Any], name: str) -> None:
    tiny = tiny_model(name)
    options = {"block_size": 4, "speculation": "off", "max_batch_tokens": 16}
    engine = NativeEngine(tiny.folder, dtype="float32", backend="gpu", **options)
    assert engine.stats().backend == "gpu"
    prompts = [[7, 3, 9, 12, 5, 30, 31, 8, 9], [40, 41]]
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    found = [output.token_ids for output in engine.generate(prompts, params)]
    assert [tuple(ids) for ids in found] == [tiny.greedy(prompt, 3) for prompt in prompts]


def test_decoders_it_cannot_take_are_refused(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match="gpu backend cannot run this: it takes the decoder's weights over"):
        NativeEngine(decoder, backend="gpu")
    with pytest.raises(ConfigError, match="it always keeps a cache"):
        NativeEngine(decoder, backend="gpu", kv_cache=False, optimise=True)
    NativeEngine(decoder, backend="torch", optimise=True)
    assert "laid out for something else" in str(supports(decoder))
