"""Rotated views of crops (here), fused norms, pointwise convolutions and the turbo decoder (in rooms of their own)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrot_kernels.op import rotate_views

__all__ = ["rotate_views"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: views need torch, the reader and the decoder of files none."""
    if name != "rotate_views":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastrot_kernels import op

    return op.rotate_views
