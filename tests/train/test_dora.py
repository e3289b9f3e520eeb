"""DoRA: PEFT's numbers both ways, merged equals unmerged, magnitudes where files fuse linears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.engine.adapters import AdapterSet
from burnish.errors import CheckpointError, ConfigError
from burnish.models.adapter_files import read_adapter_config
from burnish.models.loading import load_decoder
from burnish.models.peft_names import file_modules
from burnish.train.adapter import load_adapter, save_adapter
from burnish.train.dora import row_norms
from burnish.train.lora import LoraConfig, LoraLinear, attach_lora, lora_modules, lora_parameters, merge_adapter

peft = pytest.importorskip("peft")

# PEFT's and transformers' own: they speak to their authors, not to us.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(5))
NAMES = ("llama", "llama-tied", "gpt2", "bloom", "falcon-7b", "falcon-40b", "codegen", "phi3")


def fill(model: torch.nn.Module, *, seed: int = 7) -> None:
    """B and magnitudes as after some steps, ours or PEFT's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("name", NAMES)
def test_our_adapter_in_peft_gives_our_logits(reference: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    base = reference(name)
    ours = load_decoder(base.folder)
    plain = logits(ours)
    attach_lora(ours, LoraConfig(rank=4, alpha=6, use_dora=True), seed=1)
    torch.testing.assert_close(logits(ours), plain, atol=1e-5, rtol=1e-5)
    fill(ours)
    save_adapter(ours, tmp_path, base=str(base.folder))
    theirs = peft.PeftModel.from_pretrained(base.load(), tmp_path).eval()
    assert read_adapter_config(tmp_path)["use_dora"] is True
    assert (logits(ours) - plain).abs().max() > 1e-2, "the test would prove nothing"
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-5 * max(1.0, float(plain.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_pefts_adapter_here_gives_pefts_logits_merged_too(
    reference: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    base = reference(name)
    ours = load_decoder(base.folder)
    conv1d = any(entry.stored_transposed for entry in file_modules(ours.config))
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True, use_rslora=True,
        fan_in_fan_out=conv1d,
    )  # fmt: skip
    theirs = peft.get_peft_model(base.load(), settings).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    config = load_adapter(ours, tmp_path)
    assert config.use_dora
    assert config.rank_stabilized
    expected = logits(theirs)
    assert (expected - logits(ours)).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    merge_adapter(ours)
    assert not lora_modules(ours)
    assert (expected - logits(ours)).abs().max() < 1e-4


def test_part_of_a_fused_module_keeps_the_magnitudes_of_the_others(
    reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base = reference("bloom")
    ours = load_decoder(base.folder)
    attach_lora(ours, LoraConfig(rank=4, target_modules=("q_proj", "v_proj"), use_dora=True), seed=1)
    fill(ours)
    save_adapter(ours, tmp_path, base=str(base.folder))
    theirs = peft.PeftModel.from_pretrained(base.load(), tmp_path).eval()
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-4
    again = load_decoder(base.folder)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(ours), atol=1e-5, rtol=1e-5)


def test_kept_norms_follow_every_change(make_decoder: Callable[..., Any]) -> None:
    linear = torch.nn.Linear(6, 5)
    layer = LoraLinear(linear, LoraConfig(rank=2, use_dora=True)).eval()
    x = torch.randn(3, 6)

    def formula() -> torch.Tensor:
        total = linear.weight + layer.scale * layer.lora_B @ layer.lora_A
        weight = layer.lora_magnitude[:, None] * total / total.norm(dim=1, keepdim=True)
        return torch.nn.functional.linear(x, weight, linear.bias)

    with torch.inference_mode():
        torch.testing.assert_close(layer(x), formula())
    changes = [layer.lora_A, layer.lora_B, layer.lora_magnitude, linear.weight]
    for parameter in changes:
        with torch.no_grad():
            parameter.add_(0.3)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), formula())
            torch.testing.assert_close(layer(x), formula())


def test_row_norms_in_slabs_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(37, 11), torch.randn(3, 11), torch.randn(37, 3)
    weight[4], b[4] = 0.0, 0.0
    expected = (weight + 0.5 * b @ a).norm(dim=1)
    monkeypatch.setattr("burnish.train.dora.SLAB_WEIGHTS", 40)
    norms = row_norms(weight, a, b, scale=0.5)
    torch.testing.assert_close(norms, expected)
    assert norms[4] > 0, "a row of zeros would make everything NaN"


def test_dropout_falls_on_the_adapter_only(make_decoder: Callable[..., Any]) -> None:
    layer = LoraLinear(torch.nn.Linear(6, 5), LoraConfig(rank=2, dropout=0.9, use_dora=True))
    with torch.no_grad():
        layer.lora_A.normal_()
    x = torch.randn(4, 6)
    expected = layer.base(x)
    torch.testing.assert_close(layer.train()(x), expected)  # B is zero: whatever is dropped, the base stays
    with torch.no_grad():
        layer.lora_B.normal_()
    torch.testing.assert_close(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def test_magnitudes_are_trained_in_float32_beside_a_and_b(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder().bfloat16()
    names = attach_lora(model, LoraConfig(rank=2, use_dora=True), seed=0)
    assert len(lora_parameters(model)) == 3 * len(names)
    assert {parameter.dtype for parameter in lora_parameters(model)} == {torch.float32}
    model(TOKENS).float().sum().backward()
    assert all(parameter.grad is not None for parameter in lora_parameters(model))


def test_dora_cannot_be_served_per_request_and_says_what_to_do(
    make_decoder: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_decoder()
    attach_lora(model, LoraConfig(rank=2, use_dora=True), seed=0)
    save_adapter(model, tmp_path, base="org/tiny")
    with pytest.raises(ConfigError, match=r"DoRA adapter, which cannot be served .*burnish merge"):
        AdapterSet(make_decoder(), {"a": tmp_path})


def test_files_without_the_magnitudes_they_speak_of_are_refused(
    make_decoder: Callable[..., Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = make_decoder()
    attach_lora(model, LoraConfig(rank=2, use_dora=True), seed=0)
    save_adapter(model, tmp_path, base="org/tiny")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if "magnitude" in name)
    save_file({**tensors, key: tensors[key][:-1].clone()}, path)
    with pytest.raises(CheckpointError, match="magnitudes that cannot be used"):
        load_adapter(make_decoder(), tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(CheckpointError, match="does not hold the magnitudes"):
        load_adapter(make_decoder(), tmp_path)
