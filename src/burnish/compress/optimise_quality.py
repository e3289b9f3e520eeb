"""Whether 8-bit weights and activations are good enough to be used unasked: the rule of `--quantize auto`.

int8 is taken where all of this holds, and the checkpoint's own weights otherwise:

- the model runs on a CPU, and has at least 100 million parameters: below, float32 is exact and quick as it is;
- the checkpoint is dense;
- over the passages below, the mean divergence KL(checkpoint || int8) of the next-token distributions is at most
  0.01 nats per token, both computed in the dtype of the activations.

The comparison runs the checkpoint block by block straight from its files, so that only one dense block is in memory
beside the quantized model. Its result is kept with the cached weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.data.tokenizer import Tokenizer
from burnish.errors import BurnishError
from burnish.models.decoder import Decoder
from burnish.models.loading import materialise, open_checkpoint, plan_reads, read_all

# B passages, T tokens, D hidden, N scored positions

KL_LIMIT = 0.01
MIN_PARAMETERS = 100_000_000
MAX_TOKENS = 96
"""Of each passage."""
CHUNK_TOKENS = 32
PASSAGES = (
    "The harbour was quiet when the first boats came back. Two of them had lost their nets in the storm, and the "
    "third carried a crew that nobody in the village knew. An old woman counted the lanterns along the pier, as she "
    "did every evening, and wrote the number down: fourteen, one fewer than the night before.",
    "CREATE TABLE ship (id INTEGER PRIMARY KEY, name TEXT, built INTEGER, harbour TEXT);\n"
    "-- Which harbours have more than two ships that were built after 1990?\n"
    "SELECT harbour, COUNT(*) FROM ship WHERE built > 1990 GROUP BY harbour HAVING COUNT(*) > 2 ORDER BY harbour;",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n"
    "    if len(ordered) % 2 == 1:\n        return ordered[middle]\n"
    "    return (ordered[middle - 1] + ordered[middle]) / 2\n",
)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(checkpoint || quantized) in nats per token; `kl_mean` is None where there was no text to measure it on."""

    kl_mean: float | None
    num_tokens: int
    problem: str | None = None

    @property
    def good(self) -> bool:
        return self.kl_mean is not None and self.kl_mean <= KL_LIMIT

    @property
    def verdict(self) -> str:
        """One line for people."""
        if self.kl_mean is None:
            return f"int8 could not be compared with the checkpoint: {self.problem}"
        sign = "within" if self.good else "beyond"
        return (
            f"int8 is {self.kl_mean:.2g} nats/token from the checkpoint over {self.num_tokens} tokens, "
            f"{sign} the limit of {KL_LIMIT:g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For the cache's record."""
        return asdict(self)

    @staticmethod
    def from_record(record: object) -> Divergence | None:
        """What `to_dict` gave; None when it is anything else."""
        if not isinstance(record, Mapping):
            return None
        kl_mean, num_tokens = record.get("kl_mean"), record.get("num_tokens")
        if not isinstance(num_tokens, int) or not isinstance(kl_mean, (float, int, type(None))):
            return None
        return Divergence(kl_mean=kl_mean, num_tokens=num_tokens, problem=record.get("problem"))


def reason_against(decoder: Decoder, hf_config: Mapping[str, Any], device: torch.device) -> str | None:
    """Why int8 is out of the question before anything was measured; None when it is not."""
    if hf_config.get("quantization_config") is not None:
        return "the checkpoint is quantized already"
    if device.type != "cpu":
        return "int8 is chosen unasked on CPUs only"
    count = decoder.config.num_parameters()
    if count < MIN_PARAMETERS:
        return f"{count / 1e6:.3g} million parameters are quick enough as they are"
    return None


def divergence_from_checkpoint(quantized: Decoder, folder: Path, *, allow_pickle: bool = False) -> Divergence:
    """Compare a quantized decoder with the folder it was made from, over the bundled passages.

    Args:
        quantized: shares its embeddings with the checkpoint's decoder, in their dtype.

    Raises:
        CheckpointError: the folder is corrupt.
    """
    try:
        tokenizer = Tokenizer.load(folder)
    except BurnishError:
        return Divergence(kl_mean=None, num_tokens=0, problem="the folder has no tokenizer that burnish reads")
    longest = min(MAX_TOKENS, quantized.config.max_position_embeddings)
    passages = [tokenizer.encode_prompt(text)[:longest] for text in PASSAGES]
    width = max(map(len, passages))
    # Padding comes after the text, where causal attention hides it.
    tokens_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids in passages], device=quantized.device)
    real_BT = torch.tensor([[True] * len(ids) + [False] * (width - len(ids)) for ids in passages])
    real_BT = real_BT.to(quantized.device)
    if int(tokens_BT.max()) >= quantized.config.vocab_size:
        return Divergence(kl_mean=None, num_tokens=0, problem="the tokenizer has tokens that the model lacks")
    with torch.inference_mode():
        child_ND = quantized.hidden(tokens_BT)[real_BT]
        with _streamed(quantized, folder, allow_pickle=allow_pickle) as (checkpoint, resident):
            parent_ND = checkpoint.hidden(tokens_BT)[real_BT]
            with resident("lm_head") if checkpoint.lm_head is not None else ExitStack():
                divergences_N = torch.cat(
                    [
                        _divergence(checkpoint.logits(parent), quantized.logits(child))
                        for parent, child in zip(parent_ND.split(CHUNK_TOKENS), child_ND.split(CHUNK_TOKENS))
                    ]
                )
    mean = float(divergences_N.double().mean())
    if mean != mean:
        return Divergence(kl_mean=None, num_tokens=len(divergences_N), problem="a model's logits are not numbers")
    return Divergence(kl_mean=max(0.0, mean), num_tokens=len(divergences_N))


