"""One engine over several actors: the ranks of a worker's placement group, one bundle and one device each.

Rank 0 is the worker's own actor, which has the engine. It starts the others, which belong to it and end with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from burnish.errors import ConfigError
from burnish.scale.ray_resources import WorkerResources
from burnish.scale.ray_session import free_port

_FOUND_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How an engine is cut, and what each of its ranks reserves; see `models.shard_cut`."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    resources: WorkerResources
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1 or self.pipeline_parallel < 1:
            got = f"{self.tensor_parallel} and {self.pipeline_parallel}"
            raise ConfigError("tensor and pipeline parallel are out of range", got=got, expected="1 or more")
        if self.ranks > 1 and not self.resources.demand():
            raise ConfigError("--resources reserves nothing for a rank", expected="cpus=1 or more")

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


class Rank:
    """The actor of a rank above 0."""

    def run(self, shards: Shards, rank: int, meeting: dict[str, str]) -> None:
        """Follow rank 0 until it lets go.

        Args:
            meeting: the variables that say where rank 0 is met.

        Raises:
            WorkerError: another rank is gone.
        """
        import torch

        from burnish.engine.shard_worker import ShardWorker

        os.environ.update(meeting, RANK=str(rank))
        torch.set_num_threads(shards.resources.threads)
        ShardWorker(
            rank=rank,
            tensor_parallel=shards.tensor_parallel,
            pipeline_parallel=shards.pipeline_parallel,
            address="env://",
            device=_own_device(shards),
        ).run()


@contextmanager
def leading(shards: Shards) -> Iterator[None]:
    """Start the other ranks in this actor's placement group; an engine that is made in the block is rank 0's.

    Rank 0 and its engine find each other by the variables that torchrun sets.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    assert group is not None
    host = ray.util.get_node_ip_address()
    port = free_port(host)
    meeting = {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(shards.ranks),
        "LOCAL_RANK": "0",  # each rank sees its own card alone, wherever it is
        "LOCAL_WORLD_SIZE": "1",
    }
    if "BURNISH_SHARD_TIMEOUT" in os.environ:
        meeting["BURNISH_SHARD_TIMEOUT"] = os.environ["BURNISH_SHARD_TIMEOUT"]
    os.environ.update(meeting, RANK="0")
    ranks = []
    for rank in range(1, shards.ranks):
        placed = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        options = {**shards.resources.actor_options(), "scheduling_strategy": placed, "max_restarts": 0}
        ranks.append(ray.remote(Rank).options(**options).remote())
    running = [actor.run.remote(shards, rank, meeting) for rank, actor in enumerate(ranks, 1)]
    try:
        yield
    finally:
        ray.wait(running, num_returns=len(running), timeout=_FOUND_S)
        for actor in ranks:
            ray.kill(actor)


def _own_device(shards: Shards) -> str:
    return "cuda:0" if shards.device == "cuda" else shards.device
