"""How a probe shows that it goes on: by whatever its caller gives it."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Shows progress over an iterable, and gives its items."""

    def __call__(self, items: Iterable[T], total: int, title: str, /) -> Iterable[T]: ...


def silent(items: Iterable[T], total: int, title: str) -> Iterable[T]:
    """Shows nothing."""
    return items