def _divergence(parent_NV: Tensor, child_NV: Tensor) -> Tensor:
    parent_NV = torch.log_softmax(parent_NV.float(), dim=-1)
    child_NV = torch.log_softmax(child_NV.float(), dim=-1)
    return (parent_NV.exp() * (parent_NV - child_NV)).sum(dim=-1)


@contextmanager
def _streamed(like: Decoder, folder: Path, *, allow_pickle: bool) -> Iterator[Any]:
    """A dense decoder whose blocks are read when they run and forgotten after, and a way to hold one of its modules."""
    decoder, reader, _ = open_checkpoint(folder, dtype=like.dtype, allow_pickle=allow_pickle)
    plan = plan_reads(decoder, reader)
    names = list(decoder.state_dict())
    blocks = {id(block): f"model.layers.{layer}" for layer, block in enumerate(decoder.model.layers)}

    spare: dict[torch.Size, list[Tensor]] = defaultdict(list)

    def load(prefix: str) -> None:
        inside = [name for name in names if name.startswith(f"{prefix}.")]
        for name in inside:
            # Memory goes from block to block: freed, it would stay with the process as holes in its heap.
            shape = decoder.get_parameter(name).shape
            if spare[shape]:
                _set_parameter(decoder, name, spare[shape].pop())
            else:
                materialise(decoder, name, like.device)
        wanted = {key: value for key, value in plan.items() if value.targets[0] in inside}
        read_all(reader, wanted, decoder.state_dict())

    def drop(prefix: str) -> None:
        for name in names:
            if name.startswith(f"{prefix}."):
                tensor = decoder.get_parameter(name).data
                spare[tensor.shape].append(tensor)
                _set_parameter(decoder, name, torch.empty_like(tensor, device="meta"))

    @contextmanager
    def resident(prefix: str) -> Iterator[None]:
        load(prefix)
        try:
            yield
        finally:
            drop(prefix)

    def before(block: nn.Module, *_: object) -> None:
        load(blocks[id(block)])

    def after(block: nn.Module, *_: object) -> None:
        drop(blocks[id(block)])

    for block in decoder.model.layers:
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    decoder.model.embed_tokens = like.model.embed_tokens
    for name in ("embed_positions", "embed_norm", "norm"):
        setattr(decoder.model, name, getattr(like.model, name))
    yield decoder, resident


def _set_parameter(decoder: Decoder, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
