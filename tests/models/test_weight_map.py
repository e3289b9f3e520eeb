"""Names map both ways, and rows are cut and joined without loss in every orientation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.errors import CheckpointError
from burnish.models.families.registry import family_named
from burnish.models.hf_config import load_config
from burnish.models.weight_map import Rows, Rule, Source, WeightMap, out_dim

ROWS = st.builds(
    lambda repeats, counts, order: Rows(repeats, tuple((part, counts[part]) for part in order)),
    st.integers(1, 5),
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
    st.permutations([0, 1, 2]),
)


@given(rows=ROWS, dim=st.integers(0, 1))
def test_join_undoes_split_along_either_dimension(rows: Rows, dim: int) -> None:
    shape = [3, 3]
    shape[dim] = rows.num_rows
    fused = torch.arange(3 * rows.num_rows).reshape(shape)
    parts = rows.split(fused, dim=dim)
    assert [part.shape[dim] for part in parts] == [rows.rows_of(part) for part in range(rows.num_parts)]
    assert torch.equal(rows.join(parts, dim=dim), fused)
    targets = [torch.empty_like(part).contiguous() for part in parts]
    rows.split_into(fused, targets, dim=dim)
    assert all(torch.equal(target, part) for target, part in zip(targets, parts))


def test_split_follows_the_order_of_blocks_per_repeat() -> None:
    rows = Rows(2, ((0, 2), (2, 1), (1, 1)))
    first, second, third = rows.split(np.array(list("aabcddef")))
    assert "".join(first) == "aadd"
    assert "".join(second) == "cf"
    assert "".join(third) == "be"


def test_split_cuts_packed_elements_where_blocks_fill_them() -> None:
    rows = Rows(2, ((0, 16), (1, 8), (2, 8)))
    parts = rows.split(torch.arange(8)[None], dim=1)
    assert [part.tolist() for part in parts] == [[[0, 1, 4, 5]], [[2, 6]], [[3, 7]]]


def test_split_of_packed_elements_that_span_parts_raises() -> None:
    with pytest.raises(CheckpointError, match="layer qzeros cannot be cut"):
        Rows(1, ((0, 4), (1, 4), (2, 8))).split(torch.arange(2), name="layer qzeros")


def test_join_of_wrong_parts_raises() -> None:
    with pytest.raises(CheckpointError):
        Rows(1, ((0, 2), (1, 4))).join([torch.ones(4, 1), torch.ones(2, 1)])


def test_out_dim_knows_the_packed_layout() -> None:
    names = ("weight", "bias", "qweight", "qzeros", "scales", "g_idx")
    assert [out_dim(name) for name in names] == [0, 0, 1, 1, 1, None]


def test_first_of_two_sources_is_written_and_both_are_read() -> None:
    weight_map = WeightMap([Rule(source="new", targets=("lm_head",)), Rule(source="old", targets=("lm_head",))])
    assert weight_map.hf("lm_head.weight") == Source("new.weight", 0, 1)
    for name in ("new.weight", "old.weight"):
        placement = weight_map.canonical(name)
        assert placement is not None
        assert placement.targets == ("lm_head.weight",)


def test_unknown_names_are_refused() -> None:
    weight_map = WeightMap([Rule(source="a.{i}.b", targets=("x.{i}.y",))], prefix="a.", ignored=(r"\.inv_freq$",))
    assert weight_map.canonical("a.0.c.weight") is None
    assert weight_map.canonical("0.b.weight") is not None
    assert weight_map.is_ignored("a.0.inv_freq")
    assert not weight_map.is_ignored("a.0.inv_freq.weight")
    with pytest.raises(CheckpointError, match=r"x\.0\.z"):
        weight_map.hf("x.0.z.weight")


def test_names_map_both_ways_in_every_family(tiny: Any) -> None:
    config = load_config(tiny.folder)
    weight_map = family_named(config.family).weight_map(config)
    names = list(config.parameter_shapes())
    placements = weight_map.placements(names)
    assert sorted(target for placement in placements.values() for target in placement.targets) == sorted(names)
    in_files = {name for name, _ in tiny.model.named_parameters()}
    in_files = {name.replace("lm_head", "embed_out") if config.family == "gpt_neox" else name for name in in_files}
    assert set(placements) == in_files
    for hf_name, placement in placements.items():
        for part, target in enumerate(placement.targets):
            source = weight_map.hf(target)
            assert source == Source(hf_name, part, len(placement.targets))
            module = target.rpartition(".")[0]
            assert weight_map.hf_module(module).name == hf_name.rpartition(".")[0]


def test_quantized_suffixes_ride_along(tiny: Any) -> None:
    config = load_config(tiny.folder)
    weight_map = family_named(config.family).weight_map(config)
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        source = weight_map.hf(f"model.layers.2.self_attn.v_proj.{suffix}")
        placement = weight_map.canonical(source.name)
        assert placement is not None
        assert placement.targets[source.part] == f"model.layers.2.self_attn.v_proj.{suffix}"
        assert not placement.transposed
