"""`torch.library.custom_op` with types: an operation keeps the signature of its function."""

from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Operation(Protocol[P, R]):
    """A function that torch.compile does not look into."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def register_fake(self, fake: Callable[..., R], /) -> object:
        """What gives a result's shape, dtype and device without computing it; arguments come by position."""


def operation(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Register a function of tensors, numbers and words as `name`; mutates: the arguments that it writes to."""
    return cast(Callable[[Callable[P, R]], Operation[P, R]], torch.library.custom_op(name, mutates_args=mutates))
