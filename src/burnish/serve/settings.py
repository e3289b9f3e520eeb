"""How a server behaves, as one checked value."""

from __future__ import annotations

from dataclasses import dataclass

from burnish.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Bounds and times of one server.

    Attributes:
        max_running: answers that the engine computes at once.
        max_queue: answers that may wait beyond those.
        max_body_bytes: of one request's body.
        stream_interval_s: a stream gets what is new at most this often (its first token and its end at once).
        upload_timeout_s: longest that a request's body may take to arrive.
        idle_timeout_s: longest that a connection may stay open without a request.
        slow_reader_timeout_s: a reader that takes nothing of what waits for it for so long is cut off.
        template_timeout_s: longest that the chat template may run.
        grace_s: time that running requests get to end after the first signal.
        engine_timeout_s: an engine that has work and gives no sign for so long is killed and started anew.
        max_restarts: engine failures within ten minutes after which the server gives up.

    Raises:
        SettingError: one is out of its range.
    """

    max_running: int = 32
    max_queue: int = 128
    max_body_bytes: int = 4 * 2**20
    stream_interval_s: float = 0.02
    upload_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    slow_reader_timeout_s: float = 20.0
    template_timeout_s: float = 2.0
    grace_s: float = 30.0
    engine_timeout_s: float = 300.0
    max_restarts: int = 5

    def __post_init__(self) -> None:
        for name, least in (("max_running", 1), ("max_queue", 0), ("max_body_bytes", 1024), ("max_restarts", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                unit = " bytes" if name.endswith("_bytes") else ""
                expected = f"an integer of {least}{unit} or more"
                raise SettingError(f"{{{name}}} is out of range", got=f"{value}{unit}", expected=expected)
        for name in ("stream_interval_s", "grace_s"):
            self._check_seconds(name, least=0)
        for name in (
            "upload_timeout_s",
            "idle_timeout_s",
            "slow_reader_timeout_s",
            "template_timeout_s",
            "engine_timeout_s",
        ):
            self._check_seconds(name, least=0.05)

    def _check_seconds(self, name: str, *, least: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e6:
            expected = f"{least:g} s or more, below 1e6"
            raise SettingError(f"{{{name}}} is out of range", got=f"{value} s", expected=expected)
