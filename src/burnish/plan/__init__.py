"""What a model will need, predicted: memory and time per stage, devices, and what works on this machine. No torch.

The room bears the name of its one public function, and is called like it: `burnish.plan("mistral-7b", device="t4")`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from burnish.plan.options import PlanOptions
    from burnish.plan.predict import Plan


class _PlanModule(ModuleType):
    """Without this, importing anything below `burnish.plan` would put the module in the function's place."""

    def __call__(
        self,
        model: str,
        *,
        device: str = "cpu",
        options: PlanOptions | None = None,
        stages: tuple[str, ...] | None = None,
        revision: str | None = None,
        offline: bool = False,
    ) -> Plan:
        """Predict memory and time; see `planning.plan`."""
        from burnish.plan.planning import plan

        return plan(model, device=device, options=options, stages=stages, revision=revision, offline=offline)


sys.modules[__name__].__class__ = _PlanModule
