"""A tokenizer as GGUF's metadata: its pieces, their kinds, merges or scores, special ids, chat template. Torch-free.

llama.cpp knows two kinds of vocabulary that these families use. "gpt2": byte-level BPE with merges; the rule that
splits text before merging is code there, chosen by a name. "llama": SentencePiece BPE, where the neighbours of the
highest score merge first; a merge list's ranks give the same order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from burnish.data.tokenizer import Tokenizer
from burnish.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (_LLAMA3,): "llama-bpe",
    (_LLAMA3.replace("{1,3}", ""),): "qwen2",
    (r" ?[^(\s|[.,!?…。，、।۔،])]+",): "bloom",
    ("Digits/1", _GPT2): "smollm",
    ("Punctuation/Contiguous", _GPT2, "Digits/0", "[0-9][0-9][0-9]"): "falcon",
}
"""llama.cpp's name of a splitting rule, by the tokenizer's own steps."""


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """Values for `tokenizer.ggml.*` (`tokenizer.chat_template` by its whole name), and what does not carry over."""

    settings: dict[str, Any]
    notes: tuple[str, ...]


def gguf_vocabulary(tokenizer: Tokenizer, *, vocab_size: int) -> GgufVocabulary:
    """The tokenizer of a model with `vocab_size` rows of embeddings; rows without a token become unused ones.

    Raises:
        CheckpointError: it is of a kind that llama.cpp does not have, or larger than the model.
    """
    record = json.loads(tokenizer.backend.to_str())
    model = record["model"]
    pieces: dict[str, int] = dict(model["vocab"]) if model.get("type") == "BPE" else {}
    sentencepiece = bool(model.get("byte_fallback"))
    if not pieces or (not sentencepiece and not _has_step(record, "ByteLevel")):
        raise CheckpointError(
            f"the tokenizer of {tokenizer.source} has no place in a GGUF file",
            got=model.get("type"),
            expected="byte-level BPE, or SentencePiece BPE with bytes",
            remedy="Use --to safetensors or --to ctranslate2.",
        )
    added = {token["id"]: token for token in record.get("added_tokens", ())}
    texts = {number: piece for piece, number in pieces.items()} | {
        number: token["content"] for number, token in added.items()
    }
    if max(texts) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of {tokenizer.source} has ids beyond the model's vocabulary",
            got=max(texts),
            expected=f"at most {vocab_size - 1}",
        )
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    notes: list[str] = []
    settings: dict[str, Any] = {
        "model": "llama" if sentencepiece else "gpt2",
        "pre": "default" if sentencepiece else _split_name(record, notes),
        "tokens": [texts.get(number, f"[PAD{number}]") for number in range(vocab_size)],
        "token_type": [
            _kind(texts.get(number), added.get(number), number == tokenizer.unk_id) for number in range(vocab_size)
        ],
    }
    if sentencepiece:
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        last = float(-len(merges) - 1)
        settings["scores"] = [
            float(-ranks[texts[number]]) if number in texts and texts[number] in ranks else last
            for number in range(vocab_size)
        ]
        settings["add_space_prefix"] = _adds_space(record)
    else:
        settings["merges"] = [" ".join(merge) for merge in merges]
    settings |= _special(tokenizer, notes)
    return GgufVocabulary(settings=settings, notes=tuple(notes))


def _special(tokenizer: Tokenizer, notes: list[str]) -> dict[str, Any]:
    plain, whole = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=True)
    start = whole[: len(whole) - len(plain)] if whole[-len(plain) :] == plain else whole[:1]
    settings: dict[str, Any] = {
        "add_bos_token": tokenizer.bos_id is not None and whole[:1] == [tokenizer.bos_id] != plain[:1],
        "add_eos_token": tokenizer.eos_id is not None and whole[-1:] == [tokenizer.eos_id] != plain[-1:],
    }
    if len(start) > 1:
        notes.append("the tokenizer puts more than one token before a text, llama.cpp only the first")
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    further = sorted(tokenizer.eos_ids - {tokenizer.eos_id})
    if tokenizer.eos_id is None:
        notes.append("the model names no end token: llama.cpp takes its default one")
    if further:
        ids["eot"] = further[0]
    if len(further) > 1:
        notes.append(f"{len(further) + 1} ids end an answer, GGUF has keys for two: {further[1:]} are left out")
    settings |= {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    if tokenizer.chat_template is not None:
        settings["tokenizer.chat_template"] = tokenizer.chat_template
    return settings


def _kind(text: str | None, added: dict[str, Any] | None, unknown: bool) -> int:
    if text is None:
        return UNUSED
    if unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return BYTE if is_byte else NORMAL


def _steps(record: dict[str, Any], key: str, inner: str) -> list[dict[str, Any]]:
    step = record.get(key)
    if step is None:
        return []
    return list(step[inner]) if step.get("type") == "Sequence" else [step]


def _has_step(record: dict[str, Any], kind: str) -> bool:
    steps = _steps(record, "pre_tokenizer", "pretokenizers") + _steps(record, "decoder", "decoders")
    return any(step["type"] == kind for step in steps)


def _split_name(record: dict[str, Any], notes: list[str]) -> str:
    found: list[str] = []
    for step in _steps(record, "pre_tokenizer", "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel":
            found += [_GPT2] if step.get("use_regex", True) else []
        elif kind == "Split":
            pattern = step["pattern"]
            found.append(pattern.get("Regex", pattern.get("String", "")))
        elif kind == "Digits":
            found.append(f"Digits/{int(bool(step.get('individual_digits')))}")
        else:
            found.append(f"{kind}/{step.get('behavior', '')}")
    name = _SPLITS.get(tuple(found))
    if name is None:
        notes.append(
            "llama.cpp has no rule of its own for how this tokenizer splits text and uses GPT-2's: hand it token ids, "
            "or expect other tokens for some texts"
        )
    return name or "gpt-2"


def _adds_space(record: dict[str, Any]) -> bool:
    """Whether a text's first word gets a space before it."""
    for step in _steps(record, "normalizer", "normalizers"):
        if step["type"] == "Prepend":
            return True
    for step in _steps(record, "pre_tokenizer", "pretokenizers"):
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False
