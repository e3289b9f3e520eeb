"""What of the Ray part needs no Ray: the scaling rule, resources, addresses, and options that do not fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.cli.main import run
from burnish.errors import ConfigError
from burnish.scale.ray_resources import parse_resources
from burnish.scale.ray_scaling import Scaler, ScalingRule

RULE = ScalingRule(least=1, most=4, items_per_worker=10, shrink_after_s=30)


@pytest.mark.parametrize(("unfinished", "workers"), [(0, 1), (1, 1), (10, 1), (11, 2), (30, 3), (31, 4), (1000, 4)])
def test_wanted_is_what_holds_all_items_within_the_limits(unfinished: int, workers: int) -> None:
    assert RULE.wanted(unfinished) == workers


def test_grows_at_once_and_shrinks_to_the_most_wanted_after_a_while() -> None:
    scaler = Scaler(RULE, now=1)
    assert scaler.look(100, 0) == 4
    assert scaler.look(5, 1) == 4
    assert scaler.look(15, 20) == 4
    assert scaler.look(5, 30.9) == 4
    assert scaler.look(5, 31) == 2  # two were wanted meanwhile
    assert [scaler.look(0, second) for second in (32, 61, 62)] == [2, 2, 1]


def test_need_that_comes_back_begins_the_wait_anew() -> None:
    scaler = Scaler(RULE, now=3)
    scaler.look(5, 0)
    assert scaler.look(25, 29) == 3
    assert scaler.look(5, 31) == 3
    assert scaler.look(5, 60) == 3
    assert scaler.look(5, 61) == 1


def test_no_workers_for_an_empty_queue_where_the_least_is_none() -> None:
    scaler = Scaler(ScalingRule(least=0, most=2, items_per_worker=10, shrink_after_s=0), now=1)
    assert [scaler.look(unfinished, second) for second, unfinished in enumerate((3, 0, 1))] == [1, 0, 1]


def test_resources_follow_the_device_and_the_threads() -> None:
    plain = parse_resources(None, device="cpu", threads=3)
    assert (plain.demand(), plain.threads) == ({"CPU": 3.0}, 3)
    card = parse_resources("cpus=0.5,memory=2GiB,fast_disk=1", device="cuda", threads=None)
    assert card.actor_options() == {
        "num_cpus": 0.5,
        "num_gpus": 1,
        "memory": 2 << 30,
        "resources": {"fast_disk": 1.0},
    }
    assert card.threads == 1


@pytest.mark.parametrize(
    ("text", "device", "says"),
    [
        ("cpus", "cpu", "malformed"),
        ("cpus=two", "cpu", "cpus is not usable"),
        ("cpus=1.5", "cpu", "cpus is not usable"),
        ("cpus=1,cpus=2", "cpu", "names cpus twice"),
        ("CPU=1", "cpu", "has no CPU"),
        ("gpus=1", "cpu", "one engine on one device"),
        ("gpus=2", "cuda", "one engine on one device"),
        ("memory=much", "cpu", "memory is not a size"),
        (None, "cuda:1", "Ray chooses the card"),
    ],
)
def test_resources_that_do_not_fit_are_one_line(text: str | None, device: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_resources(text, device=device, threads=None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--min-workers", "2"], "--min-workers goes with --ray"),
        (["--resources", "cpus=1"], "--resources goes with --ray"),
        (["--ray", "somewhere"], "--ray is malformed"),
        (["--ray", "host:0"], "--ray is malformed"),
        (["--ray", "local", "--workers", "3", "--max-workers", "2"], "--workers is above --max-workers"),
        (["--ray", "local", "--min-workers", "3", "--max-workers", "2"], "do not fit"),
        (["--ray", "local", "--shrink-after", "5"], "--shrink-after goes with"),
        (["--ray", "local", "--lease", "1"], "lease is out of range"),
    ],
)
def test_options_of_work_that_do_not_fit_end_with_2(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["queue", "work", "burnish-sql-base", "--store", str(tmp_path / "q.db"), *words])
    said = capsys.readouterr().err
    assert code == 2
    assert says in said
    assert said.count("\n") == 1


@pytest.fixture
def cluster_elsewhere() -> Callable[..., object]:
    from burnish.scale.ray_session import RaySession

    class Nodes:
        @staticmethod
        def nodes() -> list[dict[str, object]]:
            import socket

            here = {"Alive": True, "NodeManagerHostname": socket.gethostname(), "Resources": {"CPU": 2.0}}
            return [
                here,
                {**here, "NodeManagerHostname": "far-away", "Resources": {"CPU": 8.0, "GPU": 1.0}},
                {**here, "Alive": False, "NodeManagerHostname": "gone", "Resources": {"CPU": 64.0}},
            ]

    return RaySession(ray=Nodes, started=False, folder=None, address="far-away:6379")


@pytest.mark.parametrize(
    ("store", "broker", "says"),
    [
        ("sqlite:///queue.db", None, "the queue's file {folder}/queue.db"),
        ("mysql://root@localhost/burnish", None, "the queue's database at localhost"),
        ("postgresql://root@db/burnish", "amqp://127.0.0.1:5672/", "the broker at 127.0.0.1"),
        ("postgresql://root@db/burnish", "amqp://mq:5672/", None),
    ],
)
def test_queue_on_this_machine_alone_is_refused_where_the_cluster_has_others(
    store: str,
    broker: str | None,
    says: str | None,
    cluster_elsewhere: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pymysql")
    pytest.importorskip("psycopg")
    from burnish.cli.queue_on_ray import _as_seen_from_nodes
    from burnish.scale.opening import QueueAddress
    from burnish.scale.ray_session import explain_local_only

    monkeypatch.chdir(tmp_path)
    _, what = _as_seen_from_nodes(QueueAddress(store=store, broker=broker))
    assert what == (None if says is None else says.format(folder=os.path.realpath(tmp_path)))
    if what is not None:
        error = explain_local_only(what, cluster_elsewhere)  # type: ignore[arg-type]
        assert error is not None
        assert "has others: far-away" in error.message


def test_a_node_has_room_only_if_it_alone_has_all_of_it(cluster_elsewhere: object) -> None:
    for text, device, fits in (("cpus=8", "cpu", True), ("cpus=9", "cpu", False), ("cpus=8", "cuda", True)):
        resources = parse_resources(text, device=device, threads=None)
        assert cluster_elsewhere.has_node_for(resources) is fits  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_address_that_nobody_listens_at_is_told_at_once(scheme: str) -> None:
    import socket

    from burnish.errors import WorkerError
    from burnish.scale.ray_session import _join

    with socket.socket() as probe:  # bound and not listening: nobody else gets the port, and nobody answers
        probe.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(WorkerError, match=r"cannot be joined; got .*refused\. Is it running"):
            _join(None, address)
