"""Learning-rate schedules: a factor of the peak rate for every optimizer step."""

from __future__ import annotations

import math
from typing import Literal, get_args

from burnish.errors import ConfigError

ScheduleName = Literal["linear", "cosine", "wsd", "inverse-sqrt", "constant"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
DECAY_SHARE = 0.2  # of all steps, at the end of "wsd"; Hägele et al., 2024, arXiv:2405.18392, section 4


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of warm-up: `warmup` below 1 is a share of all steps (rounded up), else a number of steps."""
    return math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)


def rate_factor(step: int, *, total_steps: int, warmup: int, schedule: str, min_rate: float = 0.0) -> float:
    """Factor in 0..1 for `step` (counted from 1), rising linearly over `warmup` steps, then following `schedule`.

    "linear" and "cosine" fall from the peak to `min_rate` over all steps that are left; "wsd" (warm-up, stable, decay;
    Hu et al., 2024, arXiv:2404.06395) keeps the peak and falls linearly over the last `DECAY_SHARE` of all steps;
    "inverse-sqrt" falls as sqrt(warmup / step), whatever the number of steps (Vaswani et al., 2017, arXiv:1706.03762),
    never below `min_rate`.

    The first step already learns (1 / warmup). The last one runs at `min_rate`; where that is 0 it still learns, as if
    one more were to come: a schedule that ends at zero wastes a step.

    Raises:
        ConfigError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ConfigError("unknown learning-rate schedule", got=repr(schedule), expected=", ".join(SCHEDULES))
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "inverse-sqrt":
        return max(min_rate, math.sqrt(max(1, warmup) / step))
    falling = total_steps - warmup
    if schedule == "wsd":
        falling = min(falling, math.ceil(DECAY_SHARE * total_steps))
    # Steps after the last one at the peak, of those until the end of the fall.
    done = step - (total_steps - falling) - 1
    progress = min(1.0, max(0.0, done / max(1, falling - bool(min_rate))))
    share = 1.0 - progress if schedule in ("linear", "wsd") else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_rate + (1.0 - min_rate) * share
