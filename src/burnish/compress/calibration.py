"""Calibration text through a decoder, block by block: the inputs of every linear as Hessians, never as whole tensors.

Only the hidden states between two blocks are kept for all tokens. Inside a block the linears are visited in the order
in which they run, each group of linears with the same input at once, after those before it were replaced by what they
became ("true sequential"): a later linear sees the inputs it will see in the compressed model. Each visit runs the
block up to the linear; the attention itself runs once, when the linears before it have their final weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from burnish.compress.calibration_forward import HEADS, NOTHING, OUTPUT, KeptAttention, run_block
from burnish.compress.second_moment import SecondMoment
from burnish.errors import DataError
from burnish.models.decoder import Block, Decoder

# B sequences of one batch, T tokens of its longest, D hidden, N real tokens, I in features

PADDING = 0
"""Any valid token: it stands after the text, where causal attention hides it, and its activations are left out."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """tokens_BT (B, T) int64, padded on the right, and real_BT (B, T) bool, True on text."""

    tokens_BT: Tensor
    real_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class InputSample:
    """What a linear reads: rows_NI (N, in) of some tokens and peak_I (in,), largest magnitudes over all; float32."""

    rows_NI: Tensor
    peak_I: Tensor


@dataclass(kw_only=True)
class _BlockInput:
    hidden_BTD: Tensor
    real_BT: Tensor
    arguments: list[tuple[Any, ...]]
    attention: KeptAttention
    activation: str
    padded: bool

    def run(self, layer: int, block: nn.Module, hidden_BTD: Tensor | None = None) -> Tensor:
        """What a block makes of the hidden states."""
        hidden_BTD = self.hidden_BTD if hidden_BTD is None else hidden_BTD
        rope = self.arguments[layer][0]
        return run_block(block, hidden_BTD, rope, self.attention, activation=self.activation)

    def real(self, x_BTI: Tensor) -> Tensor:
        """Those of the real tokens: (N, I)."""
        return x_BTI[self.real_BT] if self.padded else x_BTI.flatten(0, 1)


class _Stop(Exception):
    """Ends a block's forward at the linear whose input was wanted."""


