"""Groups of real processes for the tests of sharded engines: each is started once and runs many models."""

from __future__ import annotations

from burnish.engine.shard_group import ShardGroup
from burnish.engine.shard_launch import Followers
from burnish.engine.shard_setup import open_group


class Groups:
    """Groups by (tensor_parallel, pipeline_parallel), made when they are first asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], tuple[ShardGroup, Followers]] = {}

    def __call__(self, tensor_parallel: int, pipeline_parallel: int) -> ShardGroup:
        key = (tensor_parallel, pipeline_parallel)
        if key not in self._made:
            group, followers = open_group(
                tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, threads=1
            )
            assert followers is not None
            self._made[key] = (group, followers)
        return self._made[key][0]

    def close(self) -> None:
        for group, followers in self._made.values():
            group.command(("leave", ()))
            followers.close()
