"""The gpu backend on a real card: the same tokens as torch's own, with and without graphs, inside its memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.models.synth import write_random_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
SHAPE = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "sliding_window": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(SHAPE, tmp_path_factory.mktemp("card"), dtype="float32")


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 200, (count,), generator=generator).tolist()
    return [torch.randint(3, 4096, (length,), generator=generator).tolist() for length in lengths]


def tokens_of(engine: NativeEngine, count: int) -> list[list[int]]:
    return [list(output.token_ids) for output in engine.generate(prompts(count), PARAMS)]


def test_greedy_float32_equals_the_torch_backend(folder: Path) -> None:
    expected = tokens_of(NativeEngine(folder, device="cuda", dtype="float32", backend="torch"), 7)
    engine = NativeEngine(folder, device="cuda", dtype="float32", backend="gpu")
    assert tokens_of(engine, 7) == expected
    assert engine.runner.backend.captured  # type: ignore[attr-defined]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_graphs_equal_eager(folder: Path, quantize: str, kv_dtype: str) -> None:
    engine = NativeEngine(
        folder,
        device="cuda",
        dtype="float16",
        backend="gpu",
        quantize=quantize,
        kv_dtype=kv_dtype,
        prefix_caching=False,
    )
    replayed = tokens_of(engine, 5)
    engine.runner.backend._graphs = None  # type: ignore[attr-defined]
    assert tokens_of(engine, 5) == replayed


def test_auto_takes_the_gpu_backend_where_it_runs(folder: Path) -> None:
    stats = NativeEngine(folder, device="cuda").stats()
    capable = torch.cuda.get_device_capability()[0] >= 8
    assert stats.backend == "gpu" or not capable
    assert stats.dtype == ("bfloat16" if capable else "float16")


def test_memory_stays_within_what_was_asked(folder: Path) -> None:
    asked = 2 << 30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        engine = NativeEngine(folder, device="cuda", memory=asked, backend="gpu")
        engine.warm_up()
        tokens_of(engine, 32)
        assert torch.cuda.max_memory_reserved() < asked
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_speed_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backend in ("torch", "gpu"):
        engine = NativeEngine(folder, device="cuda", backend=backend)
        engine.warm_up()
        tokens_of(engine, 32)
        torch.cuda.synchronize()
        started = time.perf_counter()
        produced = sum(map(len, tokens_of(engine, 32)))
        with capsys.disabled():
            print(f"\n{backend}: {produced / (time.perf_counter() - started):,.0f} tokens/s")
