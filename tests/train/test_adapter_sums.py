"""Weighted sums of adapters: PEFT's concatenation, any ranks and kinds, merged equals unmerged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.compress.frozen_loading import FrozenFormat, dequantize_in_place, freeze_in_place
from burnish.errors import ConfigError
from burnish.models.loading import load_decoder
from burnish.train.adapter import save_adapter
from burnish.train.adapter_sums import load_adapters
from burnish.train.lora import LoraConfig, attach_lora, lora_modules, merge_adapter

# PEFT's and transformers' own: they speak to their authors, not to us.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(5))
KINDS = (
    LoraConfig(rank=4, alpha=6),
    LoraConfig(rank=7, alpha=9, rank_stabilized=True, target_modules=("q_proj", "k_proj", "v_proj", "down_proj")),
    LoraConfig(rank=2, use_dora=True, target_modules=("o_proj", "down_proj")),
)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


def made(model: torch.nn.Module, config: LoraConfig, folder: Path, *, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    attach_lora(model, config, seed=seed)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.normal_(0, 0.05, generator=generator)
            if module.lora_magnitude is not None:
                module.lora_magnitude.mul_(1 + 0.1 * torch.randn(module.out_features, generator=generator))
    save_adapter(model, folder, base="org/tiny")
    return folder


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_sum_equals_pefts_concatenation(reference: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    base = reference(name)
    folders = [
        made(load_decoder(base.folder), config, tmp_path / str(number), seed=number)
        for number, config in enumerate(KINDS[:2])
    ]
    theirs = peft.PeftModel.from_pretrained(base.load(), folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="cat")
    theirs.set_adapter("both")
    ours = load_decoder(base.folder)
    load_adapters(ours, folders, [0.7, 0.3])
    expected = logits(theirs.eval())
    assert (expected - logits(ours)).abs().max() < 1e-4
    merge_adapter(ours)
    assert (expected - logits(ours)).abs().max() < 1e-4


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -0.25, 2.0), (0.0, 0.0, 1.0)])
def test_merged_equals_unmerged_for_any_kinds_together(
    make_decoder: Callable[..., Any], tmp_path: Path, weights: tuple[float, ...]
) -> None:
    folders = [made(make_decoder(), config, tmp_path / str(n), seed=n) for n, config in enumerate(KINDS)]
    model = make_decoder()
    plain = logits(model)
    load_adapters(model, folders, weights)
    unmerged = logits(model)
    assert (unmerged - plain).abs().max() > 1e-2, "the test would prove nothing"
    names = merge_adapter(model)
    assert len(names) == 14
    assert not lora_modules(model)
    torch.testing.assert_close(logits(model), unmerged, atol=2e-5, rtol=2e-5)


def test_one_adapter_of_weight_one_is_that_adapter(make_decoder: Callable[..., Any], tmp_path: Path) -> None:
    source = make_decoder()
    folder = made(source, KINDS[2], tmp_path, seed=0)
    model = make_decoder()
    load_adapters(model, [folder], [1.0])
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=1e-5)


def test_sum_over_a_quantized_base_is_that_over_its_dequantized_self(
    make_decoder: Callable[..., Any], tmp_path: Path
) -> None:
    folders = [made(make_decoder(), config, tmp_path / str(n), seed=n) for n, config in enumerate(KINDS)]
    model = make_decoder()
    freeze_in_place(model, FrozenFormat())
    load_adapters(model, folders, [0.4, 0.3, 0.3])
    unmerged = logits(model)
    with pytest.raises(ConfigError, match="cannot be merged into quantized weights"):
        merge_adapter(model)
    dequantize_in_place(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), unmerged, atol=2e-5, rtol=2e-5)


def test_weights_that_cannot_be_used_are_refused(make_decoder: Callable[..., Any], tmp_path: Path) -> None:
    folder = made(make_decoder(), KINDS[0], tmp_path, seed=0)
    for weights, message in (([1.0, 1.0], "differ in number"), ([0.0], "cannot be used"), ([float("nan")], "cannot")):
        with pytest.raises(ConfigError, match=message):
            load_adapters(make_decoder(), [folder], weights)
