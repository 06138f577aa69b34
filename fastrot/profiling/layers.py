"""A network's groups of layers: what each computes and moves, the time it takes, and the least that this device could."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fastrot.profiling.marks import Mark, between, mark
from fastrot.profiling.roofline import Rates, Row


@dataclass(frozen=True)
class Group:
    """Of one step. flops: a multiplication and an addition are two; bytes: unfused; seconds: forward and backward;
    least_s: at the roof."""

    name: str
    flops: int
    bytes: int
    seconds: float
    least_s: float


class Stopwatch:
    """Times the groups of a network with stages layer1 ... layer4, computed eagerly: each from the end of the one
    before to its own, forward, and back by the gradients of these ends."""

    def __init__(self, network: nn.Module):
        names = [name for name, _ in network.named_children()]
        self._groups = dict.fromkeys(group_of(name) for name in names)
        ends = {group_of(name): child for name, child in network.named_children()}
        self._forward: list[Mark] = []
        self._backward: list[Mark] = []
        self._seconds = dict.fromkeys(self._groups, 0.0)
        self._hooks = [network.register_forward_pre_hook(lambda *_: self._forward.append(mark()))]
        self._hooks += [child.register_forward_hook(self._ended) for child in ends.values()]

    def _ended(self, _module: nn.Module, _input: Any, output: Any) -> None:
        self._forward.append(mark())
        first: torch.Tensor = tree_leaves(output)[0]  # a joined block gives several
        if first.requires_grad:
            first.register_hook(lambda _: self._backward.append(mark()))

    def timed(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """The backward pass, at whose end a micro-step is summed up."""

        def run(*arguments: Any) -> None:
            backward(*arguments)
            self._sum_up(mark())

        return run

    def _sum_up(self, end: Mark) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        ways = self._forward, [*self._backward, end]
        if all(len(way) == len(self._groups) + 1 for way in ways):
            for names, way in ((list(self._groups), ways[0]), (list(self._groups)[::-1], ways[1])):
                for name, (a, b) in zip(names, pairwise(way), strict=True):
                    self._seconds[name] += between(a, b)
        self._forward.clear()
        self._backward.clear()

    def read(self) -> dict[str, float]:
        """Seconds since the last read, by group; zeros where the network does not run through its groups in order."""
        seconds, self._seconds = self._seconds, dict.fromkeys(self._groups, 0.0)
        return seconds

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def group_of(layer: str) -> str:
    """Of the name of a layer or operation: its stage, else the stem before or the head behind."""
    first = layer.partition(".")[0]
    if first.startswith("layer") or first in ("views", "update"):
        return first
    return "head" if first in ("avgpool", "fc", "step") else "stem"


def groups(rows: list[Row], rates: Rates, seconds: dict[str, float]) -> list[Group]:
    """The operations of a step, summed up by group, beside the seconds that each took."""
    of = {name: [row for row in rows if group_of(row.layer) == name] for name in seconds}
    return [
        Group(name, sum(row.flops for row in some), sum(row.bytes for row in some), seconds[name], rates.seconds(some))
        for name, some in of.items()
        if seconds[name] and some
    ]
