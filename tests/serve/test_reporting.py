"""What a tracker hears of a server, and whether Grafana's board asks for what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from serving_process import BASE, ServingProcess

from burnish.serve.reporting import figures_between, read
from burnish.track.jsonl import TrackedRun, read_runs


def test_figures_are_of_the_time_between_two_readings() -> None:
    registry = CollectorRegistry()
    requests = Counter("burnish_requests", "r", ["kind", "model", "outcome"], registry=registry)
    ttft = Histogram("burnish_time_to_first_token_seconds", "t", ["model"], buckets=(0.1, 0.2, 0.4), registry=registry)
    feedback = Counter("burnish_feedback", "f", ["model", "correct"], registry=registry)
    requests.labels("chat", "a", "ok").inc(5)
    ttft.labels("a").observe(0.05)
    feedback.labels("a", "false").inc()
    before = read(registry)
    for model, seconds in (("a", 0.15), ("a", 0.15), ("b", 0.15), ("b", 0.3)):
        requests.labels("chat", model, "ok").inc()
        ttft.labels(model).observe(seconds)
    requests.labels("chat", "b", "failed").inc(2)
    feedback.labels("a", "true").inc(3)
    feedback.labels("b", "false").inc()
    figures = figures_between(before, read(registry), 2.0)
    assert figures["requests_per_s"] == 3.0
    assert figures["requests_failed"] == 2
    assert figures["requests_gone"] == 0
    assert figures["ttft_ms.mean"] == pytest.approx(187.5)
    assert figures["ttft_ms.p50"] == pytest.approx(100 + 100 * 2 / 3)
    assert figures["ttft_ms.p95"] == pytest.approx(200 + 200 * 0.8)
    assert (figures["feedback.labels"], figures["feedback.accuracy"]) == (4, 0.75)
    assert "tpot_ms.mean" not in figures
    quiet = figures_between(read(registry), read(registry), 1.0)
    assert quiet["requests_per_s"] == 0
    assert not any(name.startswith(("ttft_ms", "feedback")) for name in quiet)


def test_latency_beyond_the_last_bound_is_that_bound() -> None:
    registry = CollectorRegistry()
    ttft = Histogram("burnish_time_to_first_token_seconds", "t", ["model"], buckets=(0.1, 0.2), registry=registry)
    ttft.labels("a").observe(7)
    assert figures_between({}, read(registry), 1.0)["ttft_ms.p99"] == pytest.approx(200)


def whole(path: Path) -> TrackedRun:
    (run,) = read_runs(path)
    return run


def test_server_tells_its_tracker(tmp_path: Path) -> None:
    path = tmp_path / "serve.jsonl"
    with ServingProcess("--track", str(path), "--track-interval", "1000") as server:
        answer = server.complete(max_tokens=3, ignore_eos=True)
        server.post("/v1/feedback", {"id": answer["id"], "correct": False})
        code, said = server.end()
    assert code == 0, said
    run = whole(path)
    assert run.status == "finished"
    assert run.params["server.max_running"] == 32
    assert len(run.params[f"models.{BASE}"]) == 64
    (step, figures), (_, last) = run.metrics
    assert step == 1
    assert figures["output_tokens_per_s"] > 0
    assert figures["ttft_ms.p95"] > 0
    assert figures["feedback.accuracy"] == 0.0
    assert last["output_tokens_total"] == 3


def test_every_metric_of_the_dashboard_is_exported(server: ServingProcess, repository: Path) -> None:
    board = json.loads((repository / "ops" / "grafana" / "burnish.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    named = {name for query in queries for name in re.findall(r"\bburnish_[a-z_]+", query)}
    assert len(named) > 15
    answer = server.complete(max_tokens=4, ignore_eos=True)
    server.post("/v1/feedback", {"id": answer["id"], "correct": True})
    exported, labels = set(), {}
    for line in server.get("/metrics").text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            exported |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
        elif not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels.setdefault(name, set()).update(re.findall(r'(\w+)="', rest))
    assert named <= exported
    # A query that picks or groups by a label the metric does not have would show nothing.
    for query in queries:
        for name, selector in re.findall(r"\b(burnish_[a-z_]+)\{([^}]*)\}", query):
            wanted = set(re.findall(r"(\w+)=~?", selector)) - {"job"}
            grouped = set(re.findall(r"by \(([\w, ]+)\)", query)) - {"le"}
            assert name not in labels or wanted | grouped <= labels[name], query


def test_interval_out_of_range_is_refused() -> None:
    with pytest.raises(RuntimeError, match="track-interval"):
        ServingProcess("--track-interval", "0")
