"""The job queue in tables for people. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from burnish.scale.reading import read_results
from burnish.scale.store import JobStore
from burnish.scale.tables import DEAD, ERROR, STATES
from burnish.scale.worker_book import read_notes

_SILENT_S = 30.0


def status_record(store: JobStore, job_id: str | None, *, depths: dict[str, int], queue: str) -> dict[str, Any]:
    """What `queue status --json` prints: jobs, workers, and the broker's messages in this queue."""
    jobs = [store.job(job_id)] if job_id else store.jobs()
    counts = store.counts([job.job_id for job in jobs])
    return {
        "store": str(store.database),
        "jobs": [
            {
                "job_id": job.job_id,
                "queue": job.queue,
                "source": job.source,
                "num_items": job.num_items,
                "complete": job.complete,
                "submitted_s": job.submitted_s,
                **counts[job.job_id].states,
            }
            for job in jobs
        ],
        "workers": [asdict(note) for note in read_notes(store.database) if note.state not in ("stopped", "failed")],
        "broker": {"queue": queue, "messages": depths} if depths else None,
    }


def show_status(console: Console, record: dict[str, Any]) -> None:
    jobs = Table("job", "queue", "items", *STATES, "submitted", box=None, pad_edge=False)
    for job in record["jobs"]:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["submitted_s"]))
        numbers = [str(job[state] or "-") for state in STATES]
        items = str(job["num_items"]) + ("" if job["complete"] else " (partly submitted)")
        jobs.add_row(job["job_id"], job["queue"], items, *numbers, when)
    console.print(jobs if record["jobs"] else "no jobs")
    if record["workers"]:
        workers = Table("worker", "queue", "model", "state", "running", "finished", box=None, pad_edge=False)
        for note in record["workers"]:
            silent = note["silent_s"] > _SILENT_S
            state = f"silent for {note['silent_s']:.0f} s" if silent else note["state"]
            workers.add_row(
                note["name"], note["queue"], note["model"], state, str(note["running"]), str(note["finished"])
            )
        console.print()
        console.print(workers)
    if record["broker"]:
        told = ", ".join(f"{number} {name}" for name, number in record["broker"]["messages"].items())
        console.print(f"\nmessages that wait in {record['broker']['queue']}: {told}")


def failures(store: JobStore, job_id: str | None) -> Iterator[dict[str, Any]]:
    """Items without an answer, of one job or of all."""
    names = [store.job(job_id).job_id] if job_id else [job.job_id for job in store.jobs()]
    for name in names:
        for row in read_results(store.database, name, states=(ERROR, DEAD)):
            yield {"job_id": name, **{key: row[key] for key in ("item", "id", "error", "attempts")}}


def show_failures(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    table = Table("job", "item", "id", "attempts", "error", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["job_id"], str(row["item"]), row["id"] or "-", str(row["attempts"]), row["error"])
    console.print(table if table.row_count else "nothing failed")
