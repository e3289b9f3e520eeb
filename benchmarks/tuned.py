"""The bundled model tuned on the bundled task as `burnish demo` does it: a real model whose answers can be judged.

    python benchmarks/tuned.py --out runs/benchmark-tuned

Takes a minute or two, once. The merged folder that a demo left (runs/DATE-demo/merged) will do as well.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from session import cores

from burnish.pipeline.demo import EVAL_ROWS, LORA, MODEL, TRAIN, TRAIN_ROWS
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.merge import merge
from burnish.pipeline.opening import Source
from burnish.pipeline.tune import tune

DEFAULT = Path("runs/benchmark-tuned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("--threads", type=int, default=cores())
    flags = parser.parse_args()
    print(tuned_model(flags.out, threads=flags.threads))
    return 0


def tuned_model(folder: Path, *, threads: int) -> Path:
    """The tuned and merged model in `folder`, made there unless it is there already."""
    for place in (folder, folder / "merged"):
        if (place / "config.json").is_file():
            return place
    source = Source(threads=threads)
    data = DataConfig(source=TRAIN_ROWS, template="chat", max_length=256, seed=0)
    print("tuning the bundled model, once", file=sys.stderr)
    adapter = tune(
        MODEL,
        data=data,
        out=folder / "adapter",
        lora=LORA,
        config=replace(TRAIN, seed=0),
        eval_data=EVAL_ROWS,
        source=source,
    ).adapter
    return Path(merge(adapter, out=folder / "merged", source=source, dtype="float32").out)


if __name__ == "__main__":
    sys.exit(main())
