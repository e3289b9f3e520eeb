"""Every family computes what transformers computes, at once and token by token, and survives a round trip."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.models.attention import AttentionSpec, grouped_attention, softcapped_attention, visible
from burnish.models.decoder import Decoder
from burnish.models.loading import load_config, load_decoder, save_decoder

TOLERANCE = 1e-4


class ConcatenatedCache:
    """The plainest cache there is: keeps every key and value, attends by absolute positions."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        if layer in self.keys:
            k_BKTE = torch.cat((self.keys[layer], k_BKTE), dim=2)
            v_BKTE = torch.cat((self.values[layer], v_BKTE), dim=2)
        self.keys[layer], self.values[layer] = k_BKTE, v_BKTE
        num_keys, num_queries = k_BKTE.shape[2], q_BHTE.shape[2]
        key_positions = torch.arange(num_keys)
        query_positions = key_positions[num_keys - num_queries :]
        mask = visible(query_positions, key_positions, spec.window)
        if spec.softcap is not None:
            return softcapped_attention(q_BHTE, k_BKTE, v_BKTE, mask, scale=spec.scale, softcap=spec.softcap)
        if spec.alibi_slopes_H is not None:
            mask = spec.alibi_bias(query_positions, key_positions).masked_fill(~mask, float("-inf"))
        return grouped_attention(q_BHTE, k_BKTE, v_BKTE, scale=spec.scale, mask=mask)


def decode_with_cache(decoder: Decoder, tokens_BT: Tensor, num_prefill: int) -> Tensor:
    """Logits of all tokens from one prefill and single steps."""
    cache = ConcatenatedCache()
    pieces = [decoder(tokens_BT[:, :num_prefill], attention=cache)]
    for position in range(num_prefill, tokens_BT.shape[1]):
        token_B1 = tokens_BT[:, position : position + 1]
        pieces.append(decoder(token_B1, positions_BT=torch.tensor([[position]]), attention=cache))
    return torch.cat(pieces, dim=1)


def test_logits_equal_transformers_on_a_full_forward(tiny: Any) -> None:
    decoder = load_decoder(tiny.folder)
    with torch.no_grad():
        logits_BTV = decoder(tiny.tokens_BT)
    assert logits_BTV.std() > 0.1, "the test would prove nothing on flat logits"
    assert (logits_BTV - tiny.logits_BTV).abs().max() < TOLERANCE


def test_cached_decode_equals_transformers_token_by_token(tiny: Any) -> None:
    tokens_BT, expected = tiny.tokens_BT, tiny.logits_BTV
    scaling = load_config(tiny.folder).rope_scaling
    if scaling is not None and scaling["rope_type"] in ("dynamic", "longrope"):
        # Past the trained length these rotate anew by the length so far, so that a cache cannot equal a full forward.
        tokens_BT = tokens_BT[:, :15]
        with torch.no_grad():
            expected = tiny.model(tokens_BT, use_cache=False).logits
    decoder = load_decoder(tiny.folder)
    with torch.no_grad():
        logits_BTV = decode_with_cache(decoder, tokens_BT, num_prefill=9)
    assert (logits_BTV - expected).abs().max() < TOLERANCE


def test_saved_folder_loads_in_transformers_with_equal_logits(
    tiny: Any, tmp_path: Path, load_in_transformers: Callable[[Path], Any]
) -> None:
    decoder = load_decoder(tiny.folder)
    for source, folder in ((tiny.folder, tmp_path / "with-source"), (None, tmp_path / "from-config")):
        save_decoder(decoder, folder, source=source, max_shard_bytes=40_000)
        assert len(list(folder.glob("*.safetensors"))) > 1
        again = load_in_transformers(folder)
        with torch.no_grad():
            logits_BTV = again(tiny.tokens_BT, use_cache=False).logits
        assert torch.equal(logits_BTV, tiny.logits_BTV)
        assert load_config(folder) == decoder.config
        with torch.no_grad():
            assert torch.equal(load_decoder(folder)(tiny.tokens_BT), decoder(tiny.tokens_BT))


def test_falcon_rw_rounds_its_bias_as_transformers_over_long_texts(tiny_model: Callable[[str], Any]) -> None:
    tiny = tiny_model("falcon-rw")
    tokens_BT = torch.randint(1, 101, (1, 500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny.model(tokens_BT, use_cache=False).logits
        assert (load_decoder(tiny.folder)(tokens_BT) - expected).abs().max() < TOLERANCE


def test_state_dict_has_exactly_the_parameters_of_the_config(tiny: Any) -> None:
    decoder = load_decoder(tiny.folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert shapes == decoder.config.parameter_shapes()
    assert decoder.config.num_parameters() == sum(parameter.numel() for parameter in tiny.model.parameters())


def test_gradients_equal_transformers_with_and_without_checkpointing(tiny: Any) -> None:
    decoder = load_decoder(tiny.folder).train()
    reference = copy.deepcopy(tiny.model)
    targets = tiny.tokens_BT[:, 1:].reshape(-1)

    def loss_of(logits_BTV: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets)

    loss_of(reference(tiny.tokens_BT, use_cache=False).logits).backward()
    expected = reference.get_input_embeddings().weight.grad
    for checkpointing in (False, True):
        decoder.gradient_checkpointing = checkpointing
        decoder.zero_grad()
        loss_of(decoder(tiny.tokens_BT)).backward()
        grad = decoder.model.embed_tokens.weight.grad
        assert grad is not None
        assert expected is not None
        assert (grad - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
        assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_bfloat16_stays_near_float32(tiny: Any) -> None:
    decoder = load_decoder(tiny.folder, dtype="bfloat16")
    with torch.no_grad():
        logits_BTV = decoder(tiny.tokens_BT)
    assert logits_BTV.dtype == torch.bfloat16
    error = (logits_BTV.float() - tiny.logits_BTV).norm() / tiny.logits_BTV.norm()
    assert error < 0.03
