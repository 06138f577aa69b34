"""Where time goes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrot.profiling.loops import watch as watch

__all__ = ["watch"]


def __getattr__(name: str) -> Any:
    if name != "watch":
        raise AttributeError(f"module 'fastrot.profiling' has no attribute {name!r}")
    from fastrot.profiling.loops import watch

    return watch
