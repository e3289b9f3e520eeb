"""MLflow's own server as a private process, and a door before it that can be shut, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scale"))

from servers import MissingServer, Server


class MlflowServer(Server):
    """`mlflow server` over a SQLite file, with artifacts in its folder; it serves files too."""

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        super().__init__("mlflow")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        try:
            import mlflow  # noqa: F401
        except ImportError as error:
            raise MissingServer("mlflow is not installed") from error

    def command(self) -> list[str]:
        backend = f"sqlite:///{self.folder / 'mlflow.db'}"
        command = [sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1", "--backend-store-uri", backend]
        return [*command, "--artifacts-destination", str(self.folder / "artifacts")]

    def environment(self) -> dict[str, str]:
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return {**quiet, "PYTHONWARNINGS": "ignore", **self._environment}

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
            return reply.status == 200
        return False


class Door:
    """A port before another one: open, shut (connections are refused) or stuck (they are taken, and nothing answers).

    Connections that are open when it is shut are cut.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._state = "open"
        self._pairs: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = self._listen(0)
        self.port = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Let everything through."""
        if self._state == "shut":
            self._listener = self._listen(self.port)
        self._state = "open"

    def shut(self) -> None:
        """Refuse connections, as a server does that is not there."""
        if self._state != "shut":
            self._state = "shut"
            self._close_listener()
        self._cut()

    def stick(self) -> None:
        """Take connections and never answer."""
        if self._state == "shut":
            self._listener = self._listen(self.port)
        self._state = "stuck"
        self._cut()

    def close(self) -> None:
        """No threads or connections are left."""
        self.shut()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _close_listener(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._pairs.add(client)
            if self._state == "open":
                threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        with self._lock:
            self._pairs.add(server)
        back = threading.Thread(target=self._copy, args=(server, client), daemon=True)
        back.start()
        self._copy(client, server)
        back.join()
        for each in (client, server):
            with self._lock:
                self._pairs.discard(each)
            each.close()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for each in pairs:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


if __name__ == "__main__":
    server = MlflowServer()
    print(server.url, server.folder, os.getpid(), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    server.close()
