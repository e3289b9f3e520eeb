"""Summing gradients over processes while the backward pass still runs.

Li et al., 2020, arXiv:2006.15704, section 3.2: gradients are sent in flat buckets, in the order in which a backward
pass brings them; every rank sends the same buckets in the same order, whether its own gradients are there or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20


class GradientBuckets:
    """The buckets of some parameters, last parameter first.

    Args:
        parameters: in the model's order, the same on every rank.
        bucket_bytes: a bucket is closed when it holds this much.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, bucket_bytes: int) -> None:
        self.parameters = list(parameters)
        self._buckets: list[list[nn.Parameter]] = []
        size, previous = bucket_bytes, None
        for parameter in reversed(self.parameters):
            if size >= bucket_bytes or parameter.dtype != previous:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size, previous = size + parameter.numel() * parameter.element_size(), parameter.dtype
        bucket_of = {id(parameter): place for place, bucket in enumerate(self._buckets) for parameter in bucket}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(bucket_of[id(parameter)]))
            for parameter in self.parameters
        ]
        self._armed = False
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, Any]] = []

    def holds(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are the parameters, in this order."""
        return len(parameters) == len(self.parameters) and all(a is b for a, b in zip(parameters, self.parameters))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def arm(self) -> None:
        """The next backward pass is the last before `finish`: send each bucket as soon as it is complete."""
        self._armed = True
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Send what was not sent, wait, and write the sums into the gradients."""
        self._armed = False
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, (flat, work) in zip(self._buckets, self._sent):
            work.wait()
            sums = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in bucket]), bucket)]
            for parameter, total in zip(bucket, sums):
                if parameter.grad is None:
                    parameter.grad = total.clone()
                else:
                    parameter.grad.copy_(total)
        self._sent = []

    def _hook(self, bucket: int) -> Any:
        def count(_parameter: Tensor) -> None:
            if not self._armed:
                return
            self._missing[bucket] -= 1
            while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] <= 0:
                self._send()

        return count

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket]
        flat = torch.cat(parts)
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))
