"""Exit code 0 while a worker of this host was heard of within a minute; for a container's health check.

It reads the database that the worker writes to (BURNISH_QUEUE_STORE), so it also fails while that is away.
"""

from __future__ import annotations

import os
import socket
import sys

from burnish.errors import BurnishError
from burnish.scale.opening import QueueAddress, open_store
from burnish.scale.worker_book import read_notes

SILENT_S = 60.0


def main() -> int:
    url = os.environ.get("BURNISH_QUEUE_STORE")
    if not url:
        print("error: BURNISH_QUEUE_STORE is not set. Give it the worker's --store.", file=sys.stderr)
        return 1
    try:
        with open_store(QueueAddress(store=url), patience_s=5.0, makes=False) as store:
            notes = [note for note in read_notes(store.database) if note.host == socket.gethostname()]
    except BurnishError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    alive = [note for note in notes if note.state in ("working", "draining") and note.silent_s < SILENT_S]
    told = [f"{note.name} {note.state}, {note.finished} finished" for note in alive]
    print(", ".join(told) or "no worker was heard of")
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
