"""A CTranslate2 folder from a decoder, by CTranslate2's own converter; needs the extras `ct2` and `hf`.

The converter reads what transformers reads, so the model is first written as a dense folder beside the result, and
removed again. It runs in a process of its own: its memory is given back, and what its libraries print stays there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from burnish._optional import require
from burnish.compress.dense import dequantize_linears
from burnish.data.tokenizer import Tokenizer
from burnish.errors import ConfigError
from burnish.models.atomic_files import write_text, writing_to
from burnish.models.decoder import Decoder
from burnish.models.saving import copy_companions, save_decoder

CTRANSLATE2_FORMATS = ("int8", "int8_float16", "int8_float32", "float32")
_SCRIPT = (
    "import sys; from ctranslate2.converters import TransformersConverter; "
    "TransformersConverter(sys.argv[1]).convert(sys.argv[2], quantization=sys.argv[3])"
)


def export_ctranslate2(
    decoder: Decoder, folder: Path, *, source: Path, tokenizer: Tokenizer, format: str = "int8"
) -> None:
    """Write a folder with model.bin, under a temporary name until it is whole; files of the same names are replaced.

    Args:
        decoder: its quantized linears are made dense, in place.
        source: the folder it came from: its tokenizer and generation files are copied.
        format: "int8" (float32 or float16 beside it, as the weights are), "int8_float16", "int8_float32" or "float32".

    Raises:
        ConfigError: an unknown format, or the converter cannot convert this model.
        CheckpointError, CapacityError: writing failed.
        MissingExtraError: ctranslate2 or transformers is not installed.
    """
    require("ctranslate2", extra="ct2")
    require("transformers", extra="hf")
    if format not in CTRANSLATE2_FORMATS:
        raise ConfigError("unknown CTranslate2 format", got=format, expected=", ".join(CTRANSLATE2_FORMATS))
    dense = folder.with_name(f".{folder.name}.{os.getpid()}.dense.tmp")
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    dequantize_linears(decoder)
    try:
        save_decoder(decoder, dense, source=source, dtype=torch.float32)
        _name_special_tokens(dense, tokenizer)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(dense), str(made), format],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise ConfigError(
                "CTranslate2's converter cannot convert this model", got=lines[-1], remedy="Use --to safetensors."
            )
        copy_companions(source, made)
        _take_the_place(made, folder)
    finally:
        shutil.rmtree(dense, ignore_errors=True)
        shutil.rmtree(made, ignore_errors=True)


def _name_special_tokens(dense: Path, tokenizer: Tokenizer) -> None:
    """The converter wants a name for begin, end and unknown; what a model lacks gets one that means no harm."""
    path = dense / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    end = tokenizer.special_tokens.get("eos_token")
    if end is None and tokenizer.eos_id is not None:
        end = tokenizer.token(tokenizer.eos_id)
    fallback = end or tokenizer.token(0)
    for name in ("bos_token", "eos_token", "unk_token"):
        if not settings.get(name):
            settings[name] = tokenizer.special_tokens.get(name) or fallback
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _take_the_place(made: Path, folder: Path) -> None:
    """Move the files over, the weights last; other files in `folder` stay."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(made.iterdir(), key=lambda file: file.name == "model.bin"):
            os.replace(file, folder / file.name)
