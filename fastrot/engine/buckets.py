"""Gradients averaged over ranks in buckets, each sent off as soon as the backward pass has filled it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class _Bucket:
    """views: of flat, in the layout of each parameter; missing: gradients yet to come; sent: its all-reduce."""

    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    missing: int = 0
    sent: dist.Work | None = None

    def send(self) -> None:
        torch._foreach_copy_(self.views, [p.grad for p in self.parameters if p.grad is not None])
        self.sent = dist.all_reduce(self.flat, async_op=True)


class Buckets:
    """Buckets of about `mib` MiB for the trained parameters, given in the network's order; gradients come in about
    the reverse, and each must come in every step.

    Not torch's DistributedDataParallel: its timers make the host wait for the GPU in the first ten steps and in each
    hundredth, it must be told before a forward pass what only the backward pass wants to know, and DeepSpeed takes none.
    """

    def __init__(self, parameters: list[nn.Parameter], mib: float, world: int):
        self._world, self._next, self._expecting = world, 0, False
        self._buckets: list[_Bucket] = []
        held: list[nn.Parameter] = []
        size = 0
        for parameter in reversed(parameters):
            held.append(parameter)
            size += parameter.nbytes
            if size >= mib * 2**20 or parameter is parameters[0]:
                self._buckets.append(_bucket(held))
                held, size = [], 0
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._came(bucket))

    def expect(self) -> None:
        """The backward pass that follows is the step's last: what it fills is sent."""
        self._expecting = True
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _came(self, bucket: _Bucket) -> None:
        if self._expecting:
            bucket.missing -= 1
            # one after another, whichever fills first: ranks must agree on the order
            while self._next < len(self._buckets) and not self._buckets[self._next].missing:
                self._buckets[self._next].send()
                self._next += 1

    def finish(self) -> None:
        """Send what was not, wait for all; the parameters' gradients are the means over ranks."""
        for bucket in self._buckets[self._next :]:
            bucket.send()
        for bucket in self._buckets:
            if bucket.sent is not None:
                bucket.sent.wait()
            bucket.flat /= self._world
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view
        self._next, self._expecting = 0, False


def _bucket(parameters: list[nn.Parameter]) -> _Bucket:
    flat = parameters[0].new_empty(sum(p.numel() for p in parameters))
    parts = flat.split([p.numel() for p in parameters])
    views = [part.as_strided(p.size(), p.stride()) for part, p in zip(parts, parameters, strict=True)]
    return _Bucket(list(parameters), flat, views)
