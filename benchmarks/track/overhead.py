"""What tracking costs a step of tuning: untracked, to a server, and to one that takes connections and never answers.

    python benchmarks/track/overhead.py --steps 60 --repeats 3 --out FILE.json

Each run is a process of its own, the kinds in turn. Of each: the steps' wall and CPU time, the time that the training
thread spends in the tracker, and the CPU time of the sender while the steps last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("untracked", "server", "stuck")


def one_run(uri: str | None, out: Path, *, steps: int, threads: int) -> dict[str, Any]:
    """Tune the bundled model and time it, without the first two steps."""
    import psutil

    from burnish.pipeline.examples import DataConfig
    from burnish.pipeline.opening import Source
    from burnish.pipeline.tune import tune
    from burnish.track.making import make_tracker
    from burnish.train.config import TrainConfig
    from burnish.train.lora import LoraConfig

    tracker: Any = make_tracker(uri, beside=out, warn=lambda line: print(line, file=sys.stderr))
    spent: list[tuple[float, float]] = []
    cpu: list[float] = []
    sender: list[float] = []
    send = tracker.metrics

    def metrics(figures: Any, *, step: int | None = None) -> None:
        wall_s, own_s = time.perf_counter(), time.thread_time()
        send(figures, step=step)
        if step is not None:
            spent.append((time.perf_counter() - wall_s, time.thread_time() - own_s))
            cpu.append(time.process_time())
            process = getattr(getattr(tracker, "tracker", None), "_sender", None)
            if process is not None and process.poll() is None:
                times = psutil.Process(process.pid).cpu_times()
                sender.append(times.user + times.system)

    tracker.metrics = metrics
    record = tune(
        "burnish-sql-base",
        data=DataConfig(source="text-to-sql:train:6400", template="chat", max_length=256),
        out=out,
        lora=LoraConfig(rank=32, alpha=64),
        config=TrainConfig(steps=steps, micro_batch_size=16, learning_rate=1.5e-3, warmup=0.05),
        source=Source(threads=threads),
        tracker=tracker,
    )
    walls = [step["seconds"] for step in record.steps[2:]]
    own = [after - before for before, after in itertools.pairwise(cpu[1:])]
    return {
        "step_wall_ms": 1e3 * statistics.median(walls),
        "step_cpu_ms": 1e3 * statistics.median(own),
        "tracker_wall_us": 1e6 * statistics.median(each for each, _ in spent[2:]),
        "tracker_cpu_us": 1e6 * statistics.median(each for _, each in spent[2:]),
        "tracker_wall_us_most": 1e6 * max(each for each, _ in spent[2:]),
        "steps_s": sum(walls),
        "sender_cpu_s": sender[-1] if sender else 0.0,
        "sender_cpu_s_after_10_steps": sender[-1] - sender[9] if len(sender) > 10 else 0.0,
        "adapter": _digest(out),
    }


def _digest(out: Path) -> str:
    import hashlib

    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", nargs=2, metavar=("URI", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        uri, folder = given.one
        print(json.dumps(one_run(uri or None, Path(folder), steps=given.steps, threads=given.threads)))
        return
    from mlflow_server import Door, MlflowServer

    from burnish.measure.hardware import hardware_record, version_record

    server = MlflowServer()
    door = Door(server.port)
    door.stick()
    uris = {"untracked": "", "server": f"{server.url}?wait=0", "stuck": f"{door.url}?wait=0"}
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(given.repeats):
                for kind in KINDS:
                    command = [sys.executable, __file__, "--out", str(given.out), "--steps", str(given.steps)]
                    command += ["--threads", str(given.threads), "--one", uris[kind], f"{folder}/{kind}-{number}"]
                    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                    results[kind].append(json.loads(done.stdout.splitlines()[-1]))
                    print(kind, results[kind][-1], flush=True)
    finally:
        door.close()
        server.close()
    adapters = {run["adapter"] for runs in results.values() for run in runs}
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "steps": given.steps,
        "repeats": given.repeats,
        "threads": given.threads,
        "load_average": os.getloadavg(),
        "same_adapter": len(adapters) == 1,
        "runs": results,
        "hardware": hardware_record(),
        "versions": version_record(),
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
