"""The job queue in tables for people. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from burnish.cli.output import counted, print_table
from burnish.scale.reading import read_results
from burnish.scale.store import JobStore
from burnish.scale.tables import DEAD, ERROR, STATES
from burnish.scale.worker_book import held_by, read_notes

_SILENT_S = 30.0


def status_record(store: JobStore, job_id: str | None, *, depths: dict[str, int], queue: str) -> dict[str, Any]:
    """What `queue status --json` prints: jobs, workers, and the broker's messages in this queue.

    Of one job, only the workers of its queue.
    """
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
        "workers": _workers(store, jobs[0].queue if job_id else None),
        "broker": {"queue": queue, "messages": depths} if depths else None,
    }


def _workers(store: JobStore, queue: str | None) -> list[dict[str, Any]]:
    """Those that have not ended. One that is silent says nothing: "running" is what the database still has of it."""
    notes = [note for note in read_notes(store.database, queue=queue) if note.state not in ("stopped", "failed")]
    silent = [note for note in notes if note.silent_s > _SILENT_S]
    held = held_by(store.database, silent)
    for note in silent:
        notes[notes.index(note)] = replace(note, state="silent", running=held.get(note.name, 0))
    return [asdict(note) for note in notes]


def show_status(console: Console, record: dict[str, Any]) -> None:
    """Tables whose names are never cut."""
    jobs = Table("job", "queue", "items", *STATES, "submitted", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for job in record["jobs"]:
        numbers = [str(job[state] or "-") for state in STATES]
        items = str(job["num_items"]) + ("" if job["complete"] else " (partly submitted)")
        jobs.add_row(job["job_id"], job["queue"], items, *numbers, _when(job["submitted_s"]))
    print_table(console, jobs, whole=True) if record["jobs"] else console.print("no jobs")
    if record["workers"]:
        workers = Table("worker", "queue", "model", "state", "running", "finished", box=None, pad_edge=False)
        for note in record["workers"]:
            state = f"silent for {note['silent_s']:.0f} s" if note["state"] == "silent" else note["state"]
            workers.add_row(
                note["name"], note["queue"], note["model"], state, str(note["running"]), str(note["finished"])
            )
        console.print()
        print_table(console, workers, whole=True)
    if record["broker"]:
        told = ", ".join(f"{number} {name}" for name, number in record["broker"]["messages"].items())
        console.print(f"\nmessages that wait in {record['broker']['queue']}: {told}")


def _when(submitted_s: float) -> str:
    """Day and minute, in few columns; of another year the day."""
    then = time.localtime(submitted_s)
    return time.strftime("%m-%d %H:%M" if then.tm_year == time.localtime().tm_year else "%Y-%m-%d", then)


def elsewhere(store: JobStore, queue: str) -> str | None:
    """Of a queue without anything to do: which others have items."""
    if store.depth(queue).unfinished or not (found := store.unfinished()):
        return None
    others = ", ".join(f"{name} ({counted(number, 'item')})" for name, number in found.items())
    return f"queue {queue} has nothing to do; these have: {others}"


def failures(store: JobStore, job_id: str | None) -> Iterator[dict[str, Any]]:
    """Items without an answer, of one job or of all."""
    names = [store.job(job_id).job_id] if job_id else [job.job_id for job in store.jobs()]
    for name in names:
        for row in read_results(store.database, name, states=(ERROR, DEAD)):
            yield {"job_id": name, **{key: row[key] for key in ("item", "id", "error", "attempts")}}


def show_failures(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "item", "id", "attempts", "error"):
        table.add_column(heading, no_wrap=heading in ("job", "item", "attempts"), overflow="fold")
    for row in rows:
        table.add_row(row["job_id"], str(row["item"]), row["id"] or "-", str(row["attempts"]), row["error"])
    print_table(console, table) if table.row_count else console.print("nothing failed")