def make_batches(
    examples: Sequence[Sequence[int]], *, vocab_size: int, max_length: int, batch_tokens: int
) -> list[TokenBatch]:
    """Sort sequences by length and pad them into batches of at most `batch_tokens` tokens (at least one sequence each).

    Sequences longer than `max_length` are cut into pieces; empty ones are dropped.

    Raises:
        DataError: nothing is left, or a token id is outside the vocabulary (names the sequence).
    """
    pieces: list[Sequence[int]] = []
    for number, tokens in enumerate(examples):
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            raise DataError(
                f"calibration sequence {number} has token ids outside the vocabulary",
                got=f"{min(tokens)}..{max(tokens)}",
                expected=f"0..{vocab_size - 1}",
                remedy="Tokenize it with this model's tokenizer",
            )
        pieces += [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
    if not pieces:
        raise DataError("the calibration set holds no tokens", got=f"{len(examples)} sequences")
    pieces.sort(key=len, reverse=True)
    batches = []
    start = 0
    while start < len(pieces):
        longest = len(pieces[start])
        rows = pieces[start : start + max(1, batch_tokens // longest)]
        tokens_BT = torch.full((len(rows), longest), PADDING, dtype=torch.int64)
        real_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            tokens_BT[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            real_BT[row, : len(tokens)] = True
        batches.append(TokenBatch(tokens_BT=tokens_BT, real_BT=real_BT))
        start += len(rows)
    return batches


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of one block by their name inside it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


class BlockWalk:
    """Hidden states of all calibration tokens, advanced one block at a time.

    Args:
        model: the decoder; put in eval mode by the caller.
        batches: from `make_batches`.
    """

    def __init__(self, model: Decoder, batches: Sequence[TokenBatch]) -> None:
        self._inputs = [_embed(model, batch) for batch in batches]
        self._before_attention: set[str] = set()

    def input_groups(self, layer: int, block: nn.Module) -> list[list[str]]:
        """Names of the block's linears, grouped by the very tensor they read, in the order in which they run.

        Linears that do not run, or run twice, belong to no decoder of this package.
        """
        smallest = min(self._inputs, key=lambda each: each.hidden_BTD.numel())
        smallest.attention.calls = 0
        seen: list[tuple[str, Tensor]] = []
        self._before_attention = set()

        def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append((name, args[0]))
            if not smallest.attention.calls:
                self._before_attention.add(name)

        hooks = [linear.register_forward_pre_hook(partial(note, name)) for name, linear in block_linears(block).items()]
        try:
            smallest.run(layer, block)
        finally:
            for hook in hooks:
                hook.remove()
        groups: list[list[str]] = []
        tensors: list[Tensor] = []
        for name, tensor in seen:
            position = next((index for index, known in enumerate(tensors) if known is tensor), None)
            if position is None:
                tensors.append(tensor)
                groups.append([name])
            else:
                groups[position].append(name)
        return groups

    def hessian(self, layer: int, block: nn.Module, name: str) -> Tensor:
        """Mean of x x' over the real tokens that a linear reads: (in, in), float32.

        `input_groups` of this block comes first, and linears are asked for in its order, those before already final.
        """
        linear = block_linears(block)[name]
        moment = SecondMoment(linear)
        self._keep_attention(name)
        for each, x_BTI, _ in self._inputs_and_outputs_of(layer, block, linear, to_the_end=False):
            moment.add(each.real(x_BTI))
        return moment.mean()

    def hessians(self, layer: int, block: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """`hessian` of several linears from one forward through the block as it is now."""
        linears = block_linears(block)
        moments = {name: SecondMoment(linears[name]) for name in names}
        for each in self._inputs:
            each.attention.release()

            def add(name: str, each: _BlockInput, _: nn.Module, args: tuple[Tensor, ...]) -> None:
                moments[name].add(each.real(args[0]))

            hooks = [linears[name].register_forward_pre_hook(partial(add, name, each)) for name in names]
            try:
                each.run(layer, block)
            finally:
                for hook in hooks:
                    hook.remove()
        return {name: moment.mean() for name, moment in moments.items()}

    def samples(self, layer: int, block: nn.Module, names: Sequence[str], *, tokens: int) -> dict[str, InputSample]:
        """What linears read in one forward through the block as it is now: `tokens` of the real ones, evenly spread."""
        linears = block_linears(block)
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        peaks: dict[str, Tensor] = {}
        step = max(1, sum(int(each.real_BT.sum()) for each in self._inputs) // max(1, tokens))
        seen = 0
        for each in self._inputs:
            each.attention.release()

            def add(name: str, real_BT: Tensor, first: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
                x_NI = args[0][real_BT]
                peak_I = x_NI.abs().amax(dim=0).float()
                peaks[name] = torch.maximum(peaks[name], peak_I) if name in peaks else peak_I
                rows[name].append(x_NI[first::step].float())

            hooks = [
                linears[name].register_forward_pre_hook(partial(add, name, each.real_BT, -seen % step))
                for name in names
            ]
            try:
                each.run(layer, block)
            finally:
                for hook in hooks:
                    hook.remove()
            seen += int(each.real_BT.sum())
        return {name: InputSample(rows_NI=torch.cat(rows[name]), peak_I=peaks[name]) for name in names}

    def inputs_and_residuals(self, layer: int, block: nn.Module, name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What a linear reads, (N, in), and what its output is added to, (N, out), per batch, float32.

        The latter is None where the output is not added to the residual stream. Asked for as `hessian` is.
        """
        assert isinstance(block, Block)
        linear = block_linears(block)[name]
        self._keep_attention(name)
        ends_block = name == "mlp.down_proj" and block.mlp_output_norm is None
        ends_attention = name == "self_attn.o_proj" and block.attention_output_norm is None
        for each, x_BTI, out_BTD in self._inputs_and_outputs_of(layer, block, linear, to_the_end=ends_block):
            residual_BTD = out_BTD
            if ends_attention:
                hidden_BTD = each.hidden_BTD
                residual_BTD = block.input_layernorm(hidden_BTD) if block.residual_from_norm else hidden_BTD
            yield each.real(x_BTI).float(), None if residual_BTD is None else each.real(residual_BTD).float()

    def advance(self, layer: int, block: nn.Module) -> None:
        """Replace the hidden states by what the block makes of them."""
        for each in self._inputs:
            each.hidden_BTD = each.run(layer, block)
            each.attention.release()

    def finish(self, model: Decoder, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the decoder makes of the hidden states from this block on: (real_BT, final hidden states) per batch."""
        for each in self._inputs:
            each.attention.release()
            hidden_BTD = each.hidden_BTD
            for later, block in enumerate(model.model.layers[layer:], start=layer):
                hidden_BTD = each.run(later, block, hidden_BTD)
            yield each.real_BT, model.model.norm(hidden_BTD)

    def forget_attention(self) -> None:
        """Compute the block's attention anew when it is next needed: linears before it have changed."""
        for each in self._inputs:
            each.attention.release()

    def _keep_attention(self, name: str) -> None:
        """Hold on to what the linears before this one, which are final, make of the batches."""
        after = HEADS if name == "self_attn.o_proj" else OUTPUT
        keep = NOTHING if name in self._before_attention else after
        for each in self._inputs:
            each.attention.keep = keep

    def _inputs_and_outputs_of(
        self, layer: int, block: nn.Module, linear: nn.Linear, *, to_the_end: bool
    ) -> Iterator[tuple[_BlockInput, Tensor, Tensor | None]]:
        """Each batch, what the linear reads of it, and what the block would give if the linear gave zeros.

        The block is only run to the end when that is asked for, and stops at the linear otherwise.
        """
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught.append(args[0])
            if not to_the_end:
                raise _Stop

        def silence(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.zeros_like(output)

        hooks = [linear.register_forward_pre_hook(catch), linear.register_forward_hook(silence)]
        try:
            for each in self._inputs:
                out_BTD = None
                with suppress(_Stop):
                    out_BTD = each.run(layer, block)
                yield each, caught.pop(), out_BTD
        finally:
            for hook in hooks:
                hook.remove()


def _embed(model: Decoder, batch: TokenBatch) -> _BlockInput:
    """Run the decoder with blocks that only write down what they are given."""
    first: list[Tensor] = []
    arguments: list[tuple[Any, ...]] = []

    def record(hidden_BTD: Tensor, *rest: Any) -> Tensor:
        first.append(hidden_BTD)
        arguments.append(rest)
        return hidden_BTD

    attention = KeptAttention()
    blocks = list(model.model.layers)
    for block in blocks:
        block.forward = record
    try:
        model.hidden(batch.tokens_BT.to(model.device), attention=attention)
    finally:
        for block in blocks:
            del block.forward
    return _BlockInput(
        hidden_BTD=first[0],
        real_BT=batch.real_BT.to(model.device),
        arguments=arguments,
        attention=attention,
        activation=model.config.activation,
        padded=not bool(batch.real_BT.all()),
    )
