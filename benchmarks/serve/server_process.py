"""`burnish serve` as a process of its own, and what it holds: descriptors, threads, children, memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from urllib.parse import urlsplit

import psutil


class ServerProcess:
    """A server on a free port, ready when the constructor returns."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "burnish", "serve", model, "--port", "0", "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("}"):
                break
        if not lines:
            raise SystemExit("the server did not start")
        self.record = json.loads("".join(lines))
        self.port = urlsplit(self.record["url"]).port or 0

    def held(self) -> dict[str, int]:
        """Counts over the server and its children."""
        root = psutil.Process(self.process.pid)
        every = [root, *root.children(recursive=True)]
        counts = {"children": len(every) - 1, "descriptors": 0, "threads": 0, "rss_bytes": 0}
        for process in every:
            with suppress(psutil.Error):
                counts["descriptors"] += process.num_fds()
                counts["threads"] += process.num_threads()
                counts["rss_bytes"] += process.memory_info().rss
        return counts

    def cpu_s(self) -> dict[str, float]:
        """Processor time so far: of the process that answers HTTP, and of its children."""
        root = psutil.Process(self.process.pid)
        own = sum(root.cpu_times()[:2])
        return {"http": own, "engine": sum(sum(child.cpu_times()[:2]) for child in root.children(recursive=True))}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
