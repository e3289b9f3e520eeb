"""Adapters over frozen 4-bit and 8-bit weights: PEFT's gradients over the dequantized ones, also after evaluating."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.compress.frozen_loading import FrozenFormat, dequantize_in_place, freeze_in_place, load_frozen
from burnish.errors import ConfigError
from burnish.models.adapter_files import read_base_format
from burnish.models.loading import load_decoder, save_decoder
from burnish.models.peft_names import file_modules
from burnish.train.adapter import load_adapter, save_adapter
from burnish.train.batches import collate
from burnish.train.config import TrainConfig
from burnish.train.freezing import BASE_FORMATS, freeze_parameters, trainable_parameters
from burnish.train.linear_group import LinearGroup, WeightScratch
from burnish.train.lora import LoraConfig, attach_lora, lora_modules, lora_parameters, merge_adapter
from burnish.train.losses import masked_cross_entropy
from burnish.train.trainer import train

peft = pytest.importorskip("peft")

# PEFT's and transformers' own: they speak to their authors, not to us.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOLERANCE = 1e-5
TOKENS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(5))
CASES = [
    ("llama", "lora", False),
    ("llama", "qlora-4bit", False),
    ("llama", "qlora-8bit", False),
    ("llama", "lora", True),
    ("llama", "qlora-4bit", True),
    ("llama", "qlora-8bit", True),
    ("gpt2", "qlora-4bit", False),
    ("bloom", "qlora-4bit", True),
    ("falcon-7b", "qlora-4bit", False),
    ("falcon-40b", "qlora-8bit", True),
    ("codegen", "qlora-4bit", False),
    ("codegen", "lora", True),
]


def fill(model: torch.nn.Module, *, seed: int = 7) -> None:
    """B as after some steps, and magnitudes that are no longer the weight's own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in lora_modules(model).values():
            module.lora_B.normal_(0, 0.05, generator=generator)
            if module.lora_magnitude is not None:
                module.lora_magnitude.mul_(1 + 0.1 * torch.randn(module.out_features, generator=generator))


def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    hidden = model.hidden(batch.tokens_BT)
    return masked_cross_entropy(hidden, batch.labels_BT, logits=model.logits, vocab_size=97) / batch.num_labels


def gradients(model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def opened(folder: Path, method: str) -> torch.nn.Module:
    if method == "lora":
        return load_decoder(folder)
    return load_frozen(folder, BASE_FORMATS[method], dtype=torch.float32)


@pytest.mark.parametrize(("name", "method", "dora"), CASES)
def test_gradients_equal_pefts_also_after_an_evaluation(
    reference: Callable[[str], Any], make_rows: Callable[..., Any], tmp_path: Path, name: str, method: str, dora: bool
) -> None:
    base = reference(name)
    dense = opened(base.folder, method)
    dequantize_in_place(dense)
    with contextlib.redirect_stderr(io.StringIO()):
        save_decoder(dense, tmp_path / "dense", source=base.folder, dtype=torch.float32)
    ours = opened(base.folder, method)
    attach_lora(ours, LoraConfig(rank=4, use_dora=dora), seed=1)
    fill(ours)
    save_adapter(ours, tmp_path / "adapter", base=str(base.folder))
    with contextlib.redirect_stderr(io.StringIO()):
        model = type(base.load()).from_pretrained(tmp_path / "dense", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).eval()
    batch = collate(make_rows(3), device="cpu")
    scores = theirs(batch.tokens_BT).logits
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch.labels_BT.flatten()).backward()
    expected = {key: value.grad for key, value in theirs.named_parameters() if value.grad is not None}

    ours.train()
    check(ours, expected, gradients(ours, batch), dora)
    ours.eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            answers = ours(TOKENS)
    with torch.no_grad():
        assert (answers - theirs(TOKENS).logits).abs().max() < 1e-4
    ours.train()
    check(ours, expected, gradients(ours, batch), dora)


def check(ours: Any, expected: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], dora: bool) -> None:
    modules = lora_modules(ours)
    compared = 0
    for entry in file_modules(ours.config):
        if entry.targets[0] not in modules:
            continue
        key = f"base_model.model.{entry.name}"
        pairs = [
            (modules[entry.targets[0]].lora_A.grad, expected[f"{key}.lora_A.default.weight"]),
            (entry.join([modules[t].lora_B.grad for t in entry.targets]), expected[f"{key}.lora_B.default.weight"]),
        ]
        if dora:
            lengths = entry.join([modules[target].lora_magnitude.grad for target in entry.targets])
            pairs.append((lengths, expected[f"{key}.lora_magnitude_vector.default.weight"]))
        for mine, other in pairs:
            assert (mine - other).abs().max() <= TOLERANCE * other.abs().max()
            assert other.abs().max() > 1e-4, "the test would prove nothing"
            compared += 1
    assert compared == len(expected) >= 8
    assert len(grads) == len(lora_parameters(ours)), "something else has a gradient"


@pytest.mark.parametrize("method", ["qlora-4bit", "qlora-8bit"])
def test_training_over_frozen_weights_equals_training_over_dequantized_ones(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], method: str
) -> None:
    losses = []
    for dequantized in (False, True):
        model = make_decoder()
        freeze_in_place(model, BASE_FORMATS[method])
        if dequantized:
            dequantize_in_place(model)
        attach_lora(model, LoraConfig(rank=4), seed=0)
        config = TrainConfig(
            method="lora" if dequantized else method,
            steps=5,
            micro_batch_size=4,
            learning_rate=1e-2,
            precision="float32",
            eval_every=2,
        )
        result = train(model, make_rows(16), config=config, eval_examples=make_rows(3, seed=1))
        losses.append([step.loss for step in result.steps] + [item.loss for item in result.eval])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][4] < losses[0][0]


