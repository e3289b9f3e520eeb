"""The doctor's checks."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest

from burnish.plan import doctor


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {f"{check.group}/{check.name}": check for check in checks}


def test_every_group_is_looked_at() -> None:
    checks = doctor.facts()
    assert {check.group for check in checks} == {"python", "hardware", "packages", "extras", "engines", "files"}
    assert len(by_name(checks)) == len(checks)
    json.dumps([check.to_dict() for check in checks])


def test_this_environment_has_a_working_core() -> None:
    found = by_name(doctor.facts())
    for name in ("python/python", "packages/torch", "packages/tokenizers", "engines/native"):
        assert found[name].status == "ok"


def test_missing_extra_names_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_present", lambda module: module != "transformers")
    found = by_name(doctor.facts())
    for name in ("extras/hf", "engines/transformers"):
        assert found[name].status == "missing"
        assert found[name].remedy == "Install it with: pip install 'burnish[hf]'"
    assert found["engines/native"].status == "ok"
    assert all(check.status != "error" for name, check in found.items() if name.startswith(("extras", "engines")))


def test_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "torch":
            raise PackageNotFoundError(package)
        return "9.9.9"

    monkeypatch.setattr(doctor, "version", version)
    checks = doctor.facts()
    assert by_name(checks)["packages/torch"].status == "error"
    assert not doctor.healthy(checks)


@pytest.mark.parametrize(("version", "status"), [("2.5.1", "error"), ("2.6.0+cpu", "ok"), ("2.13.0", "ok")])
def test_torch_must_be_new_enough(version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda package: version)
    assert by_name(doctor.facts())["packages/torch"].status == status


def test_missing_bundled_model_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(doctor, "BUNDLED", {"some-model": tmp_path})
    assert by_name(doctor.facts())["files/some-model"].status == "error"
