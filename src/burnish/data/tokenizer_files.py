"""Reading the tokenizer files of a model folder: the tokenizer itself, its special tokens and its chat templates.

Both generations of Hugging Face files are read: special tokens as strings or as objects, in tokenizer_config.json or in
special_tokens_map.json; chat templates in the config (one, or a list with names) or in files of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from burnish.data.sentencepiece_model import load_sentencepiece
from burnish.errors import CheckpointError

_GPT2_TOKEN = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        backend: the loaded tokenizer, all special tokens registered.
        special_tokens: name ("bos_token", ...) -> text; further names of the config's own included.
        chat_templates: name -> Jinja source; the usual one is "default".
        stop_ids: end tokens named by generation_config.json (or config.json without it).
        bos_id: begin token named by the model's own configs, for folders whose tokenizer names none.
        max_length: longest input the tokenizer's author vouches for, if told.
    """

    backend: Backend
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]
    stop_ids: tuple[int, ...]
    bos_id: int | None
    max_length: int | None
    settings: dict[str, Any] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} where the file does not exist.

    Raises:
        CheckpointError: the file is not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON", got=error) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", got=type(value).__name__)
    return value


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read everything in `folder` that concerns its tokenizer.

    Raises:
        CheckpointError: the folder or its tokenizer files are missing or malformed.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", expected="a model folder with tokenizer files")
    settings = read_json(folder / "tokenizer_config.json")
    special = _special_tokens(settings, folder)
    has_post_processor = False
    if (folder / "tokenizer.json").is_file():
        backend = _load_backend(folder / "tokenizer.json")
        has_post_processor = backend.post_processor is not None
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _byte_level_bpe(folder, add_prefix_space=bool(settings.get("add_prefix_space", False)))
        end = AddedToken(_GPT2_TOKEN, special=True, normalized=False)
        special = {"bos_token": end, "eos_token": end, "unk_token": end} | special
    elif (folder / "tokenizer.model").is_file():
        backend, found = load_sentencepiece(folder / "tokenizer.model")
        special = {name: AddedToken(text, special=True, normalized=False) for name, text in found.items()} | special
        settings = {"add_bos_token": True} | settings  # what Llama-like models with only this file were trained with
    else:
        raise CheckpointError(
            f"there is no tokenizer in {folder}",
            expected="tokenizer.json, or vocab.json with merges.txt, or tokenizer.model",
            remedy="Copy the tokenizer files of the model there",
        )
    backend.no_truncation()
    backend.no_padding()
    _register(backend, settings, special, folder)
    texts = {name: token.content for name, token in special.items()}
    if not has_post_processor:
        _add_ends(backend, settings, texts)
    generation = read_json(folder / "generation_config.json")
    config = read_json(folder / "config.json")
    length = settings.get("model_max_length")
    return TokenizerFiles(
        backend=backend,
        special_tokens=texts,
        chat_templates=_chat_templates(settings, folder),
        stop_ids=_ids((generation or config).get("eos_token_id"), folder),
        bos_id=next(iter(_ids(generation.get("bos_token_id", config.get("bos_token_id")), folder)), None),
        max_length=int(length) if isinstance(length, int | float) and 0 < length < 1e9 else None,
        settings=settings,
    )


def _load_backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{path} cannot be read as a tokenizer", got=error) from error


def _byte_level_bpe(folder: Path, *, add_prefix_space: bool) -> Backend:
    """The tokenizer of GPT-2's two files: byte-level BPE, nothing added at either end."""
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"vocab.json and merges.txt in {folder} cannot be read", got=error) from error
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _as_token(value: object) -> AddedToken | None:
    """A special token from either of its spellings: text, or an object with content."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return _added_token(value, special=True)
    return None


def _added_token(value: Mapping[str, Any], *, special: bool) -> AddedToken:
    flags = {name: bool(value[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=special, **flags)


def _special_tokens(settings: Mapping[str, Any], folder: Path) -> dict[str, AddedToken]:
    """Named special tokens; the old map file counts only where the config does not list added tokens itself."""
    named: dict[str, Any] = {name: value for name, value in settings.items() if name.endswith("_token")}
    if isinstance(settings.get("extra_special_tokens"), Mapping):
        named |= settings["extra_special_tokens"]
    if "added_tokens_decoder" not in settings:
        named |= {
            name: value
            for name, value in read_json(folder / "special_tokens_map.json").items()
            if name.endswith("_token")
        }
    tokens = {name: _as_token(value) for name, value in named.items()}
    return {name: token for name, token in tokens.items() if token is not None}


def _register(backend: Backend, settings: Mapping[str, Any], special: Mapping[str, AddedToken], folder: Path) -> None:
    """Add the tokens that the config names and the tokenizer lacks, in the order of their ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = settings.get("added_tokens_decoder") or {}
    wanted: list[AddedToken] = []
    try:
        for _, value in sorted(listed.items(), key=lambda item: int(item[0])):
            flags = {
                name: bool(value[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value
            }
            wanted.append(AddedToken(value["content"], special=bool(value.get("special")), **flags))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"added_tokens_decoder in {folder / 'tokenizer_config.json'} is malformed", got=repr(error)
        ) from error
    if not listed:
        extra = sorted(read_json(folder / "added_tokens.json").items(), key=lambda item: str(item[1]).zfill(12))
        wanted += [AddedToken(text, normalized=False) for text, _ in extra]
    for token in wanted:
        if token.content not in known:
            known.add(token.content)
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    named = list(special.values())
    extras = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    if isinstance(extras, list):
        named += [token for token in map(_as_token, extras) if token is not None]
    marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([token for token in named if token.content and token.content not in marked])


def _add_ends(backend: Backend, settings: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Give a tokenizer without a post-processor the begin and end tokens that its config asks for."""
    bos = texts.get("bos_token") if settings.get("add_bos_token") else None
    eos = texts.get("eos_token") if settings.get("add_eos_token") else None
    ends = [text for text in (bos, eos) if text]
    if ends:
        single = " ".join(filter(None, [bos, "$A", eos]))
        pair = f"{single} {' '.join(filter(None, [bos, '$B', eos]))}"
        ids = [(text, backend.token_to_id(text)) for text in dict.fromkeys(ends)]
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _chat_templates(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Chat templates by name; files of their own go before the config's."""
    try:
        files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        if (folder / "chat_template.jinja").is_file():
            files["default"] = folder / "chat_template.jinja"
        if files:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"a chat template in {folder} cannot be read", got=error) from error
    value = settings.get("chat_template", read_json(folder / "chat_template.json").get("chat_template"))
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    named = value if isinstance(value, dict) else {}
    templates = {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
    if not templates or len(templates) != len(named):
        raise CheckpointError(
            f"chat_template in {folder / 'tokenizer_config.json'} is malformed",
            expected="a text, or a list of objects with name and template",
        )
    return templates


def _ids(value: object, folder: Path) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    whole = tuple(item for item in ids if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
    if len(whole) != len(ids):
        raise CheckpointError(f"a token id in the configs of {folder} is malformed", got=value, expected="an integer")
    return whole
