"""Adapters: what they attach to, what they compute, and that they come off exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.errors import ConfigError
from burnish.train import lora_function
from burnish.train.lora import LoraConfig, LoraLinear, attach_lora, lora_modules, lora_parameters, merge_adapter


def fill_b(model: nn.Module, *, seed: int = 7) -> None:
    """Give B values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.normal_(0, 0.1, generator=generator)


class FrozenDouble(nn.Module):
    """Stands for a quantized linear: no weight parameter, forward and sizes only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().double())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype))


def test_attached_adapter_changes_nothing_until_b_moves(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder()
    tokens = torch.arange(12).reshape(2, 6)
    before = model(tokens)
    attach_lora(model, LoraConfig(rank=4), seed=1)
    assert torch.equal(model(tokens), before)
    fill_b(model)
    assert (model(tokens) - before).abs().max() > 1e-2


def test_all_linear_takes_the_blocks_and_leaves_the_head(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder(num_layers=2)
    names = attach_lora(model, LoraConfig(), seed=0)
    assert len(names) == 14
    assert "lm_head" not in names
    assert all(name.startswith("model.layers.") for name in names)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 28


def test_roles_choose_linears_and_a_wrong_role_is_named(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder()
    with pytest.raises(ConfigError, match=r"'q_prj'.*Did you mean \"q_proj\""):
        attach_lora(model, LoraConfig(target_modules=("q_prj",)), seed=0)
    assert attach_lora(model, LoraConfig(target_modules=("v_proj", "lm_head")), seed=0) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "lm_head",
    ]


def test_second_adapter_is_refused(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder()
    attach_lora(model, LoraConfig(), seed=0)
    with pytest.raises(ConfigError, match="carries an adapter already"):
        attach_lora(model, LoraConfig(), seed=0)


def test_a_is_seeded_and_uniform_within_the_linear_bound(make_decoder: Callable[..., Any]) -> None:
    starts = []
    for seed in (3, 3, 4):
        model = make_decoder()
        attach_lora(model, LoraConfig(rank=8), seed=seed)
        starts.append(torch.cat([module.lora_A.flatten() for module in lora_modules(model).values()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    first = next(iter(lora_modules(model).values()))
    bound = first.in_features**-0.5
    assert first.lora_A.abs().max() <= bound
    assert first.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_rank_stabilized_scale_divides_by_the_root() -> None:
    assert LoraConfig(rank=16, alpha=32).scale == 2
    assert LoraConfig(rank=16, alpha=32, rank_stabilized=True).scale == 8


@pytest.mark.parametrize("settings", [{"rank": 0}, {"dropout": 1.0}, {"target_modules": ()}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LoraConfig(**settings)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_equal_autograd_of_the_formula(monkeypatch: pytest.MonkeyPatch, fold: bool, bias: bool) -> None:
    monkeypatch.setattr(lora_function, "folding_pays", lambda *_: fold)
    torch.manual_seed(0)
    linear = nn.Linear(10, 14, bias=bias)
    module = LoraLinear(linear, LoraConfig(rank=3, alpha=5))
    nn.init.normal_(module.lora_A)
    nn.init.normal_(module.lora_B)
    x = torch.randn(2, 9, 10, requires_grad=True)
    weights = torch.randn(2, 9, 14)
    inputs = (x, module.lora_A, module.lora_B)
    out = module(x)
    plain = linear(x) + (x @ module.lora_A.t() @ module.lora_B.t()) * (5 / 3)
    assert torch.allclose(out, plain, atol=1e-5)
    ours = torch.autograd.grad((out * weights).sum(), inputs)
    theirs = torch.autograd.grad((plain * weights).sum(), inputs)
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine, other, atol=1e-4, rtol=1e-5)
    assert linear.weight.grad is None


def test_bfloat16_base_trains_float32_factors_close_to_float32() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    module = LoraLinear(linear, LoraConfig(rank=4))
    nn.init.normal_(module.lora_A, std=0.1)
    nn.init.normal_(module.lora_B, std=0.1)
    x = torch.randn(20, 64)
    exact = torch.autograd.grad(module(x).square().sum(), (module.lora_A, module.lora_B))
    linear.bfloat16()
    rounded = torch.autograd.grad(module(x.bfloat16()).float().square().sum(), (module.lora_A, module.lora_B))
    for mine, other in zip(rounded, exact):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() < 0.02 * other.norm()


def test_adapter_works_over_a_linear_that_is_not_dense_and_refuses_to_merge(make_decoder: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 8, bias=False)
    dense, frozen = LoraLinear(linear, LoraConfig(rank=2)), LoraLinear(FrozenDouble(linear), LoraConfig(rank=2))
    for module in (dense, frozen):
        nn.init.constant_(module.lora_A, 0.3)
        nn.init.constant_(module.lora_B, 0.2)
    x = torch.randn(5, 12, requires_grad=True)
    grads = []
    for module in (dense, frozen):
        out = module(x)
        grads.append([out, *torch.autograd.grad(out.square().sum(), (x, module.lora_A, module.lora_B))])
    for mine, other in zip(*grads):
        assert torch.allclose(mine, other, atol=1e-4)
    model = make_decoder()
    model.model.layers[0].mlp.up_proj = FrozenDouble(model.model.layers[0].mlp.up_proj)
    attach_lora(model, LoraConfig(), seed=0)
    fill_b(model)
    with pytest.raises(ConfigError, match=r"up_proj cannot be merged into quantized weights.*unquantized base"):
        merge_adapter(model)
    assert len(lora_modules(model)) == 14, "a refused merge must change nothing"


def test_merged_model_equals_the_adapter_and_has_plain_linears(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder()
    names_before = [name for name, _ in model.named_parameters()]
    attach_lora(model, LoraConfig(rank=4, alpha=12), seed=0)
    fill_b(model)
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        adapted = model(tokens)
        merged_names = merge_adapter(model)
        assert (model(tokens) - adapted).abs().max() < 1e-4
    assert len(merged_names) == 14
    assert [name for name, _ in model.named_parameters()] == names_before
    with pytest.raises(ConfigError, match="no adapter to merge"):
        merge_adapter(model)


def test_merge_accumulates_in_float32_over_bfloat16_weights() -> None:
    linear = nn.Linear(256, 4, bias=False).bfloat16()
    module = LoraLinear(linear, LoraConfig(rank=8))
    nn.init.normal_(module.lora_A, std=0.05)
    nn.init.normal_(module.lora_B, std=0.05)
    exact = linear.weight.double() + module.scale * (module.lora_B.double() @ module.lora_A.double())
    assert torch.equal(module.merged_weight(), exact.bfloat16())


def test_fused_files_share_a_among_q_k_v(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder(
        family="bloom", num_kv_heads=4, position="alibi", rotary_dim=0, norm="layernorm", mlp="plain",
        activation="gelu_tanh", embedding_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    attach_lora(model, LoraConfig(rank=4), seed=0)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.lora_A is attention.k_proj.lora_A is attention.v_proj.lora_A
    assert attention.q_proj.lora_A is not attention.o_proj.lora_A
    assert len(lora_parameters(model)) == 2 * (4 + 6)


def test_dropout_acts_in_training_only() -> None:
    module = LoraLinear(nn.Linear(16, 8), LoraConfig(rank=4, dropout=0.5))
    nn.init.normal_(module.lora_A)
    nn.init.normal_(module.lora_B)
    x = torch.randn(3, 16)
    module.train()
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    torch.manual_seed(0)
    module.train()
    mean = torch.stack([module(x) for _ in range(4000)]).mean(0)
    module.eval()
    assert (mean - module(x)).abs().mean() < 0.15 * module(x).abs().mean() + 0.1
