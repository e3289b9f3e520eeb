"""The sender's process: `python -m burnish.track.sender SPOOL`. It ends when everything is sent, or with its run.

Its stdin gives the destination in one line, then "finish" when the run is over; it closes when the run's process ends,
however that happens.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from burnish.track.delivery import Delivery
from burnish.track.destination import parse_destination
from burnish.track.spool import hold

EVERY_S = 5.0
"""What is new is sent at most this often; MLflow's page looks every ten seconds."""
_LONGEST_PAUSE_S = 30.0
_LAST_ATTEMPTS = 2


class _Orders:
    """What the run's process says."""

    def __init__(self) -> None:
        self.finish = self.gone = False
        self.changed = threading.Event()

    def listen(self) -> None:
        for line in sys.stdin:
            if line.strip() == "finish":
                self.finish = True
                self.changed.set()
        self.gone = True
        self.changed.set()


def main() -> int:
    spool = Path(sys.argv[1])
    with suppress(OSError):
        os.nice(19)  # the run has the machine; at its end it may give some of it back
    told = json.loads(sys.stdin.readline())
    destination = replace(parse_destination(told["destination"]), uri=told["uri"])
    orders = _Orders()
    threading.Thread(target=orders.listen, daemon=True).start()
    lock = hold(spool / "sender.lock")
    if lock is None:
        return 1
    delivery = Delivery(spool, destination, compare=False)
    failed_since_end = 0
    while True:
        orders.changed.clear()
        ending = orders.finish or orders.gone
        pause_s = EVERY_S
        try:
            while delivery.advance():
                pass
            if orders.finish and delivery.is_whole:
                return 0
            if orders.gone and not orders.finish:
                delivery.end_abandoned()
                return 0
        except Exception as error:
            print(time.strftime("%H:%M:%S"), " ".join(str(error).split())[:500], file=sys.stderr, flush=True)
            failed_since_end += ending
            if orders.gone or failed_since_end >= _LAST_ATTEMPTS:
                return 1
            pause_s = min(_LONGEST_PAUSE_S, 2.0 ** min(delivery.state.failures - 1, 6))
        if not (orders.finish and not ending):
            orders.changed.wait(min(pause_s, 1.0) if ending else pause_s)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a thread reads stdin, which nothing can interrupt
