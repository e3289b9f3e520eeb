"""From the results of many runs to tables: medians, extremes, and ratios to the best peer, paired by round."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers.table import aligned, spread

Result = dict[str, Any]
"""What a runner printed, with `round`, `work`, `name`, `group` and `peer` beside."""

LOSS_STEPS = (4, 50)
COLUMNS = ("tokens/s", "x best peer", "s/step", "loaded MiB", "over it MiB", "x best peer")


@dataclass(frozen=True)
class Setting:
    """All results of one name."""

    name: str
    peer: bool
    results: Sequence[Result]

    def values(self, key: str) -> list[float]:
        return [result[key] for result in self.results]

    @property
    def tokens_per_s(self) -> float:
        return median(self.values("tokens_per_s"))


def group_table(results: Sequence[Result]) -> str:
    """The Markdown table of one group of settings; the best peer is the one with the highest median tokens/s."""
    settings = _settings(results)
    best = best_peer(settings)
    heading = [
        "setting",
        *COLUMNS,
        *(f"loss, step {step}" for step in LOSS_STEPS),
        "fwd / bwd / opt %",
        "real %",
        "plan",
    ]
    rows = [heading]
    for setting in settings:
        name = f"**{setting.name}**" if best is not None and setting.name == best.name else setting.name
        rows.append(
            [
                name,
                spread(setting.values("tokens_per_s"), 0),
                spread(ratios(setting, best, "tokens_per_s"), 2),
                spread(setting.values("s_per_step"), 2, extremes=False),
                spread(setting.values("loaded_mib"), 0, extremes=False),
                spread(setting.values("increase_mib"), 0),
                spread(ratios(setting, best, "increase_mib"), 2),
                *(loss_at(setting, step) for step in LOSS_STEPS),
                _parts(setting),
                _percent(median(setting.values("real_share"))),
                _planned(setting),
            ]
        )
    return aligned(rows)


def best_peer(settings: Sequence[Setting]) -> Setting | None:
    """The fastest peer, None where there is none."""
    return max((one for one in settings if one.peer), key=lambda one: one.tokens_per_s, default=None)


def ratios(mine: Setting, theirs: Setting | None, key: str) -> list[float]:
    """Mine over theirs, one a round that has both."""
    if theirs is None:
        return []
    base = {result["round"]: result[key] for result in theirs.results}
    return [result[key] / base[result["round"]] for result in mine.results if result["round"] in base]


def loss_at(setting: Setting, step: int) -> str:
    """Loss of a step, counted from 1, of the first round. A star: rows in the trainer's own order."""
    losses = setting.results[0]["losses"]
    if len(losses) < step or losses[step - 1] is None:
        return "-"
    star = " *" if setting.results[0]["settings"].get("own_order") else ""
    return f"{losses[step - 1]:.3f}{star}"


def relative_difference(ours: float, theirs: float) -> float:
    """How far `ours` is from `theirs`, as a share of it."""
    return abs(ours - theirs) / abs(theirs)


def saved(value: float, vanilla: float) -> float:
    """Share of `vanilla` that `value` does without; negative where it takes more."""
    return 1 - value / vanilla


def _settings(results: Sequence[Result]) -> list[Setting]:
    names = dict.fromkeys(result["name"] for result in results)
    found = [[result for result in results if result["name"] == name] for name in names]
    return [Setting(name, bool(mine[0]["peer"]), mine) for name, mine in zip(names, found)]


def _parts(setting: Setting) -> str:
    shares = [[result[f"{part}_share"] for result in setting.results] for part in ("forward", "backward", "optimizer")]
    if any(None in values for values in shares):
        return "-"
    return " / ".join(_percent(median(values)) for values in shares)


def _planned(setting: Setting) -> str:
    """Memory as `burnish plan` predicts it, over what it was."""
    told = [result["settings"] for result in setting.results]
    return spread([one["predicted_mib"] / one["growth_mib"] for one in told if "predicted_mib" in one], 2)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
