"""How a model is divided: shares are even, nothing is lost, and what cannot be cut is refused with what can."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.hf_config import config_of
from burnish.models.shapes import SHAPES
from burnish.models.shard_cut import CutUnits, ShardCut, cut_model
from burnish.models.shard_reading import PackedGroups, group_span, runs_of_part
from burnish.models.weight_map import Rows


def shape(**fields: int) -> ModelConfig:
    sizes = {"num_heads": 8, "num_kv_heads": 4, "intermediate_size": 96, "num_layers": 4, "vocab_size": 200, **fields}
    return ModelConfig(family="llama", hidden_size=64, head_dim=16, rotary_dim=16, max_position_embeddings=64, **sizes)  # type: ignore[arg-type]


def size(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def check(cuts: tuple[ShardCut, ...], config: ModelConfig) -> None:
    """Every feature is somewhere; only kv heads may be at several places, together with their own query heads."""
    group = config.num_heads // config.num_kv_heads
    first = cuts[: cuts[0].tensor_parallel]
    for name, whole in (("heads", config.num_heads), ("inner", config.intermediate_size)):
        spans = [getattr(cut, name) for cut in first]
        assert (spans[0][0], spans[-1][1]) == (0, whole)
        assert all(one[1] == two[0] for one, two in pairwise(spans))
        assert all(size(span) > 0 for span in spans)
    vocab = [cut.vocab for cut in cuts]
    assert (vocab[0][0], vocab[-1][1]) == (0, config.vocab_size)
    assert all(one[1] == two[0] for one, two in pairwise(vocab))
    layers = list(dict.fromkeys(cut.layers for cut in cuts))
    assert (layers[0][0], layers[-1][1]) == (0, config.num_layers)
    assert all(one[1] == two[0] for one, two in pairwise(layers))
    assert max(map(size, layers)) - min(map(size, layers)) <= 1
    for cut in cuts:
        assert size(cut.heads) % size(cut.kv_heads) == 0
        for head in range(*cut.heads):
            assert cut.kv_heads[0] <= head // group < cut.kv_heads[1]


@settings(max_examples=200, deadline=None)
@given(
    kv_heads=st.integers(1, 9),
    group=st.integers(1, 9),
    inner=st.integers(1, 700),
    layers=st.integers(1, 9),
    ways=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_every_feature_is_held_somewhere(
    kv_heads: int, group: int, inner: int, layers: int, ways: tuple[int, int]
) -> None:
    config = shape(num_heads=kv_heads * group, num_kv_heads=kv_heads, intermediate_size=inner, num_layers=layers)
    possible = ways[0] <= min(config.num_heads, inner) and ways[1] <= layers
    if kv_heads < ways[0]:
        possible = possible and group >= -(-ways[0] // kv_heads)
    if not possible:
        with pytest.raises(ConfigError):
            cut_model(config, tensor_parallel=ways[0], pipeline_parallel=ways[1])
        return
    cuts = cut_model(config, tensor_parallel=ways[0], pipeline_parallel=ways[1])
    assert [cut.rank for cut in cuts] == list(range(ways[0] * ways[1]))
    check(cuts, config)


@pytest.mark.parametrize("name", ["135m", "tinyllama-1.1b", "gpt2", "mistral-7b", "falcon-7b", "bloom-1b1"])
@pytest.mark.parametrize("ways", [(2, 1), (1, 2), (2, 2)])
def test_published_shapes_are_cut_into_even_shares(name: str, ways: tuple[int, int]) -> None:
    config = config_of(SHAPES[name])
    for cut in cut_model(config, tensor_parallel=ways[0], pipeline_parallel=ways[1]):
        own = cut.cache_config(config)
        share = own.num_parameters() / config.num_parameters() * ways[0] * ways[1]
        # Learned positions are counted whole here.
        assert 0.9 < share < 1.15


def test_units_bound_where_heads_and_features_are_cut() -> None:
    config = shape(num_heads=8, num_kv_heads=4)
    assert cut_model(config, tensor_parallel=4, pipeline_parallel=1)[0].kv_heads == (0, 1)
    units = CutUnits(heads=64, keys=32, inner=32, why="words hold 8 weights")
    cuts = cut_model(config, tensor_parallel=2, pipeline_parallel=1, units=units)
    assert [(cut.heads, cut.kv_heads) for cut in cuts] == [((0, 4), (0, 2)), ((4, 8), (2, 4))]
    assert [cut.inner for cut in cuts] in ([(0, 32), (32, 96)], [(0, 64), (64, 96)])
    with pytest.raises(ConfigError, match=r"as words hold 8 weights; got tensor_parallel 3; expected one of 1, 2$"):
        cut_model(config, tensor_parallel=3, pipeline_parallel=1, units=units)
    with pytest.raises(ConfigError, match="more pipeline stages than layers; got 5; expected at most 4"):
        cut_model(config, tensor_parallel=1, pipeline_parallel=5)


def test_spans_are_those_of_outputs_or_inputs_and_none_of_the_whole() -> None:
    config = shape()
    cut = cut_model(config, tensor_parallel=2, pipeline_parallel=2)[3]
    layer = "model.layers.3"
    assert cut.spans(f"{layer}.self_attn.q_proj", config) == ((64, 128), None)
    assert cut.spans(f"{layer}.self_attn.k_proj", config) == ((32, 64), None)
    assert cut.spans(f"{layer}.self_attn.o_proj", config) == (None, (64, 128))
    assert cut.spans(f"{layer}.mlp.down_proj", config) == (None, cut.inner)
    assert cut.spans(f"{layer}.input_layernorm", config) == (None, None)
    assert cut.spans("lm_head", config) == (cut.vocab, None)
    assert cut.holds(f"{layer}.mlp.up_proj")
    assert not cut.holds("model.layers.1.mlp.up_proj")
    alone = cut_model(config, tensor_parallel=1, pipeline_parallel=1)[0]
    assert alone.spans(f"{layer}.self_attn.q_proj", config) == (None, None)


def test_parts_of_fused_tensors_are_found_block_by_block() -> None:
    plain = Rows(1, ((0, 8), (1, 4), (2, 4)))
    assert runs_of_part(plain, 1, (2, 4)) == [(10, 12)]
    assert runs_of_part(plain, 2, None) == [(12, 16)]
    by_head = Rows(3, ((0, 2), (1, 2), (2, 2)))
    assert runs_of_part(by_head, 0, (1, 5)) == [(1, 2), (6, 8), (12, 13)]
    assert runs_of_part(Rows(2, ((0, 3),)), 0, (1, 5)) == [(1, 5)]


def test_groups_of_a_span_are_all_where_their_order_is_free() -> None:
    assert group_span(PackedGroups(bits=4, width=32, ordered=True), (40, 80), 128) == (1, 3)
    assert group_span(PackedGroups(bits=4, width=32, ordered=False), (40, 80), 128) == (0, 4)
