"""Alert rules and dashboards name metrics and labels that are exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("prometheus_client")

from burnish.engine.outputs import EngineStats
from burnish.serve.admission import Admission
from burnish.serve.metrics import Metrics

# Seen at RabbitMQ 4.0.5 with ops/rabbitmq's settings.
RABBITMQ = {
    "rabbitmq_alarms_memory_used_watermark": (),
    "rabbitmq_alarms_free_disk_space_watermark": (),
    "rabbitmq_queue_messages": ("queue", "vhost"),
    "rabbitmq_queue_messages_ready": ("queue", "vhost"),
    "rabbitmq_queue_consumers": ("queue", "vhost"),
    "rabbitmq_global_messages_acknowledged_total": (),
}
# What Prometheus itself adds to every series.
ADDED = {"job", "instance"}
_NAME = re.compile(r"\b((?:burnish|rabbitmq)_\w+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Names of samples and the labels that they have, of a server on which something happened."""
    fields = dict.fromkeys(EngineStats.__dataclass_fields__, 1)
    engine: Any = SimpleNamespace(state="ready", stats=SimpleNamespace(**fields), restarts=0, counted=lambda name: 0)
    metrics = Metrics(engine, Admission(max_running=1, max_queue=1))
    found: dict[str, set[str]] = {name: set(labels) for name, labels in RABBITMQ.items()} | {"up": set()}
    for family in metrics.registry.collect():
        for suffix in {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",)):
            found[family.name + suffix] = {"le"} if suffix == "_bucket" else set()
    for value in (*vars(metrics).values(), metrics.feedback):
        for family in value.collect() if hasattr(value, "collect") else ():
            labels = set(getattr(value, "_labelnames", ())) | set(getattr(family, "_labelnames", ()))
            for name in found:
                if re.fullmatch(rf"{family.name}(_total|_bucket|_sum|_count)?", name):
                    found[name] |= labels
    return found


def expressions(repository: Path) -> Iterator[tuple[str, str]]:
    rules = yaml.safe_load((repository / "ops" / "prometheus" / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for path in sorted((repository / "ops" / "grafana").glob("*.json")):
        panels = json.loads(path.read_text())["panels"]
        rows = [inner for row in panels for inner in row.get("panels", ())]
        for panel in [*panels, *rows]:
            for target in panel.get("targets", ()):
                yield f"{path.name}: {panel['title']}", target["expr"]


def test_metrics_and_labels_are_exported(repository: Path, exported: dict[str, set[str]]) -> None:
    seen = set()
    for where, expression in expressions(repository):
        for name, matchers in _NAME.findall(expression):
            assert name in exported, f"{where}: {name}"
            for label in _LABEL.findall(matchers):
                assert label in exported[name] | ADDED, f"{where}: {name} has no label {label}"
            seen.add(name)
    assert len(seen) > 20


def test_values_of_labels_are_those_of_the_server(repository: Path) -> None:
    source = "".join(path.read_text() for path in (repository / "src" / "burnish" / "serve").glob("*.py"))
    rules = (repository / "ops" / "prometheus" / "alerts.yml").read_text()
    for value in re.findall(r"burnish_\w+\{\w+=\"(\w+)\"\}", rules):
        assert f'"{value}"' in source, value


def test_documents_name_metrics_and_alerts_that_exist(repository: Path, exported: dict[str, set[str]]) -> None:
    bare = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in exported}
    text = "".join((repository / "docs" / name).read_text() for name in ("operations.md", "scaling.md"))
    tables = {"burnish_jobs", "burnish_items", "burnish_results", "burnish_workers"}
    for name in set(re.findall(r"\b(?:burnish|rabbitmq)_\w+", text)) - tables - {"rabbitmq_prometheus"}:
        assert name in exported or name in bare, name
    rules = yaml.safe_load((repository / "ops" / "prometheus" / "alerts.yml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    for alert in alerts:
        assert f"`{alert}`" in text, f"{alert} is not explained"


def test_rules_and_their_test_agree(repository: Path) -> None:
    folder = repository / "ops" / "prometheus"
    rules = yaml.safe_load((folder / "alerts.yml").read_text())
    known = {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"]}
    for rule in known.values():
        assert rule["labels"]["severity"] in ("page", "warn")
        assert rule["annotations"]["summary"]
    tests = yaml.safe_load((folder / "alerts.test.yml").read_text())
    for case in tests["tests"][0]["alert_rule_test"]:
        assert case["alertname"] in known
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    for rule in known.values():
        for job in re.findall(r'job="(\w+)"', rule["expr"]):
            assert job in jobs


def test_dashboards_are_provisioned(repository: Path) -> None:
    compose = yaml.safe_load((repository / "compose.yaml").read_text())["services"]["grafana"]
    mounted = dict(volume.split(":")[:2] for volume in compose["volumes"])
    provider = yaml.safe_load((repository / "ops/grafana/provisioning/dashboards/burnish.yaml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    for path in (repository / "ops" / "grafana").glob("*.json"):
        assert mounted[f"./ops/grafana/{path.name}"] == f"{folder}/{path.name}"
    assert compose["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(folder)
    source = yaml.safe_load((repository / "ops/grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


def test_promtool_finds_rules_right_and_their_test_passes(repository: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    folder = repository / "ops" / "prometheus"
    for words in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]):
        done = subprocess.run([promtool, *words], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCESS" in done.stdout
