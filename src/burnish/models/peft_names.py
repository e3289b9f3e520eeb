"""How adapters of our linears appear among the modules of a family's files, which is what PEFT names them by.

PEFT puts an adapter on a module of the Hugging Face model. Where that module fuses several of our linears (q, k and v
in GPT-2, Bloom, NeoX, ..., gate and up in Phi-3) its adapter has one A for all of them, and B's rows are theirs in the
file's order: ours then share A, and the family's weight map cuts and joins B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from burnish.models.config import ModelConfig
from burnish.models.families.registry import family_named
from burnish.models.weight_map import Rows, WeightMap

KEY_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class FileModule:
    """A linear of the Hugging Face model: its name, the canonical linears it holds, and how their rows are laid out."""

    name: str
    targets: tuple[str, ...]
    rows: Rows | None
    stored_transposed: bool

    def split(self, b_OR: Tensor) -> list[Tensor]:
        """B of each target from the file's B (out, rank); raises CheckpointError when the rows do not fit."""
        return [b_OR] if self.rows is None else self.rows.split(b_OR, name=self.name)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The file's B from the targets'."""
        return parts[0] if self.rows is None else self.rows.join(parts, name=self.name)


def file_modules(config: ModelConfig) -> list[FileModule]:
    """Every linear of the family's files for this config, in the order of the forward."""
    weight_map: WeightMap = family_named(config.family).weight_map(config)
    placements = weight_map.placements([f"{name}.weight" for name in config.linear_shapes()])
    return [
        FileModule(
            name=name.rpartition(".")[0],
            targets=tuple(target.rpartition(".")[0] for target in placement.targets),
            rows=placement.rows,
            stored_transposed=placement.transposed,
        )
        for name, placement in placements.items()
    ]


def fused_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of our linears that share one module in the family's files, group by group."""
    modules = file_modules(model.config)  # type: ignore[arg-type]
    return [module.targets for module in modules if len(module.targets) > 1]


def target_suffixes(chosen: Sequence[str], every: Sequence[str]) -> list[str]:
    """The shortest list of name endings that PEFT resolves to exactly `chosen` among the linears `every`.

    An ending has no layer number where that is possible ("attn.c_proj"); whole names are the last resort.
    """
    wanted = set(chosen)
    suffixes: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            if all(other in wanted for other in every if f".{other}".endswith(f".{suffix}")):
                suffixes[suffix] = None
                break
    return list(suffixes)
