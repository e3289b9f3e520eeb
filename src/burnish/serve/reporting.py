"""What a server did, told to a tracker at an interval: rates, latencies, and accuracy of what was labelled."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from burnish.track.protocol import Tracker

_RATES = {
    "burnish_requests_total": "requests_per_s",
    "burnish_prompt_tokens_total": "prompt_tokens_per_s",
    "burnish_output_tokens_total": "output_tokens_per_s",
}
_COUNTS = {"burnish_rejections_total": "rejections", "burnish_preemptions_total": "preemptions"}
_GAUGES = {
    "burnish_running_answers": "running_answers",
    "burnish_queued_answers": "queued_answers",
    "burnish_kv_used_ratio": "kv_used_ratio",
}
_TIMES = {
    "burnish_time_to_first_token_seconds": "ttft_ms",
    "burnish_time_per_output_token_seconds": "tpot_ms",
    "burnish_request_seconds": "e2e_ms",
}
_SHARES = (0.5, 0.95, 0.99)

Reading = Mapping[str, float]


def read(registry: CollectorRegistry) -> dict[str, float]:
    """Every sample, models added up; a histogram's buckets by their upper bounds, as NAME_bucket:BOUND."""
    found: dict[str, float] = defaultdict(float)
    for family in registry.collect():
        for sample in family.samples:
            name = sample.name
            if "le" in sample.labels:
                name = f"{name}:{sample.labels['le']}"
            found[name] += sample.value
            if sample.name == "burnish_feedback_total":
                found[f"feedback:{sample.labels['correct']}"] += sample.value
            elif sample.name == "burnish_requests_total":
                found[f"requests:{sample.labels['outcome']}"] += sample.value
    return dict(found)


def figures_between(before: Reading, after: Reading, seconds: float) -> dict[str, float]:
    """What happened between two readings; what nothing happened to is left out.

    Latencies are in milliseconds, their quantiles drawn from the histograms' buckets as Prometheus draws them.
    """
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    figures = {name: grown.get(source, 0.0) / seconds for source, name in _RATES.items()}
    figures |= {name: grown.get(source, 0.0) for source, name in _COUNTS.items()}
    figures |= {name: after[source] for source, name in _GAUGES.items() if source in after}
    for outcome in ("gone", "refused", "failed"):
        figures[f"requests_{outcome}"] = grown.get(f"requests:{outcome}", 0.0)
    for source, name in _TIMES.items():
        count = grown.get(f"{source}_count", 0.0)
        if not count:
            continue
        figures[f"{name}.mean"] = 1e3 * grown[f"{source}_sum"] / count
        for share in _SHARES:
            figures[f"{name}.p{share * 100:g}"] = 1e3 * _quantile(grown, f"{source}_bucket:", share * count)
    right, wrong = grown.get("feedback:true", 0.0), grown.get("feedback:false", 0.0)
    if right + wrong:
        figures["feedback.labels"] = right + wrong
        figures["feedback.accuracy"] = right / (right + wrong)
    return figures


def _quantile(grown: Reading, prefix: str, rank: float) -> float:
    """Where `rank` lies, evenly within its bucket; the last bound where it is beyond all."""
    bounds = sorted(
        (float(name.removeprefix(prefix)), value) for name, value in grown.items() if name.startswith(prefix)
    )
    low = below = 0.0
    for bound, count in bounds:
        if count >= rank:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (rank - below) / max(count - below, 1e-12)
        low, below = bound, count
    return low


@contextmanager
def reporting(registry: CollectorRegistry, tracker: Tracker, *, interval_s: float) -> Iterator[None]:
    """Tell a tracker, which has begun, every `interval_s` seconds for the time of a block, and once at its end."""
    over = threading.Event()
    thread = threading.Thread(target=_report, args=(registry, tracker, interval_s, over), name="burnish-report")
    thread.daemon = True
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _report(registry: CollectorRegistry, tracker: Tracker, interval_s: float, over: threading.Event) -> None:
    number, before, then_s = 0, read(registry), time.monotonic()
    ends = False
    while not ends:
        ends = over.wait(interval_s)
        number += 1
        after, now_s = read(registry), time.monotonic()
        tracker.metrics(figures_between(before, after, max(now_s - then_s, 1e-3)), step=number)
        before, then_s = after, now_s
    whole = {name: after[name] for name in ("burnish_feedback_total", "burnish_output_tokens_total") if name in after}
    tracker.metrics({name.removeprefix("burnish_"): value for name, value in whole.items()})
