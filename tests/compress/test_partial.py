from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from burnish.compress import quantize
from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.partial import STATE, PartialFolder
from burnish.compress.quantize import QuantizeResult, quantize_model
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder

MakeDecoder = Callable[..., Decoder]

KILLED = """
import json, os, signal, sys, warnings
from pathlib import Path
import torch
from burnish.compress.config import QuantizeConfig
from burnish.compress.partial import PartialFolder
from burnish.compress.quantize import quantize_model
from burnish.models.loading import load_decoder

folder, partial, examples, options, last = sys.argv[1:]
torch.set_num_threads(1)

def on_layer(name, error, seconds):
    if name == last:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_model(
    load_decoder(Path(folder), dtype="float32"),
    json.loads(examples),
    QuantizeConfig(**json.loads(options)),
    on_layer=on_layer,
    partial=PartialFolder(Path(partial)),
)
"""


def _same(one: Decoder, other: Decoder) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _errors(result: QuantizeResult) -> list[tuple[str, float]]:
    return [(layer.name, layer.error) for layer in result.layers]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 16, "activation_order": True},
        {"bits": 3, "group_size": -1, "match_parent": True, "refine": 1},
        {"bits": 2, "group_size": 16, "method": "awq-gptq", "symmetric": False, "match_parent": True},
    ],
    ids=["groups", "matched", "scaled"],
)
def test_killed_run_goes_on_to_the_same_model_bit_for_bit(
    decoder_folder: Path, examples: list[list[int]], tmp_path: Path, options: dict[str, object]
) -> None:
    # In the midst of the second block: the first is on disk, what was done of the second is lost.
    last = "model.layers.1.self_attn.o_proj"
    place = tmp_path / "out" / ".partial"
    arguments = [str(decoder_folder), str(place), json.dumps(examples), json.dumps(options), last]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, timeout=120, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    config = QuantizeConfig(**options)  # pyright: ignore[reportArgumentType]
    partial = PartialFolder(place)
    assert partial.go_on() == 1
    resumed, whole = (load_decoder(decoder_folder, dtype="float32") for _ in range(2))
    found = quantize_model(resumed, examples, config, partial=partial)
    expected = quantize_model(whole, examples, config)
    assert _same(resumed, whole)
    assert _errors(found) == _errors(expected)
    assert found.bits_per_weight == expected.bits_per_weight
    assert PartialFolder(place).go_on() == 2


def test_finished_blocks_are_not_quantized_again(
    make_decoder: MakeDecoder, examples: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole = QuantizeConfig(group_size=16), make_decoder(layers=3, bias=True)
    expected = quantize_model(whole, examples, config, partial=PartialFolder(tmp_path / "p"))
    partial, resumed, heard = PartialFolder(tmp_path / "p"), make_decoder(layers=3, bias=True), []
    assert partial.go_on() == 3
    monkeypatch.setattr(quantize, "quantize_block", None)
    found = quantize_model(resumed, examples, config, partial=partial, on_layer=lambda *record: heard.append(record))
    assert _same(resumed, whole)
    assert found.layers == expected.layers
    assert heard == [(layer.name, layer.error, layer.seconds) for layer in expected.layers]


@pytest.mark.parametrize("damage", ["cut", "missing", "changed"])
def test_damaged_block_and_those_after_it_are_made_anew(
    make_decoder: MakeDecoder, examples: list[list[int]], tmp_path: Path, damage: str
) -> None:
    config, whole = QuantizeConfig(group_size=16), make_decoder(layers=3)
    quantize_model(whole, examples, config, partial=PartialFolder(tmp_path / "p"))
    path = tmp_path / "p" / "block-00001" / "model.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-9] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    partial, resumed = PartialFolder(tmp_path / "p"), make_decoder(layers=3)
    assert partial.go_on() == 1
    quantize_model(resumed, examples, config, partial=partial)
    assert _same(resumed, whole)
    assert PartialFolder(tmp_path / "p").go_on() == 3


def test_chosen_widths_are_not_measured_again(
    make_decoder: MakeDecoder, examples: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, mixed = QuantizeConfig(group_size=16), MixedPrecision(target_bits=7.5)
    whole = make_decoder()
    expected = quantize_model(whole, examples, config, mixed=mixed, partial=PartialFolder(tmp_path / "p"))
    assert len(set(expected.widths.values())) > 1
    partial, resumed = PartialFolder(tmp_path / "p"), make_decoder()
    partial.go_on()
    monkeypatch.setattr(quantize, "measure_sensitivity", None)
    found = quantize_model(resumed, examples, config, mixed=mixed, partial=partial)
    assert found.widths == expected.widths
    assert _same(resumed, whole)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "blocks": []}', '{"format": 1, "blocks": [7]}'])
def test_state_that_is_none_is_not_gone_on_from(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE).write_text(text)
    partial = PartialFolder(tmp_path)
    assert partial.saved() is None
    assert partial.go_on() == 0


def test_nothing_is_written_before_a_block_is_done(tmp_path: Path) -> None:
    partial = PartialFolder(tmp_path / "p")
    assert partial.go_on() == 0
    partial.clear()
    assert not (tmp_path / "p").exists()
