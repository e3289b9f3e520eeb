"""A real MLflow server that is away at the start, in the middle or at the end, or answers nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tracked_runs import check_model, check_whole, result_hash, state_of, tuned, until

from burnish.track.mlflow_api import Mlflow
from burnish.track.replay import replay

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def untracked(tiny: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the run gives when nobody tracks it."""
    out = tmp_path_factory.mktemp("untracked") / "out"
    tuned(tiny, rows_file, out, None)
    return result_hash(out)


def test_server_that_is_away_for_a_while_gets_all_of_it_before_the_run_ends(
    door: Any, tiny: Path, rows_file: Path, tmp_path: Path, untracked: str
) -> None:
    uri, out, said = f"{door.url}?experiment=middle&wait=1800", tmp_path / "out", list[str]()

    def at_step(step: int) -> None:
        if step == 3:
            until(lambda: state_of(out, uri).runs)
            door.shut()
        elif step == 7:
            until(lambda: state_of(out, uri).failures)
            door.open()

    tuned(tiny, rows_file, out, uri, at_step=at_step, say=said.append)
    assert result_hash(out) == untracked
    assert [line.partition(":")[0] for line in said] == ["tracked"], said
    check_model(out, uri, "middle-out")


@pytest.mark.parametrize("away", ["at the start", "at the end", "stuck"])
def test_what_a_server_missed_is_replayed_once(
    door: Any, tiny: Path, rows_file: Path, tmp_path: Path, untracked: str, away: str
) -> None:
    uri, out, said = f"{door.url}?experiment=away&wait=0", tmp_path / "out", list[str]()
    if away == "at the start":
        door.shut()

    def at_step(step: int) -> None:
        if step == 5 and away != "at the start":
            until(lambda: state_of(out, uri).runs)
            door.shut() if away == "at the end" else door.stick()

    tuned(tiny, rows_file, out, uri, at_step=at_step, say=said.append)
    assert result_hash(out) == untracked
    assert any("burnish track replay" in line for line in said), said
    door.open()
    (done,) = replay(out)
    assert done.sent > 0
    assert not done.refused + done.missing
    check_model(out, uri, "away-out")
    (again,) = replay(out)
    assert again.sent == 0
    assert again.there == done.sent + done.there
    check_model(out, uri, "away-out")


def test_a_break_at_any_call_logs_and_registers_a_model_once(
    mlflow_server: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    import burnish.track.delivery as delivering

    uri, out = f"{mlflow_server.url}?experiment=broken&wait=0", tmp_path / "out"
    tuned(tiny, rows_file, out, uri, say=lambda line: None)
    breaks = 0

    class Breaking:
        """MLflow's client; the reply to every other call that changes something is lost, once for each kind of call."""

        def __init__(self, client: Any) -> None:
            self._client = client

        def __getattr__(self, name: str) -> Any:
            method = getattr(self._client, name)

            def call(*args: Any, **options: Any) -> Any:
                nonlocal breaks
                result = method(*args, **options)
                if name.startswith(("create_", "log_", "finalize_")) and name not in lost:
                    lost.add(name)
                    breaks += 1
                    raise ConnectionError(name)
                return result

            return call

    lost: set[str] = set()

    class BreakingMlflow(Mlflow):
        def __init__(self, destination: Any) -> None:
            super().__init__(destination)
            self.client = Breaking(self.client)

    from burnish.track.destination import parse_destination
    from burnish.track.spool import find_spools

    (spool,) = find_spools(out)
    sending = delivering.Delivery(spool, parse_destination(uri), compare=False, open_client=BreakingMlflow)
    while True:
        try:
            if not sending.advance():
                break
        except ConnectionError:
            continue
    assert {"create_run", "log_batch", "log_artifact", "log_model_artifacts", "log_outputs"} <= lost
    assert {"create_logged_model", "finalize_logged_model", "create_model_version"} <= lost
    check_model(out, uri, "broken-out")


def test_registered_model_loads_and_answers(
    mlflow_server: Any, tiny: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas

    import burnish

    uri, out = f"{mlflow_server.url}?experiment=whole&model=answers&run=first", tmp_path / "out"
    tuned(tiny, rows_file, out, f"{uri}&wait=0", say=lambda line: None)
    replay(out, uri)
    name = check_model(out, uri, "answers")
    assert check_whole(out, uri).info.run_name == "first"
    mlflow.set_tracking_uri(mlflow_server.url)
    loaded = mlflow.pyfunc.load_model(name)
    assert loaded.metadata.signature.inputs.input_names() == ["prompt"]
    prompts = ["How many ships are there?", "List the names of all ships."]
    given = loaded.predict(pandas.DataFrame({"prompt": prompts}), params={"max_tokens": 6, "chat": False})
    engine = burnish.Engine(str(out))
    expected = [one.text for one in engine.generate(prompts, burnish.SamplingParams(max_tokens=6, temperature=0.0))]
    assert list(given["text"]) == expected
    assert any(expected)
    folder = Path(mlflow.artifacts.download_artifacts(name, dst_path=str(tmp_path / "there")))
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".pickle")]
