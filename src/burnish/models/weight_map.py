"""How a family's files name and lay out the tensors that the decoder knows by canonical names. Torch-free.

Canonical names are Hugging Face Llama's, with q, k and v (and gate and up) apart. A `WeightMap` is a list of `Rule`s,
each joining one *module* of the files with one or more canonical modules; the last part of a name ("weight", "bias",
"scales", ...) rides along unchanged. Three questions are answered, each way:

    canonical("transformer.h.0.attn.qkv_proj.weight")   -> Placement(targets, rows, transposed, suffix)
    hf("model.layers.0.self_attn.k_proj.weight")        -> Source("transformer.h.0.attn.qkv_proj.weight", 1, 3)
    hf_module("model.layers.0.self_attn.k_proj")        -> Source("transformer.h.0.attn.qkv_proj", 1, 3)

Source.part is the place of the canonical tensor among those that the file's tensor holds, and Source.parts how many it
holds: (0, 1) means the two are one to one, so that adapters and GPTQ files can use the file's name as it is.

**Rows.** Where one file tensor holds several canonical ones, `Rows` says in what order the *out features* come. It cuts
and joins along one dimension, and that dimension is all it looks at, so one rule serves
    weight (out, in), bias (out,), int weights (out, in), scales (out, groups), zeros (out, groups)      with dim=0
    GPTQ's qweight (in / n, out), scales (groups, out), qzeros (groups, out / n)                         with dim=1
In the last, several rows share one element; blocks then have to fill whole elements, or cutting raises. `out_dim` tells
the dimension for a suffix of the GPTQ layout; g_idx (in,) has none and is the same for every part.

**Transposition** (GPT-2's Conv1D stores (in, out)) applies to a 2-D "weight" only; `Placement.transposed` is already
False for every other suffix. Cut after transposing, transpose after joining.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.errors import CheckpointError

_OUT_DIMS: dict[str, int | None] = {"qweight": 1, "qzeros": 1, "scales": 1, "g_idx": None}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def out_dim(suffix: str) -> int | None:
    """The dimension of out features of a file's tensor by the last part of its name; None when it has none."""
    return _OUT_DIMS.get(suffix, 0)


@dataclass(frozen=True)
class Rows:
    """The order of rows in a fused tensor: `blocks` of (part, count) rows, the whole list repeated `repeats` times.

    (q, k, v) one after the other is Rows(1, ((0, q_rows), (1, k_rows), (2, v_rows))); interleaved per head it is
    Rows(num_heads, ((0, head_dim), (1, head_dim), (2, head_dim))).
    """

    repeats: int
    blocks: tuple[tuple[int, int], ...]

    @property
    def num_parts(self) -> int:
        return 1 + max(part for part, _ in self.blocks)

    @property
    def num_rows(self) -> int:
        """Rows of the fused tensor."""
        return self.repeats * sum(count for _, count in self.blocks)

    def rows_of(self, part: int) -> int:
        """Rows of one part."""
        return self.repeats * sum(count for other, count in self.blocks if other == part)

    def split(self, fused: Any, *, dim: int = 0, name: str = "a fused tensor") -> list[Any]:
        """Cut a torch tensor or numpy array into its parts, in the order of the part numbers.

        Args:
            dim: where the rows are; it may hold several rows per element (see the module's docstring).
            name: for the message.

        Returns:
            One array per part; views where the layout allows, copies otherwise.

        Raises:
            CheckpointError: a block does not fill whole elements.
        """
        parts: dict[int, Any] = {}
        for part, piece in self._pieces(fused, dim, name):
            parts[part] = piece.reshape(*piece.shape[:dim], -1, *piece.shape[dim + 2 :])
        return [parts[part] for part in sorted(parts)]

    def split_into(self, fused: Any, targets: Sequence[Any], *, dim: int = 0, name: str = "a fused tensor") -> None:
        """Cut a torch tensor straight into contiguous `targets`, without a copy in between; else as `split`."""
        for part, piece in self._pieces(fused, dim, name):
            targets[part].view(piece.shape).copy_(piece)

    def _pieces(self, fused: Any, dim: int, name: str) -> Iterator[tuple[int, Any]]:
        """Each block as a view (..., repeats, count, ...)."""
        size = fused.shape[dim]
        before, after = tuple(fused.shape[:dim]), tuple(fused.shape[dim + 1 :])
        counts = [self._elements(count, size, name) for _, count in self.blocks]
        grouped = fused.reshape(*before, self.repeats, sum(counts), *after)
        start = 0
        for (part, _), count in zip(self.blocks, counts):
            yield part, grouped[(slice(None),) * (dim + 1) + (slice(start, start + count),)]
            start += count

    def join(self, parts: Sequence[Any], *, dim: int = 0, name: str = "a fused tensor") -> Any:
        """The inverse of `split`, for torch tensors: one new tensor of the parts' dtype and device.

        Raises:
            CheckpointError: the parts' sizes are not this layout's.
        """
        size = sum(part.shape[dim] for part in parts)
        before, after = tuple(parts[0].shape[:dim]), tuple(parts[0].shape[dim + 1 :])
        counts = [self._elements(count, size, name) for _, count in self.blocks]
        fused = parts[0].new_empty((*before, self.repeats, sum(counts), *after))
        start = 0
        for (part, _), count in zip(self.blocks, counts):
            index = (slice(None),) * (dim + 1) + (slice(start, start + count),)
            if parts[part].shape[dim] != self.repeats * count:
                raise CheckpointError(
                    f"part {part} of {name} has the wrong size",
                    got=parts[part].shape[dim],
                    expected=self.repeats * count,
                )
            fused[index] = parts[part].reshape(*before, self.repeats, count, *after)
            start += count
        return fused.reshape(*before, size, *after)

    def _elements(self, count: int, size: int, name: str) -> int:
        elements, rest = divmod(count * size, self.num_rows)
        if rest:
            raise CheckpointError(
                f"{name} cannot be cut between its parts",
                got=f"{size} elements for {self.num_rows} rows",
                expected=f"blocks of {count} rows to fill whole elements",
            )
        return elements


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One module of the files and the canonical modules it holds.

    Attributes:
        source: the module's name in the files; "{i}" stands for the layer.
        targets: canonical names; more than one only with `rows`.
        transposed: its 2-D weight is stored (in, out).
    """

    source: str
    targets: tuple[str, ...]
    rows: Rows | None = None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a tensor of the files goes.

    Attributes:
        targets: full canonical names, in the order of the parts.
        rows: how to cut it, None when there is one target.
        transposed: swap the two dimensions before cutting.
        suffix: last part of the name.
    """

    targets: tuple[str, ...]
    rows: Rows | None
    transposed: bool
    suffix: str


