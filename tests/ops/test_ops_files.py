"""Compose file, images, units and their settings: pinned, closed, without secrets, and of commands that exist."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from ops_commands import command_lines, documents, unknown_words

from burnish.scale.database import Database
from burnish.scale.supervising import _FINAL_CODES
from burnish.scale.worker_book import write_note
from burnish.serve.keys import load_keys

ONE_SHOT = {"buckets"}
BURNISH = ("api", "worker")
_SECRET = re.compile(r"PASS|SECRET|TOKEN|ACCESS_KEY|_URI|_STORE$|_BROKER$")


@pytest.fixture(scope="module")
def compose(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    return compose["services"]


def unit(path: Path) -> dict[str, list[str]]:
    """Every key's values; a unit file may have a key several times."""

    class Many(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            if isinstance(value, list) and key in self:
                self[key].extend(value)
            else:
                super().__setitem__(key, value)

    parser = RawConfigParser(dict_type=Many, strict=False, comment_prefixes=("#",), delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(path.read_text())
    return {key: str(value).split("\n") for section in parser.sections() for key, value in parser.items(section)}


def seconds(text: str) -> int:
    number, sign = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[sign]


def test_images_are_pinned_and_services_are_closed(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", service["image"]), name
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"]), name
        assert not {"privileged", "network_mode", "pid", "ipc"} & set(service), name
        assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory"}, name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
        if service.get("user") is not None:
            assert not str(service["user"]).startswith("0"), name
        if name not in ONE_SHOT:
            assert service["restart"] == "unless-stopped", name
            assert "stop_grace_period" in service, name
            assert "healthcheck" in service or name == "api", name


def test_what_a_service_waits_for_is_there_and_can_say_so(services: dict[str, Any], compose: dict[str, Any]) -> None:
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert how["condition"] == expected, f"{name}: {other}"
            assert other in ONE_SHOT or "healthcheck" in services[other], f"{name}: {other}"
        for secret in service.get("secrets", ()):
            assert secret in compose["secrets"], name
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{.*?\}", "./x", volume).split(":")[0]
            assert source.startswith("./") or source in compose["volumes"], f"{name}: {volume}"
        for network in service["networks"]:
            assert network in compose["networks"], name
    assert compose["networks"]["inside"] == {"internal": True}
    assert all("outside" in service["networks"] for service in services.values() if "ports" in service)


def test_mounted_and_copied_files_exist_and_reach_the_build(repository: Path, services: dict[str, Any]) -> None:
    for service in services.values():
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (repository / volume.split(":")[0]).exists(), volume
    allowed = [line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for dockerfile in ("Dockerfile", "ops/mlflow/Dockerfile"):
        text = (repository / dockerfile).read_text()
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
            for source in sources.split():
                assert (repository / source).exists(), f"{dockerfile}: {source}"
                assert source in allowed, f"{dockerfile}: {source}"


def test_builds_are_pinned_and_end_as_another_user(repository: Path, services: dict[str, Any]) -> None:
    constraints = (repository / "constraints.txt").read_text()
    found = [*sorted(repository.glob("ops/*/Dockerfile")), repository / "Dockerfile"]
    assert len(found) == 3
    for path in found:
        text = path.read_text()
        arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
        for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
            named = arguments[image[2:-1]] if image.startswith("${") else image
            assert re.search(r":v?\d+\.\d+\.\d+(-[\w-]+)?$", named), f"{path}: {named}"
        users = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
        assert users[-1:] not in ([], ["0"]), path
    version = re.search(r"^mlflow==(\S+)$", constraints, re.MULTILINE)[1]  # type: ignore[index]
    assert services["mlflow"]["image"].endswith(f":{version}")
    assert "HEALTHCHECK" in (repository / "Dockerfile").read_text()


def test_no_file_holds_a_secret(repository: Path, services: dict[str, Any]) -> None:
    for name, service in services.items():
        for key, value in service.get("environment", {}).items():
            if _SECRET.search(key):
                assert "${" in value or value.startswith("/run/secrets/"), f"{name}: {key}"
                assert ":-" not in value, f"{name}: {key} has a default"
    ignored = (repository / ".gitignore").read_text().splitlines()
    assert ".env" in ignored
    assert "ops/secrets/" in ignored
    for line in (repository / ".env.example").read_text().splitlines():
        if re.match(r"(\w*PASSWORD|S3_\w+_KEY)=", line):
            assert line.endswith("="), line


def test_every_variable_is_explained(repository: Path) -> None:
    text = (repository / "compose.yaml").read_text() + (repository / "ops" / "compose.cuda.yaml").read_text()
    used = re.findall(r"\$\{(\w+)(:-[^}]*|:\?[^}]*)?\}", text)
    example = dict(line.split("=", 1) for line in (repository / ".env.example").read_text().splitlines() if "=" in line)
    assert {name for name, _ in used} == set(example)
    for name, default in used:
        assert default, f"{name} has neither a default nor a reason"
        if default.startswith(":-"):
            assert default[2:] == example[name], f"{name}: {default[2:]} here, {example[name]} in .env.example"


def test_secrets_are_made_once_and_fit_the_server(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    for name in (".env.example", "ops/new-secrets.sh"):
        (tmp_path / name).write_bytes((repository / name).read_bytes())
    command = ["sh", str(tmp_path / "ops" / "new-secrets.sh")]
    subprocess.run(command, check=True, capture_output=True)
    made = {path: path.read_text() for path in [tmp_path / ".env", *(tmp_path / "ops" / "secrets").iterdir()]}
    settings = dict(line.split("=", 1) for line in made[tmp_path / ".env"].splitlines() if "=" in line)
    assert all(settings.values())
    secrets = [value for name, value in settings.items() if re.search(r"PASSWORD|S3_", name)]
    assert len(secrets) == len(set(secrets)) == 6
    assert all(re.fullmatch(r"[0-9a-f]{60}", one) for one in secrets)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "ops" / "secrets").stat().st_mode) == 0o700
    ring = load_keys(tmp_path / "ops" / "secrets" / "api_keys")
    assert ring is not None
    assert ring.opens(b"Bearer " + (tmp_path / "ops/secrets/metrics_key").read_bytes())
    subprocess.run(command, check=True, capture_output=True)
    assert made == {path: path.read_text() for path in made}


def test_commands_of_containers_and_units_exist(repository: Path, services: dict[str, Any]) -> None:
    for name in BURNISH:
        assert unknown_words(services[name]["command"]) == [], name
    for path in sorted((repository / "ops" / "systemd").glob("*.service")):
        words = unit(path)["ExecStart"][0].split()
        assert words[0] == "/opt/burnish/bin/burnish"
        assert unknown_words([word for word in words[1:] if word != "$OPTIONS"]) == [], path.name
        example = path.name.removeprefix("burnish-").removesuffix("@.service")
        settings = (path.parent / f"{example}.env.example").read_text()
        values = dict(line.split("=", 1) for line in settings.splitlines() if re.match(r"[A-Z]", line))
        named = set(re.findall(r"\$\{?(\w+)\}?", " ".join(words)))
        assert named <= set(values), path.name
        head = words[1 : words.index("${MODEL}")]
        assert unknown_words([*head, *values["OPTIONS"].split()]) == [], path.name


def test_commands_of_the_documents_exist(repository: Path) -> None:
    count = 0
    for path in documents(repository):
        for words in command_lines(path.read_text()):
            assert unknown_words(words) == [], f"{path.name}: burnish {' '.join(words)}"
            count += 1
    assert count > 80


def test_words_that_do_not_exist_are_found() -> None:
    assert unknown_words(["queue", "submt", "x"]) == ["submt"]
    assert unknown_words(["serve", "m", "--prot=1", "--port", "2"]) == ["--prot=1"]
    assert list(command_lines("a `burnish serve m --port 1`\n\n    burnish queue dead > x\n")) == [
        ["serve", "m", "--port", "1"],
        ["queue", "dead"],
    ]


def test_services_get_time_to_drain(repository: Path, services: dict[str, Any]) -> None:
    words = dict(word.split("=", 1) for word in services["api"]["command"] if "=" in word)
    assert seconds(services["api"]["stop_grace_period"]) >= int(words["--grace"]) + 10
    found = unit(repository / "ops" / "systemd" / "burnish-serve@.service")
    grace = re.search(r"--grace (\d+)", found["ExecStart"][0])[1]  # type: ignore[index]
    assert int(found["TimeoutStopSec"][0]) >= int(grace) + 10
    worker = unit(repository / "ops" / "systemd" / "burnish-worker@.service")
    assert int(worker["TimeoutStopSec"][0]) == seconds(services["worker"]["stop_grace_period"]) == 300


@pytest.mark.parametrize("name", ["serve", "worker"])
def test_units_restart_what_restarting_mends_and_give_one_signal(repository: Path, name: str) -> None:
    found = unit(repository / "ops" / "systemd" / f"burnish-{name}@.service")
    assert found["Restart"] == ["on-failure"]
    assert tuple(int(code) for code in found["RestartPreventExitStatus"][0].split()) == _FINAL_CODES
    # A second SIGTERM ends at once, so the group must not get what the first process hands on.
    assert found["KillMode"] == ["mixed"]
    assert found["KillSignal"] == ["SIGTERM"]
    assert found["OOMPolicy"] == ["continue"]
    for key, value in {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": ""}.items():
        assert found[key] == [value]
    assert "MemoryDenyWriteExecute" not in found
    assert "ProcSubset" not in found
    assert found["User"] != ["root"]


def test_worker_is_alive_while_it_is_heard_of(repository: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    database = Database(url, patience_s=300.0)
    database.open()

    def check() -> tuple[int, str]:
        command = [sys.executable, str(repository / "ops" / "worker_alive.py")]
        done = subprocess.run(
            command, env=os.environ | {"BURNISH_QUEUE_STORE": url}, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    assert check() == (1, "no worker was heard of\n")
    write_note(database, name="w", queue="q", model="m", state="working", running=1, finished=3)
    assert check() == (0, "w working, 3 finished\n")
    write_note(database, name="w", queue="q", model="m", state="stopped", running=0, finished=3)
    database.close()
    assert check()[0] == 1


def test_health_check_without_a_store_is_one_line(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "ops" / "worker_alive.py")]
    others = {name: value for name, value in os.environ.items() if name != "BURNISH_QUEUE_STORE"}
    for given, part in (({}, "BURNISH_QUEUE_STORE is not set"), ({"BURNISH_QUEUE_STORE": "no.db"}, "no queue in")):
        done = subprocess.run(command, env=others | given, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert part in done.stderr
        assert done.stderr.count("\n") == 1
