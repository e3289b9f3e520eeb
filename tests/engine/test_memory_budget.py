"""The cache is as large as was asked for and never larger; what cannot fit is refused with the numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from burnish.engine import memory_budget
from burnish.engine.memory_budget import Demand, parse_bytes, plan_blocks, step_bytes
from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.errors import ConfigError, RequestError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

MIB = 2**20


def demand_of(**changes: Any) -> Demand:
    config = ModelConfig(
        family="llama",
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        rotary_dim=32,
        max_position_embeddings=4096,
    )
    demand = Demand(
        config=config,
        block_size=16,
        kv_dtype=torch.float16,
        value_width=32,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_num_seqs=4,
        max_model_len=1024,
        max_batch_tokens=512,
        length_asked=False,
    )
    return replace(demand, **changes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("1.5g", 3 << 29), ("64kb", 1 << 16), ("1000", 1000), (7, 7)],
)
def test_sizes_are_read(size: str | int, expected: int) -> None:
    assert parse_bytes(size, name="memory") == expected


@pytest.mark.parametrize("size", ["", "4 potatoes", "-1GiB", "0", 0, -5, True, "GiB", "1e3"])
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="kv_memory is not a size"):
        parse_bytes(size, name="kv_memory")


def test_block_bytes_count_every_layer_and_scale() -> None:
    assert demand_of().block_bytes == 16 * 2 * 4 * 4 * 32 * 2
    assert demand_of(kv_dtype=torch.int8).block_bytes == 16 * 2 * 4 * 4 * (32 + 4)
    assert demand_of(value_width=48).block_bytes == 16 * 4 * 4 * (32 + 48) * 2


def test_default_holds_every_sequence_at_its_longest() -> None:
    assert plan_blocks(demand_of(), memory=None, kv_memory=None) == 4 * 64


def test_default_takes_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "_free", lambda device: 100 * demand_of().block_bytes + 5)
    assert plan_blocks(demand_of(), memory=None, kv_memory=None) == 100


def test_kv_memory_is_filled_and_never_exceeded() -> None:
    demand = demand_of()
    assert plan_blocks(demand, memory=None, kv_memory=100 * demand.block_bytes - 1) == 99
    assert plan_blocks(demand, memory=None, kv_memory="32MiB") * demand.block_bytes == 32 * MIB


def test_memory_leaves_room_for_the_process_and_a_step() -> None:
    demand = demand_of()
    taken = psutil.Process().memory_info().rss
    num_blocks = plan_blocks(demand, memory=taken + 1000 * MIB, kv_memory=None)
    # One of four layers is gathered while it is attended to.
    used = 1.25 * num_blocks * demand.block_bytes + step_bytes(demand)
    assert step_bytes(demand) > 30 * MIB
    assert 980 * MIB < used < 1001 * MIB
    assert plan_blocks(demand, memory=taken + 200 * MIB, kv_memory="1MiB") == MIB // demand.block_bytes


def test_windows_need_fewer_blocks() -> None:
    config = replace(demand_of().config, sliding_window=64)
    assert demand_of(config=config, max_batch_tokens=32).sequence_blocks == 7


def test_memory_below_the_model_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"memory is too small.*got 50\.0 MiB.*are taken.*a step needs"):
        plan_blocks(demand_of(), memory="50MiB", kv_memory=None)


def test_cache_below_a_block_or_the_asked_length_is_refused() -> None:
    demand = demand_of()
    with pytest.raises(ConfigError, match=r"kv_memory is too small.*16 tokens"):
        plan_blocks(demand, memory=None, kv_memory=demand.block_bytes - 1)
    asked = demand_of(length_asked=True)
    with pytest.raises(ConfigError, match=r"got 1\.0 MiB; expected at least 2\.0 MiB for a sequence of 1024 tokens"):
        plan_blocks(asked, memory=None, kv_memory="1MiB")


def test_engine_keeps_to_its_kv_memory_and_refuses_longer_prompts(decoder: Decoder) -> None:
    block = 16 * decoder.config.kv_bytes_per_token(4)
    engine = NativeEngine(decoder, kv_memory=3 * block + 7)
    assert engine.stats().kv_bytes == 3 * block
    with pytest.raises(RequestError, match="does not fit the KV cache"):
        engine.generate([[5] * 48])
    [output] = engine.generate([[5] * 40], SamplingParams(max_tokens=100, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (8, "length")
    with pytest.raises(ConfigError, match="a sequence of 64 tokens"):
        NativeEngine(decoder, kv_memory=3 * block, max_model_len=64)
    with pytest.raises(ConfigError, match="without kv_cache"):
        NativeEngine(decoder, kv_memory=3 * block, kv_cache=False)
