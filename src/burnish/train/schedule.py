"""Learning-rate schedules: a factor of the peak rate for every optimizer step."""

from __future__ import annotations

import math
from typing import Literal, get_args

from burnish.errors import ConfigError

ScheduleName = Literal["linear", "cosine", "constant"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of warm-up: `warmup` below 1 is a share of all steps (rounded up), else a number of steps."""
    return math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)


def rate_factor(step: int, *, total_steps: int, warmup: int, schedule: str) -> float:
    """Factor in 0..1 for `step` (counted from 1), rising linearly over `warmup` steps, then following `schedule`.

    The first step already learns (1 / warmup) and the last one still does: a schedule that ends at zero wastes a step.

    Raises:
        ConfigError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ConfigError("unknown learning-rate schedule", got=repr(schedule), expected=", ".join(SCHEDULES))
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup - 1) / max(1, total_steps - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
