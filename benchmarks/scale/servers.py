"""RabbitMQ, MariaDB, PostgreSQL and an S3 endpoint as private servers: free ports, temporary folders, gone afterwards.

Each may be killed and started again over the same files. The programs come from the system's packages (Debian:
rabbitmq-server, mariadb-server, postgresql); the S3 endpoint is moto's.
"""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

START_S = 300.0


class MissingServer(Exception):
    """The program is not installed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def program(*names: str) -> str:
    """Path of the first of these that is there; `*` may stand for a version."""
    for name in names:
        found = sorted(glob.glob(name))[-1:] if "/" in name else [path] if (path := shutil.which(name)) else []
        if found:
            return found[0]
    raise MissingServer(f"{names[0]} is not installed")


class Server:
    """One server process and its folder."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.folder = Path(tempfile.mkdtemp(prefix=f"burnish-{kind}-"))
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self.prepare()
            self.start()
        except BaseException:
            self.close()
            raise

    def prepare(self) -> None:
        """Make its files, once."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def user(self) -> str | None:
        """Who to run as; None is us."""
        return None

    def is_ready(self) -> bool:
        """Whether it answers."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def start(self, *, wait: bool = True) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                env=os.environ | self.environment(),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self.user(),
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        ends = time.monotonic() + START_S
        while not self.is_ready():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{self.kind} did not start: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, the whole group: nothing is written back that was not written."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class RabbitMQ(Server):
    """A node with its own name server (epmd), so that nothing of it outlives it."""

    def __init__(self) -> None:
        self.epmd_port, self.dist_port = free_port(), free_port()
        super().__init__("rabbitmq")

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def prepare(self) -> None:
        program("erl")
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nlog.console.level = warning\ndisk_free_limit.absolute = 50MB\n"
        )
        (self.folder / "plugins").write_text("[].\n")

    def command(self) -> list[str]:
        return [program("/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server", "rabbitmq-server")]

    def environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {
            "HOME": folder,
            "RABBITMQ_NODENAME": f"burnish{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": f"{folder}/mnesia",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{folder}/generated",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }

    def is_ready(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.settimeout(2)
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"
        return False

    def kill(self) -> None:
        super().kill()
        if self.process is not None:
            # The name server is in a session of its own; it ends once it has noticed that its node is gone.
            for _ in range(50):
                command = [program("epmd"), "-kill"]
                done = subprocess.run(command, env=os.environ | self.environment(), capture_output=True, check=False)
                if b"Killed" in done.stdout or b"Cannot connect" in done.stdout + done.stderr:
                    return
                time.sleep(0.1)


class MariaDB(Server):
    """A server with one database, `burnish`, and root without a password."""

    def __init__(self) -> None:
        super().__init__("mariadb")

    @property
    def url(self) -> str:
        return f"mysql://root@127.0.0.1:{self.port}/burnish"

    def prepare(self) -> None:
        install = program("mariadb-install-db", "mysql_install_db")
        owner = ["--user=root"] if os.geteuid() == 0 else []
        options = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        made = subprocess.run(
            [install, "--no-defaults", f"--datadir={self.folder / 'data'}", *options, *owner],
            capture_output=True,
            check=False,
        )
        if made.returncode:
            raise RuntimeError(f"MariaDB's files could not be made: {made.stderr.decode(errors='replace')[-2000:]}")

    def command(self) -> list[str]:
        return [
            program("mariadbd", "/usr/sbin/mariadbd", "mysqld"),
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--innodb-buffer-pool-size=64M",
            *(["--user=root"] if os.geteuid() == 0 else []),
        ]

    def is_ready(self) -> bool:
        import pymysql

        try:
            with pymysql.connect(host="127.0.0.1", port=self.port, user="root", connect_timeout=2) as connection:
                connection.cursor().execute("CREATE DATABASE IF NOT EXISTS burnish")
        except (pymysql.Error, OSError):
            return False
        return True


class PostgreSQL(Server):
    """A server with one database, `burnish`, that trusts everybody on this machine."""

    def __init__(self) -> None:
        super().__init__("postgresql")

    @property
    def url(self) -> str:
        return f"postgresql://burnish@127.0.0.1:{self.port}/postgres"

    def user(self) -> str | None:
        if os.geteuid() != 0:
            return None  # it refuses to run as root, and as nobody else
        try:
            return pwd.getpwnam("postgres").pw_name
        except KeyError as error:
            raise MissingServer("there is no user postgres") from error

    def prepare(self) -> None:
        user = self.user()
        if user is not None:
            shutil.chown(self.folder, user)
        command = [program("/usr/lib/postgresql/*/bin/initdb", "initdb"), "-D", str(self.folder / "data")]
        options = ["--auth=trust", "--username=burnish", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run([*command, *options], capture_output=True, user=user, cwd=self.folder, check=False)
        if made.returncode:
            raise RuntimeError(f"PostgreSQL's files could not be made: {made.stderr.decode(errors='replace')[-2000:]}")

    def command(self) -> list[str]:
        where = ["-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder), "-h", "127.0.0.1"]
        return [program("/usr/lib/postgresql/*/bin/postgres", "postgres"), *where]

    def is_ready(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.Error:
            return False
        return True


class S3(Server):
    """moto's server; the environment it needs is in `credentials`."""

    def __init__(self) -> None:
        super().__init__("s3")

    @property
    def credentials(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def prepare(self) -> None:
        try:
            import moto.server  # noqa: F401
        except ImportError as error:
            raise MissingServer("moto is not installed") from error

    def command(self) -> list[str]:
        return [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]


def versions(*packages: str) -> str:
    """Versions of Debian packages, for records."""
    command = ["dpkg-query", "-W", "-f", "${Package} ${Version}, ", *packages]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "versions unknown"
    return done.stdout.rstrip(", ") or "versions unknown"


KINDS: dict[str, Any] = {"rabbitmq": RabbitMQ, "mariadb": MariaDB, "postgresql": PostgreSQL, "s3": S3}
