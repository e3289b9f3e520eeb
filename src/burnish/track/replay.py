"""Sending what was missed, later: compares a spool with what is there, and sends the rest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from burnish.errors import BurnishError, ConfigError
from burnish.track.delivery import Delivery
from burnish.track.destination import Destination, parse_destination
from burnish.track.mlflow_api import in_words
from burnish.track.spool import find_spools, first_event, hold

_PATIENCE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What became of a spool.

    Attributes:
        sent: facts that the destination did not have.
        there: facts that it had.
        refused: what it does not take, and why.
        missing: files that are gone from here.
    """

    spool: str
    destination: str
    sent: int
    there: int
    refused: list[str]
    missing: list[str]
    url: str | None = None


def replay(path: Path, uri: str | None = None) -> list[Replayed]:
    """Send every spool that a path stands for.

    Args:
        path: a spool, what a run wrote (its spool is beside it), or a folder with several of them.
        uri: instead of where each run was tracked to.

    Raises:
        ConfigError: there is no spool, or its destination is not known.
        BurnishError: the destination cannot be reached, or a run of the spool is still going on.
    """
    spools = find_spools(Path(path))
    if not spools:
        expected = "a run that was tracked to MLflow, or its .track folder"
        raise ConfigError(f"there is nothing to replay at {path}", expected=expected)
    return [_replay(spool, _destination(spool, uri)) for spool in spools]


def _destination(spool: Path, uri: str | None) -> Destination:
    first = first_event(spool)
    if not first.get("key"):
        raise ConfigError(f"{spool} is no spool", expected="one that begins with its key")
    stored = str(first.get("destination", ""))
    if uri is None:
        if first.get("password"):
            place = stored.partition("?")[0]
            raise ConfigError(f"{place} needs its password, which is stored nowhere", remedy="Give it with --track.")
        return parse_destination(stored)
    return parse_destination(uri, experiment=parse_destination(stored).experiment)


def _replay(spool: Path, destination: Destination) -> Replayed:
    lock = hold(spool / "sender.lock")
    until_s = time.monotonic() + _PATIENCE_S
    while lock is None and time.monotonic() < until_s:
        time.sleep(0.1)
        lock = hold(spool / "sender.lock")
    if lock is None:
        raise BurnishError(f"{spool} is being sent already", remedy="Wait until its run is over.")
    with lock:
        delivery = Delivery(spool, destination, compare=True)
        try:
            while delivery.advance():
                pass
            delivery.end_abandoned()
        except Exception as error:
            if isinstance(error, BurnishError):
                raise
            raise BurnishError(
                f"{destination.shown} does not take {spool}",
                got=in_words(error),
                remedy="Replay it again when it does.",
            ) from error
    run_id, experiment_id = delivery.state.runs.get("run"), delivery.state.experiment_id
    return Replayed(
        spool=str(spool),
        destination=destination.shown,
        sent=delivery.num_sent,
        there=delivery.num_there,
        refused=list(delivery.state.refused),
        missing=list(delivery.missing),
        url=destination.url_of(experiment_id, run_id) if run_id and experiment_id else None,
    )
