"""burnish makes a language model fit: your task, your hardware, your budget; and proves it with measurements.

    import burnish

    model, tokenizer = burnish.load("burnish-sql-base")
    engine = burnish.Engine("burnish-sql-base")
    for out in engine.generate(["CREATE TABLE"], burnish.SamplingParams(max_tokens=16)):
        print(out.text, out.metrics.ttft_ms)

The names below are imported when they are first used, so `import burnish` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BurnishError": "burnish.errors",
    "DataConfig": "burnish.pipeline.examples",
    "Engine": "burnish.pipeline.api",
    "GateLimits": "burnish.measure.compare",
    "GateOptions": "burnish.pipeline.gates",
    "LoraConfig": "burnish.train.lora",
    "MixedPrecision": "burnish.compress.config",
    "PruneConfig": "burnish.compress.prune_config",
    "QatConfig": "burnish.pipeline.qat",
    "QuantizeConfig": "burnish.compress.config",
    "RecoverConfig": "burnish.pipeline.recovery",
    "SamplingParams": "burnish.engine.sampling",
    "Source": "burnish.pipeline.opening",
    "TrainConfig": "burnish.train.config",
    "Workload": "burnish.measure.bench",
    "bench": "burnish.pipeline.bench",
    "evaluate": "burnish.pipeline.evaluate",
    "export": "burnish.pipeline.export",
    "load": "burnish.pipeline.api",
    "merge": "burnish.pipeline.merge",
    "prune": "burnish.pipeline.prune",
    "quantize": "burnish.pipeline.quantize",
    "tune": "burnish.pipeline.tune",
}

__all__ = [
    "BurnishError",
    "DataConfig",
    "Engine",
    "GateLimits",
    "GateOptions",
    "LoraConfig",
    "MixedPrecision",
    "PruneConfig",
    "QatConfig",
    "QuantizeConfig",
    "RecoverConfig",
    "SamplingParams",
    "Source",
    "TrainConfig",
    "Workload",
    "__version__",
    "bench",
    "evaluate",
    "export",
    "load",
    "merge",
    "plan",
    "prune",
    "quantize",
    "tune",
]

if TYPE_CHECKING:
    from burnish import plan
    from burnish.compress.config import MixedPrecision, QuantizeConfig
    from burnish.compress.prune_config import PruneConfig
    from burnish.engine.sampling import SamplingParams
    from burnish.errors import BurnishError
    from burnish.measure.bench import Workload
    from burnish.measure.compare import GateLimits
    from burnish.pipeline.api import Engine, load
    from burnish.pipeline.bench import bench
    from burnish.pipeline.evaluate import evaluate
    from burnish.pipeline.examples import DataConfig
    from burnish.pipeline.export import export
    from burnish.pipeline.gates import GateOptions
    from burnish.pipeline.merge import merge
    from burnish.pipeline.opening import Source
    from burnish.pipeline.prune import prune
    from burnish.pipeline.qat import QatConfig
    from burnish.pipeline.quantize import quantize
    from burnish.pipeline.recovery import RecoverConfig
    from burnish.pipeline.tune import tune
    from burnish.train.config import TrainConfig
    from burnish.train.lora import LoraConfig


def __getattr__(name: str) -> Any:
    if name == "plan":  # a room that is called like a function
        return import_module("burnish.plan")
    if name not in _HOME:
        raise AttributeError(f"module 'burnish' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