@dataclass(frozen=True)
class Source:
    """Where a canonical name comes from in the files: part `part` of `parts` that the tensor or module holds."""

    name: str
    part: int
    parts: int


class WeightMap:
    """A family's rules for one config.

    Args:
        rules: every module the files can hold. Where two name the same target, both are read and the first is written.
        prefix: what names may lack at their start, e.g. "transformer." in files of the bare trunk.
        ignored: regular expressions of full names that carry no weights (old buffers).
    """

    def __init__(self, rules: Sequence[Rule], *, prefix: str = "", ignored: Sequence[str] = ()) -> None:
        self.rules = tuple(rules)
        self.prefix = prefix
        self._ignored = [re.compile(pattern) for pattern in ignored]
        self._by_source = {rule.source: rule for rule in rules}
        self._by_target: dict[str, tuple[Rule, int]] = {}
        for rule in rules:
            for part, target in enumerate(rule.targets):
                self._by_target.setdefault(target, (rule, part))

    def is_ignored(self, hf_name: str) -> bool:
        """Whether a file may hold this name although no weight comes of it."""
        return any(pattern.search(hf_name) for pattern in self._ignored)

    def canonical(self, hf_name: str) -> Placement | None:
        """Where a tensor of the files goes, or None when no rule knows it."""
        for name in (hf_name, self.prefix + hf_name):
            module, _, suffix = name.rpartition(".")
            template, layer = _template(module)
            rule = self._by_source.get(template)
            if rule is not None:
                return Placement(
                    targets=tuple(f"{_numbered(target, layer)}.{suffix}" for target in rule.targets),
                    rows=rule.rows,
                    transposed=rule.transposed and suffix == "weight",
                    suffix=suffix,
                )
        return None

    def hf(self, canonical_name: str) -> Source:
        """Where a canonical tensor comes from, e.g. "model.layers.3.self_attn.q_proj.weight".

        Raises:
            CheckpointError: no rule knows the name.
        """
        module, _, suffix = canonical_name.rpartition(".")
        source = self.hf_module(module)
        return Source(f"{source.name}.{suffix}", source.part, source.parts)

    def hf_module(self, canonical_module: str) -> Source:
        """Where a canonical module comes from, e.g. "model.layers.3.self_attn.q_proj".

        Raises:
            CheckpointError: no rule knows the name.
        """
        template, layer = _template(canonical_module)
        found = self._by_target.get(template)
        if found is None:
            raise CheckpointError(f"the family's files have no place for {canonical_module}")
        rule, part = found
        return Source(_numbered(rule.source, layer), part, len(rule.targets))

    def placements(self, canonical_names: Sequence[str]) -> dict[str, Placement]:
        """The files' tensors that hold these canonical ones, by file name, in the order of first mention."""
        placements: dict[str, Placement] = {}
        for canonical_name in canonical_names:
            source = self.hf(canonical_name)
            if source.name not in placements:
                placement = self.canonical(source.name)
                assert placement is not None
                placements[source.name] = placement
        return placements


def _template(module: str) -> tuple[str, str | None]:
    match = _NUMBER.search(module)
    if match is None:
        return module, None
    return f"{module[: match.start()]}{{i}}{module[match.end() :]}", match.group()


def _numbered(template: str, layer: str | None) -> str:
    return template if layer is None else template.replace("{i}", layer)
