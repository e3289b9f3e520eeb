"""Dynamic loss scaling: gradients of float16 arithmetic, kept above its smallest number.

Micikevicius et al., 2017, arXiv:1710.03740, section 3.2. The loss is multiplied before the backward pass, the float32
gradients are divided after it; a scale at which something overflowed is halved, one that held for long is doubled.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

START, FLOOR, CEILING = 2.0**16, 1.0, 2.0**24
DOUBLE_AFTER = 2000


class LossScale:
    """The scale and what moves it; a step is `value` times the loss, `unscale`, then `update`.

    Args:
        start: the first scale.
        floor: the scale never falls below; an overflow there is an overflow of the loss itself.
        double_after: steps in a row without overflow after which the scale doubles.
    """

    def __init__(self, *, start: float = START, floor: float = FLOOR, double_after: int = DOUBLE_AFTER) -> None:
        self.value, self.floor, self.double_after = start, floor, double_after
        self.steps_held = 0

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale, in place; infinities and NaN stay."""
        gradients = list(gradients)
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / self.value)  # type: ignore[reportPrivateImportUsage]

    def update(self, *, overflow: bool) -> bool:
        """Move the scale after a step.

        Args:
            overflow: a gradient was not finite although the loss was; the step is to be skipped.

        Returns:
            Whether the overflow was the scale's doing, so that the next step is worth trying: False once the scale
            stood at its floor (and without an overflow).
        """
        if not overflow:
            self.steps_held += 1
            if self.steps_held >= self.double_after:
                self.value, self.steps_held = min(self.value * 2.0, CEILING), 0
            return False
        excused = self.value > self.floor
        self.value, self.steps_held = max(self.value / 2.0, self.floor), 0
        return excused

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "steps_held": self.steps_held}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.value, self.steps_held = float(state_dict["value"]), int(state_dict["steps_held"])
