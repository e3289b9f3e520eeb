"""Model folders with random weights in a published shape: as large, as fast and as wide as the real one, and as mute.

They load everywhere the real ones do, so that time and memory can be measured without the weights at hand.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from burnish.errors import ConfigError
from burnish.models.checkpoint_writing import PendingTensor, write_safetensors_folder, write_text, writing_to
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.families.registry import family_named
from burnish.models.hf_config import config_of
from burnish.models.loading import parse_dtype, pending_tensors
from burnish.models.shapes import hf_config_of_shape

STD = 0.02
SHARD_BYTES = 2_000_000_000
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_random_checkpoint(
    shape: str | Mapping[str, Any],
    out: str | Path,
    *,
    seed: int = 0,
    dtype: str | torch.dtype = "bfloat16",
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model folder: random weights, config.json, and a tokenizer of the model's vocabulary.

    Linears and embeddings are normal with standard deviation 0.02, norms neutral, biases zero. Every tensor has its own
    stream of random numbers from the seed and its name, and is made when it is written: memory holds one at a time.

    Args:
        shape: a name in `shapes.SHAPES`, or a config.json's content.
        dtype: of the weights in the files.

    Returns:
        The folder.

    Raises:
        ConfigError: the shape or the dtype is unknown.
        CapacityError: the disk is full.
    """
    folder = Path(out)
    hf_config = hf_config_of_shape(shape) if isinstance(shape, str) else dict(shape)
    wanted = parse_dtype(dtype)
    if wanted is None:
        raise ConfigError("random weights need a dtype", got=dtype, expected="float32, bfloat16 or float16")
    config = config_of(hf_config)
    write_safetensors_folder(folder, random_tensors(config, seed=seed, dtype=wanted), max_shard_bytes=max_shard_bytes)
    record = {**hf_config, "torch_dtype": str(wanted).removeprefix("torch.")}
    write_text(folder / "config.json", json.dumps(record, indent=2) + "\n")
    write_tokenizer(config, folder)
    return folder


def random_tensors(config: ModelConfig, *, seed: int, dtype: torch.dtype) -> dict[str, PendingTensor]:
    """The random tensors of a config under the files' names, none of them made yet."""
    announced = pending_tensors(Decoder(config, device="meta", dtype=dtype))
    weight_map = family_named(config.family).weight_map(config)
    norms = set(config.norm_shapes())
    tensors: dict[str, PendingTensor] = {}
    for name, tensor in announced.items():
        placement = weight_map.canonical(name)
        assert placement is not None
        module, _, suffix = placement.targets[0].rpartition(".")
        if suffix == "bias":
            constant: float | None = 0.0
        else:
            constant = 1.0 - config.norm_weight_offset if module in norms else None
        tensors[name] = _random_tensor(name, tensor.shape, dtype, seed=seed, constant=constant)
    return tensors


def _random_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, *, seed: int, constant: float | None
) -> PendingTensor:
    def make() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        if constant is not None:
            return tensor.fill_(constant)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return tensor.normal_(0.0, STD, generator=generator)

    return PendingTensor(shape, dtype, make)


def write_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Write a byte-level tokenizer of exactly the config's vocabulary, with its begin and end ids in their places.

    Text becomes one token per byte and round-trips; the ids past the bytes decode to made-up words.

    Raises:
        ConfigError: the vocabulary has no room for 256 bytes and the special tokens, or these lie outside it.
    """
    begin = config.bos_id
    end = config.eos_ids[0] if config.eos_ids else None
    specials = {token_id: text for token_id, text in ((begin, "<|begin|>"), (end, "<|end|>")) if token_id is not None}
    if config.vocab_size < 256 + len(specials):
        raise ConfigError(
            "the vocabulary is too small for a byte-level tokenizer", got=config.vocab_size, expected="258 or more"
        )
    if any(token_id >= config.vocab_size for token_id in specials):
        raise ConfigError(
            "a begin or end token lies outside the vocabulary",
            got=", ".join(map(str, specials)),
            expected=f"less than {config.vocab_size}",
        )
    texts = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocab: dict[str, int] = {}
    num_words = 0
    for token_id in range(config.vocab_size):
        text = specials.get(token_id) or next(texts, None)
        if text is None:
            text, num_words = _word(num_words), num_words + 1
        vocab[text] = token_id
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials.values()])
    record: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    if begin is not None:
        text = specials[begin]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{text} $A", special_tokens=[(text, begin)])
        record["bos_token"] = text
    if end is not None:
        record["eos_token"] = specials[end]
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    write_text(folder / "tokenizer_config.json", json.dumps(record, indent=2) + "\n")
    generation = {"bos_token_id": begin, "eos_token_id": end}
    generation = {key: value for key, value in generation.items() if value is not None}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def _word(number: int) -> str:
    """A different pronounceable word for every number, with a space before it."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    word = ""
    while number or not word:
        number, consonant = divmod(number, len(consonants))
        number, vowel = divmod(number, len(vowels))
        word += consonants[consonant] + vowels[vowel]
    return f"Ġ{word}"