def test_groups_rebuild_in_the_same_memory_and_in_any_order(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder()
    freeze_in_place(model, FrozenFormat())
    attach_lora(model, LoraConfig(rank=4), seed=0)
    fill(model)
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    linears = [[mlp.gate_proj, mlp.up_proj], [attention.q_proj, attention.v_proj]]
    scratch = WeightScratch()
    groups = [LinearGroup(group, dtype=torch.float32, scratch=scratch) for group in linears]
    for group in groups:
        group.join()
    x = torch.randn(5, groups[0].num_inputs, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outs = [group.forward(x.detach()) for group in groups]
    memory = scratch.matrix(1, 1, dtype=torch.float32, device=torch.device("cpu")).data_ptr()
    for group, parts, out in zip(groups, linears, outs):
        want = torch.cat([part(x) for part in parts], dim=1)
        torch.testing.assert_close(out[:, : group.num_outputs], want)
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
        wide = torch.cat([grad, torch.empty(5, group.num_ranks)], dim=1)
        got = [group.backward_input(wide), *group.backward_weights(wide, x.detach(), out[:, group.num_outputs :])]
        for mine, autograds in zip(got, torch.autograd.grad(want, [x, *group.parameters], grad), strict=True):
            torch.testing.assert_close(mine, autograds)
    assert scratch.matrix(1, 1, dtype=torch.float32, device=torch.device("cpu")).data_ptr() == memory


def test_bfloat16_computes_over_frozen_weights(make_decoder: Callable[..., Any], make_rows: Callable[..., Any]) -> None:
    results = []
    for precision in ("float32", "bfloat16"):
        model = make_decoder()
        freeze_in_place(model, FrozenFormat())
        attach_lora(model, LoraConfig(rank=4), seed=0)
        config = TrainConfig(
            method="qlora-4bit", steps=4, micro_batch_size=4, learning_rate=1e-2, precision=precision, ordering="given"
        )
        results.append([step.loss for step in train(model, make_rows(16), config=config).steps])
    assert results[1] == pytest.approx(results[0], rel=0.02)


def test_adapter_says_how_its_base_was_frozen_and_loads_on_any(reference: Callable[[str], Any], tmp_path: Path) -> None:
    base = reference("bloom")
    ours = load_frozen(base.folder, FrozenFormat(), dtype=torch.float32)
    attach_lora(ours, LoraConfig(rank=4), seed=1)
    fill(ours)
    save_adapter(ours, tmp_path, base=str(base.folder))
    assert read_base_format(tmp_path) == {"kind": "nf4", "block_size": 64, "double": True}
    again = load_frozen(base.folder, FrozenFormat(), dtype=torch.float32)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS), ours(TOKENS))
    dense = load_decoder(base.folder)
    load_adapter(dense, tmp_path)
    save_adapter(dense, tmp_path / "dense", base=str(base.folder))
    assert read_base_format(tmp_path / "dense") is None


def test_quantized_base_cannot_be_merged_into_but_its_dequantized_self_can(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder()
    freeze_in_place(model, FrozenFormat())
    attach_lora(model, LoraConfig(rank=4, rank_stabilized=True), seed=0)
    fill(model)
    with torch.no_grad():
        before = model(TOKENS)
        with pytest.raises(ConfigError, match="cannot be merged into quantized weights"):
            merge_adapter(model)
        dequantize_in_place(model)
        merge_adapter(model)
        assert not lora_modules(model)
        torch.testing.assert_close(model(TOKENS), before, atol=1e-5, rtol=1e-5)


def test_method_and_base_have_to_fit(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder()
    attach_lora(model, LoraConfig(rank=2), seed=0)
    with pytest.raises(ConfigError, match='"qlora-4bit" needs a base whose linears are nf4'):
        trainable_parameters(model, TrainConfig(method="qlora-4bit"))
    frozen = make_decoder()
    freeze_in_place(frozen, FrozenFormat(kind="int8"))
    with pytest.raises(ConfigError, match="cannot be trained in full"):
        trainable_parameters(frozen, TrainConfig(method="full"))
    attach_lora(frozen, LoraConfig(rank=2), seed=0)
    with pytest.raises(ConfigError, match="nf4"):
        trainable_parameters(frozen, TrainConfig(method="qlora-4bit"))
    assert trainable_parameters(frozen, TrainConfig(method="qlora-8bit")) == lora_parameters(frozen)


def test_frozen_parameters_stay_bit_for_bit_and_others_learn(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any]
) -> None:
    model = make_decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patterns = ("model.embed_tokens.*", "model.layers.0.*")
    for precision in ("float32", "bfloat16"):
        config = TrainConfig(
            method="full", freeze=patterns, steps=2, micro_batch_size=4, learning_rate=1e-2, precision=precision
        )
        train(model, make_rows(8), config=config)
    after = model.state_dict()
    for name, tensor in before.items():
        frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
        assert torch.equal(after[name], tensor) == frozen, name
        assert after[name].dtype == torch.float32


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("model.layer.0.*",), r'no parameter matches .*Did you mean "model\.layers\.0\.\*"'),
        (("model.embed_token.weight",), r'Did you mean "model\.embed_tokens\.weight"'),
        (("zzz",), r"no parameter matches .*zzz.*; expected a pattern such as model\.embed_tokens\.weight$"),
        (("*",), "freeze every parameter"),
    ],
)
def test_patterns_that_match_nothing_are_refused(
    make_decoder: Callable[..., Any], patterns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze_parameters(make_decoder(), patterns)
    with pytest.raises(ConfigError, match="freeze is for full fine-tuning"):
        TrainConfig(method="lora", freeze=patterns)
