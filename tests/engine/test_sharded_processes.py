"""The processes of a sharded engine: how they start, what is refused, and that none outlives the others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from burnish.engine import shard_group
from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.engine.shard_backend import ShardBackend, uninterrupted
from burnish.engine.shard_group import join, listen, timeout_from_environment
from burnish.engine.shard_launch import check_world, launched_rank, threads_of_each
from burnish.engine.shard_rank import ShardRank
from burnish.engine.shard_setup import open_group
from burnish.errors import BurnishError, CheckpointError, ConfigError, WorkerError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import save_decoder

BUNDLED = "burnish-sql-base"
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
LONG_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        family="llama",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rotary_dim=8,
        max_position_embeddings=64,
    )
    made = tmp_path_factory.mktemp("model")
    save_decoder(Decoder(config).initialize(std=0.3, seed=1), made, source=None)
    return made


def make(folder: Path | str, **options: Any) -> NativeEngine:
    return NativeEngine(folder, dtype="float32", threads=1, max_num_seqs=2, max_model_len=48, **options)


def followers_of(engine: NativeEngine) -> list[psutil.Process]:
    backend = engine.runner.backend
    assert isinstance(backend, ShardBackend)
    assert backend._followers is not None
    return [psutil.Process(pid) for pid in backend._followers.pids]


def answer(engine: NativeEngine) -> tuple[int, ...]:
    return next(iter(engine.generate([[5, 6, 7]], PARAMS))).token_ids


def all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=LONG_S)[1]


def test_a_killed_rank_ends_the_others_with_one_line(folder: Path) -> None:
    engine = make(folder, tensor_parallel=3)
    answer(engine)
    processes = followers_of(engine)
    assert len(processes) == 2
    processes[0].kill()
    with pytest.raises(WorkerError, match=r"^rank 1 was killed by SIGKILL$"):
        answer(engine)
    assert all_gone(processes)
    with pytest.raises(WorkerError, match=r"^rank 1 was killed by SIGKILL$"):
        answer(engine)
    engine.close()


def test_a_rank_that_hangs_is_lost_after_the_time_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_SHARD_TIMEOUT", "15")
    engine = make(folder, pipeline_parallel=2)
    answer(engine)
    processes = followers_of(engine)
    processes[0].suspend()
    with pytest.raises(WorkerError, match="lost the other processes: one gave no sign for 15 s"):
        answer(engine)
    assert all_gone(processes)


def test_a_rank_that_hangs_while_it_is_to_answer_is_lost_too(folder: Path) -> None:
    engine = make(folder, pipeline_parallel=2)
    processes = followers_of(engine)
    processes[0].suspend()
    backend = engine.runner.backend
    assert isinstance(backend, ShardBackend)
    backend._group.timeout_s = 3.0
    with pytest.raises(WorkerError, match=r"one gave no sign for 3 s\. Raise BURNISH_SHARD_TIMEOUT"):
        engine.rank_memory()
    assert all_gone(processes)


def test_a_rank_that_works_long_on_its_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_group, "_SIGN_S", 0.01)
    store, address = listen(timeout_s=LONG_S)
    seen = threading.Event()

    def follow() -> None:
        group = join(rank=1, tensor_parallel=2, pipeline_parallel=1, address=address, timeout_s=LONG_S)
        with group.at_work():
            assert seen.wait(LONG_S)
        group.gather("done")

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    group = join(rank=0, tensor_parallel=2, pipeline_parallel=1, address=address, timeout_s=LONG_S, store=store)
    sign = torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        group._control.recv([sign.zero_()], 1, 0).wait()
        assert int(sign) == shard_group._AT_WORK
    seen.set()
    assert group.gather("own") == ["own", "done"]
    follower.join(LONG_S)
    assert not follower.is_alive()


def test_an_interrupted_load_ends_the_other_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, started = psutil.Process().children(), []

    def interrupted(rank: ShardRank, options: object) -> None:
        started.extend(one for one in psutil.Process().children() if one not in known)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(ShardRank, "load", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            make(folder, tensor_parallel=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert started
    assert all_gone(started)


def test_an_engine_that_is_closed_or_forgotten_leaves_no_process(folder: Path) -> None:
    engine = make(folder, pipeline_parallel=2)
    processes = followers_of(engine)
    expected = answer(engine)
    engine.close()
    engine.close()
    assert all_gone(processes)
    with pytest.raises(WorkerError, match="closed"):
        answer(engine)
    engine = make(folder, pipeline_parallel=2)
    processes = followers_of(engine)
    assert answer(engine) == expected
    del engine
    assert all_gone(processes)


SCRIPT = """
import sys
from burnish.engine.native import NativeEngine
engine = NativeEngine(sys.argv[1], dtype="float32", threads=1, tensor_parallel=2)
print(*engine.runner.backend._followers.pids, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_followers_end_with_a_driver_that_is_killed(folder: Path, number: int) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with driver:
        assert driver.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
        assert len(processes) == 1
        if number == signal.SIGKILL:
            processes[0].suspend()  # a stopped process cannot end by itself
        driver.send_signal(number)
        assert driver.wait(LONG_S) == -number
        assert all_gone(processes)


def test_torchrun_ranks_run_one_engine_and_print_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "burnish", "generate", BUNDLED, "--prompt", "SELECT", "--max-tokens", "8"),
        *("--threads", "1", "--dtype", "float32", "--offline", "--json", "--quiet"),
    ]
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            [*command, "--pipeline-parallel", "2"],
            env={**shared, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=LONG_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[1] == ("", "")
    alone = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
    assert json.loads(said[0][0])[0]["token_ids"] == json.loads(alone.stdout)[0]["token_ids"]


def test_what_cannot_be_done_together_is_refused_before_processes_start(folder: Path, tmp_path: Path) -> None:
    before = len(psutil.Process().children())
    decoder = Decoder(ModelConfig.from_dict({**_tiny_fields(), "family": "llama"}))
    for error, text, call in (
        (ConfigError, "a decoder in memory cannot be cut", lambda: make(decoder, tensor_parallel=2)),  # type: ignore[arg-type]
        (ConfigError, "the cpu backend cannot run in several", lambda: make(folder, tensor_parallel=2, backend="cpu")),
        (ConfigError, "adapters are not served", lambda: make(folder, tensor_parallel=2, adapters={"a": tmp_path})),
        (ConfigError, "is always laid out", lambda: make(folder, tensor_parallel=2, optimise=False)),
        (ConfigError, "expected one of 1, 2, 3, 4", lambda: make(folder, tensor_parallel=5)),
        (ConfigError, "more pipeline stages than layers", lambda: make(folder, pipeline_parallel=3)),
        (ConfigError, "tensor_parallel is out of range", lambda: make(folder, tensor_parallel=0)),
        (CheckpointError, "", lambda: make(tmp_path, tensor_parallel=2)),
    ):
        with pytest.raises(error) as caught:
            call()
        assert text in caught.value.message
        assert "\n" not in caught.value.message
    if torch.cuda.device_count() < 2:
        with pytest.raises(ConfigError, match="more processes than cards"):
            make(folder, tensor_parallel=2, device="cuda")
    assert len(psutil.Process().children()) == before


def test_a_refusal_of_every_rank_leaves_the_group_for_another_model(folder: Path, tmp_path: Path) -> None:
    group, followers = open_group(tensor_parallel=2, pipeline_parallel=1, threads=1)
    assert followers is not None
    try:
        broken = tmp_path / "model.safetensors"
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        broken.write_bytes((folder / "model.safetensors").read_bytes()[:-8])
        with pytest.raises(CheckpointError, match="truncated"):
            make(tmp_path, shards=group)
        with pytest.raises(ConfigError, match="computes elsewhere; got cuda; expected cpu"):
            make(folder, shards=group, device="cuda")
        with pytest.raises(ConfigError, match="kv_memory is too small"):
            make(folder, shards=group, kv_memory=8)
        engine = make(folder, shards=group)
        assert len(answer(engine)) == 6
        with pytest.raises(ConfigError, match="adapters are not served"):
            engine.runner.backend.set_adapters([])
        engine.close()
        assert all(process.is_running() for process in [psutil.Process(pid) for pid in followers.pids])
    finally:
        followers.close()


def test_an_interrupt_waits_for_the_end_of_a_step() -> None:
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever began the tests may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("the step")
            done.append("never")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["the step"]


def test_what_the_environment_says_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert launched_rank() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched_rank() == 1
    check_world(2, 1)
    with pytest.raises(ConfigError, match="another number of processes"):
        check_world(2, 2)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="do not fit together"):
        launched_rank()
    monkeypatch.setenv("BURNISH_SHARD_TIMEOUT", "soon")
    with pytest.raises(BurnishError, match="BURNISH_SHARD_TIMEOUT"):
        timeout_from_environment()
    assert threads_of_each(2, 3) == 3
    assert threads_of_each(1000, None) == 1


def _tiny_fields() -> dict[str, Any]:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    return {**dict.fromkeys(sizes, 4), "max_position_embeddings": 8, "rotary_dim": 4}
