"""Adapter files: PEFT loads ours, we load PEFT's, the logits agree; wrong and unsupported ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.errors import CheckpointError, ConfigError
from burnish.models.adapter_files import read_adapter_config
from burnish.models.loading import load_decoder
from burnish.models.peft_names import file_modules, target_suffixes
from burnish.train.adapter import load_adapter, save_adapter
from burnish.train.batches import collate
from burnish.train.lora import LoraConfig, attach_lora, lora_modules, merge_adapter
from burnish.train.losses import masked_cross_entropy

peft = pytest.importorskip("peft")

# PEFT's and transformers' own: they speak to their authors, not to us.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(5))
TOLERANCE = 1e-5
NAMES = (
    "llama", "llama-tied", "mistral", "qwen3", "gpt2", "gpt-neox", "bloom", "falcon-7b", "falcon-40b", "codegen",
    "phi3",
)  # fmt: skip


def fill_b(model: torch.nn.Module, *, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.fixture
def saved(make_decoder: Callable[..., Any], tmp_path: Path) -> Path:
    """The folder of a trained-looking adapter of the tiny decoder."""
    model = make_decoder()
    attach_lora(model, LoraConfig(rank=4), seed=0)
    fill_b(model)
    save_adapter(model, tmp_path / "adapter", base="org/tiny")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", NAMES)
def test_our_adapter_in_peft_gives_our_logits(reference: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    base = reference(name)
    ours = load_decoder(base.folder)
    plain = logits(ours)
    attach_lora(ours, LoraConfig(rank=4, alpha=6), seed=1)
    fill_b(ours)
    save_adapter(ours, tmp_path, base=str(base.folder))
    theirs = peft.PeftModel.from_pretrained(base.load(), tmp_path).eval()
    assert (logits(ours) - plain).abs().max() > 1e-2, "the test would prove nothing"
    assert (logits(theirs) - logits(ours)).abs().max() < TOLERANCE * max(1.0, float(plain.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_pefts_adapter_here_gives_pefts_logits(reference: Callable[[str], Any], tmp_path: Path, name: str) -> None:
    base = reference(name)
    ours = load_decoder(base.folder)
    plain = logits(ours)
    conv1d = any(entry.stored_transposed for entry in file_modules(ours.config))
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True, fan_in_fan_out=conv1d
    )
    theirs = peft.get_peft_model(base.load(), settings).eval()
    fill_b(theirs)
    theirs.save_pretrained(tmp_path)
    config = load_adapter(ours, tmp_path)
    assert config.rank_stabilized
    assert config.rank == 4
    assert (logits(theirs) - plain).abs().max() > 1e-2, "the test would prove nothing"
    assert (logits(theirs) - logits(ours)).abs().max() < TOLERANCE * max(1.0, float(plain.abs().max()))
    merge_adapter(ours)
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt-neox", "bloom", "phi3"])
def test_gradients_of_a_and_b_equal_pefts(
    reference: Callable[[str], Any], make_rows: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    base = reference(name)
    ours = load_decoder(base.folder)
    attach_lora(ours, LoraConfig(rank=4), seed=1)
    fill_b(ours)
    save_adapter(ours, tmp_path, base=str(base.folder))
    theirs = peft.PeftModel.from_pretrained(base.load(), tmp_path, is_trainable=True).eval()
    batch = collate(make_rows(3), device="cpu")
    loss = masked_cross_entropy(ours.hidden(batch.tokens_BT), batch.labels_BT, logits=ours.logits, vocab_size=97)
    (loss / batch.num_labels).backward()
    scores = theirs(batch.tokens_BT).logits
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch.labels_BT.flatten()).backward()
    peft_grads = {key: value.grad for key, value in theirs.named_parameters() if value.grad is not None}
    modules = lora_modules(ours)
    compared = 0
    for entry in file_modules(ours.config):
        if entry.targets[0] not in modules:
            continue
        key = f"base_model.model.{entry.name}"
        a_grad = modules[entry.targets[0]].lora_A.grad
        b_grad = entry.join([modules[target].lora_B.grad for target in entry.targets])
        for mine, other in ((a_grad, peft_grads[f"{key}.lora_A.default.weight"]),
                            (b_grad, peft_grads[f"{key}.lora_B.default.weight"])):  # fmt: skip
            assert (mine - other).abs().max() < 1e-5 * max(1.0, float(other.abs().max()))
            assert other.abs().max() > 1e-4, "the test would prove nothing"
            compared += 1
    assert compared == len(peft_grads) >= 8


def test_part_of_a_fused_module_alone_saves_zero_rows_for_the_others(
    reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base = reference("bloom")
    ours = load_decoder(base.folder)
    attach_lora(ours, LoraConfig(rank=4, target_modules=("q_proj", "v_proj", "o_proj")), seed=1)
    fill_b(ours)
    save_adapter(ours, tmp_path, base=str(base.folder))
    theirs = peft.PeftModel.from_pretrained(base.load(), tmp_path).eval()
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-4
    again = load_decoder(base.folder)
    load_adapter(again, tmp_path)
    assert list(lora_modules(again)) == list(lora_modules(ours))
    assert torch.equal(logits(again), logits(ours))


def test_saved_adapter_loads_back_bit_for_bit(make_decoder: Callable[..., Any], saved: Path) -> None:
    model = make_decoder()
    attach_lora(model, LoraConfig(rank=4), seed=0)
    fill_b(model)
    again = make_decoder()
    config = load_adapter(again, saved)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert config == LoraConfig(
        rank=4, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    assert read_adapter_config(saved)["base_model_name_or_path"] == "org/tiny"
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_target_suffixes_never_reach_a_linear_that_was_not_chosen() -> None:
    every = [f"h.{i}.{role}" for i in range(2) for role in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert target_suffixes([name for name in every if "attn" in name], every) == ["c_attn", "attn.c_proj"]
    assert target_suffixes(every, every) == ["c_attn", "c_proj", "c_fc"]
    assert target_suffixes(["h.1.attn.c_attn"], every) == ["1.attn.c_attn"]


def test_adapter_of_another_shape_is_refused_naming_both_bases(make_decoder: Callable[..., Any], saved: Path) -> None:
    (saved / "adapter_model.safetensors").rename(saved / "kept")
    from safetensors.torch import load_file, save_file

    save_file(load_file(saved / "kept"), saved / "adapter_model.safetensors")  # without the fingerprint
    with pytest.raises(ConfigError, match=r"made for org/tiny and does not fit my-model: .*q_proj is 48 x 48.*32 x 32"):
        load_adapter(make_decoder(hidden_size=48, head_dim=12, rotary_dim=12), saved, base="my-model")
    with pytest.raises(ConfigError, match=r"made for org/tiny .* it has no linear model.layers.1"):
        load_adapter(make_decoder(num_layers=1), saved)


def test_adapter_of_other_weights_is_refused_by_its_fingerprint(make_decoder: Callable[..., Any], saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"the weights of .* differ, in the same shape"):
        load_adapter(make_decoder(seed=1), saved, base="other")
    load_adapter(make_decoder().bfloat16(), saved)  # the same base in another dtype is the same base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "not a LoRA adapter"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"bias": "all"}, "bias is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base"),
        ({"r": None}, "r and lora_alpha"),
    ],
)
def test_options_that_are_not_built_are_refused(
    make_decoder: Callable[..., Any], saved: Path, change: dict[str, Any], message: str
) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = make_decoder()
    with pytest.raises(ConfigError, match=message):
        load_adapter(model, saved)
    assert not lora_modules(model)


def test_corrupt_and_missing_files_are_one_clear_line(make_decoder: Callable[..., Any], saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated"):
        load_adapter(make_decoder(), saved)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not exist"):
        load_adapter(make_decoder(), saved)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json .*JSON"):
        load_adapter(make_decoder(), saved)


def test_failed_save_leaves_the_earlier_adapter(
    make_decoder: Callable[..., Any], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = make_decoder()
    attach_lora(model, LoraConfig(rank=8), seed=0)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(Exception, match="no space left"):
        save_adapter(model, saved, base="org/tiny")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
