"""Keys are read strictly, compared wholly, and asked for everywhere but at health and ready."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving_process import BASE, ServingProcess

from burnish.errors import ConfigError
from burnish.serve.keys import KeyRing, load_keys

KEY = "sk-first-key-of-all"


def test_a_ring_opens_for_its_keys_alone() -> None:
    ring = KeyRing([KEY, "another-key"])
    assert ring.opens(f"Bearer {KEY}".encode())
    assert ring.opens(b"bearer another-key")
    for wrong in (None, b"", b"Bearer", b"Bearer ", b"Bearer sk-first", f"Basic {KEY}".encode(), KEY.encode(), b"\xff"):
        assert not ring.opens(wrong)


def test_keys_come_from_a_file_before_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{KEY}\n  second-key-here \n", encoding="utf-8")
    ring = load_keys(file, {"BURNISH_API_KEYS": "from-environment"})
    assert ring is not None
    assert ring.opens(b"Bearer second-key-here")
    assert not ring.opens(b"Bearer from-environment")
    other = load_keys(None, {"BURNISH_API_KEYS": "from-environment, and-one-more"})
    assert other is not None
    assert other.opens(b"Bearer and-one-more")
    assert load_keys(None, {}) is None


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", "has a blank in it\n", "schlüssel-mit-umlaut\n"])
def test_unusable_keys_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_keys(file, {})
    with pytest.raises(ConfigError, match="nowhere"):
        load_keys(tmp_path / "nowhere", {})


def test_every_route_but_health_and_ready_wants_a_key() -> None:
    with ServingProcess(environment={"BURNISH_API_KEYS": KEY}) as server:
        assert server.record["api_keys"] is True
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere", "/health/"):
            reply = server.get(path)
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.json()["error"]["code"] == "invalid_api_key"
        body = {"model": BASE, "prompt": "a", "max_tokens": 2}
        assert server.post("/v1/completions", body).status_code == 401
        assert server.post("/v1/completions", body, headers={"Authorization": f"Bearer {KEY}x"}).status_code == 401
        right = {"Authorization": f"Bearer {KEY}"}
        assert server.post("/v1/completions", body, headers=right).status_code == 200
        assert 'burnish_rejections_total{reason="unauthorized"} 7.0' in server.get("/metrics", headers=right).text
