from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from burnish.compress import optimise_quality
from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import save_quantized
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.int8_linear import Int8Linear
from burnish.compress.loading import load_model
from burnish.compress.optimise import load_optimised
from burnish.compress.optimise_quality import divergence_from_checkpoint
from burnish.compress.optimised_layers import quantize_in_place
from burnish.compress.quantize import quantize_model
from burnish.errors import CompressionError, ConfigError
from burnish.measure.compare import compare_models
from burnish.models.decoder import Decoder
from burnish.models.loading import save_decoder
from burnish.models.resolve import resolve_model
from burnish.models.synth import write_random_checkpoint

TOKENS = torch.arange(40)[None] % 90
F32 = torch.float32


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_loading_equals_quantizing_in_memory(
    make_decoder: Callable[..., Decoder], tmp_path: Path, quantize: str, tied: bool, bias: bool
) -> None:
    decoder = make_decoder(tied=tied, bias=bias)
    save_decoder(decoder, tmp_path, source=None)
    loaded = load_optimised(tmp_path, quantize=quantize, dtype=F32, cache=False)
    quantize_in_place(decoder, quantize=quantize)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.decoder(TOKENS), decoder(TOKENS), rtol=0, atol=0)
    inner = Int8Linear if quantize == "int8" else GroupQuantizedLinear
    assert isinstance(loaded.decoder.get_submodule("model.layers.1.mlp.up_proj"), inner)
    assert tied or isinstance(loaded.decoder.lm_head, Int8Linear)
    assert loaded.report.quantize == quantize
    assert loaded.report.bytes_after < loaded.report.bytes_before


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "bloom"])
def test_fused_and_transposed_files_are_read_into_place(family: str, tmp_path: Path) -> None:
    config = _tiny_configs()[family]
    write_random_checkpoint(config, tmp_path, seed=1, dtype="float32")
    dense = load_model(tmp_path, dtype=F32)
    quantize_in_place(dense, quantize="int8")
    loaded = load_optimised(tmp_path, quantize="int8", dtype=F32, cache=False).decoder
    with torch.inference_mode():
        torch.testing.assert_close(loaded(TOKENS), dense(TOKENS), rtol=0, atol=0)


def test_int8_stays_within_the_limit_on_the_bundled_model() -> None:
    folder = resolve_model("burnish-sql-base")
    parent = load_model(folder, dtype=F32)
    child = load_optimised(folder, quantize="int8", dtype=F32, cache=False).decoder
    from burnish.data.rows import read_rows
    from burnish.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    texts = [f"{row.context}\n{row.instruction}\n{row.answer}" for row in read_rows("text-to-sql:test:4").rows]
    assert compare_models(child, parent, [tokenizer.encode(text)[:256] for text in texts]).kl_mean <= 0.01


def test_int8_stays_within_the_limit_on_stories(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260k"
    from burnish.data.tokenizer import Tokenizer

    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day she"
    tokens = Tokenizer.load(folder).encode_prompt(text)
    child = load_optimised(folder, quantize="int8", dtype=F32, cache=False).decoder
    assert compare_models(child, load_model(folder, dtype=F32), [tokens]).kl_mean <= 0.01


def test_quantized_checkpoints_are_refused_when_asked_and_left_alone_unasked(
    make_decoder: Callable[..., Decoder], decoder_folder: Path, tmp_path: Path
) -> None:
    decoder = make_decoder()
    config = QuantizeConfig(method="rtn", bits=8, group_size=8)
    quantize_model(decoder, None, config)
    save_quantized(decoder, tmp_path / "q", source=decoder_folder, config=config)
    with pytest.raises(ConfigError, match="quantized already"):
        load_optimised(tmp_path / "q", quantize="int8", dtype=F32)
    report = load_optimised(tmp_path / "q", quantize="auto", dtype=F32).report
    assert (report.quantize, report.reason) == ("none", "the checkpoint is quantized already")


def test_bad_weights_are_refused_by_name(make_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    decoder = make_decoder()
    decoder.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 2] = torch.nan
    save_decoder(decoder, tmp_path, source=None)
    for quantize in ("int8", "int4"):
        with pytest.raises(CompressionError, match=r"model\.layers\.1\.mlp\.up_proj"):
            load_optimised(tmp_path, quantize=quantize, dtype=F32)


def test_unknown_names_are_refused(decoder_folder: Path) -> None:
    with pytest.raises(ConfigError, match="int7"):
        load_optimised(decoder_folder, quantize="int7", dtype=F32)


def test_auto_leaves_small_models_alone_and_says_so(decoder_folder: Path) -> None:
    report = load_optimised(decoder_folder, quantize="auto", dtype=F32).report
    assert report.quantize == "none"
    assert "million parameters" in report.reason


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimise_quality, "MIN_PARAMETERS", 0)


@pytest.mark.usefixtures("any_size")
def test_auto_takes_int8_within_the_limit_and_remembers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimise_quality, "KL_LIMIT", 1.0)
    folder = resolve_model("burnish-sql-base")
    first = load_optimised(folder, quantize="auto", dtype=F32).report
    assert first.quantize == "int8"
    assert "within the limit" in first.reason
    assert first.kl_mean is not None
    assert first.kl_mean > 0
    assert first.check_s > 0
    again = load_optimised(folder, quantize="auto", dtype=F32).report
    assert (again.cached, again.check_s, again.kl_mean) == (True, 0.0, first.kl_mean)


@pytest.mark.usefixtures("any_size")
def test_auto_falls_back_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimise_quality, "KL_LIMIT", 1e-9)
    loaded = load_optimised(resolve_model("burnish-sql-base"), quantize="auto", dtype=F32, cache=False)
    assert loaded.report.quantize == "none"
    assert "beyond the limit" in loaded.report.reason
    assert not any(isinstance(module, Int8Linear) for module in loaded.decoder.modules())


@pytest.mark.usefixtures("any_size")
def test_auto_without_a_tokenizer_cannot_compare(decoder_folder: Path) -> None:
    report = load_optimised(decoder_folder, quantize="auto", dtype=F32, cache=False).report
    assert report.quantize == "none"
    assert "tokenizer" in report.reason


def test_streamed_comparison_equals_one_in_memory() -> None:
    folder = resolve_model("burnish-sql-base")
    parent = load_model(folder, dtype=F32)
    assert divergence_from_checkpoint(parent, folder).kl_mean == pytest.approx(0.0, abs=1e-9)
    child = load_optimised(folder, quantize="int4", dtype=F32, cache=False).decoder
    found = divergence_from_checkpoint(child, folder)
    from burnish.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    rows = [tokenizer.encode_prompt(text)[: optimise_quality.MAX_TOKENS] for text in optimise_quality.PASSAGES]
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            logs = [torch.log_softmax(model(torch.tensor([row]))[0].double(), -1) for model in (parent, child)]
            total += float((logs[0].exp() * (logs[0] - logs[1])).sum())
            count += len(row)
    assert found.num_tokens == count
    assert found.kl_mean == pytest.approx(total / count, rel=1e-3)


def _tiny_configs() -> dict[str, dict]:
    """config.json of small models whose files fuse or transpose linears."""
    shared = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    return {
        "gpt_neox": shared
        | {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "rotary_pct": 0.25,
        },
        "gpt2": shared
        | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "n_ctx": 64,
        },
        "bloom": shared
        | {
            "architectures": ["BloomForCausalLM"],
            "model_type": "bloom",
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
        },
    }
