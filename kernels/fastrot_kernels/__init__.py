"""Rotated views of crops (here), fused norms, pointwise convolutions and the turbo decoder (in rooms of their own)."""

from fastrot_kernels.op import rotate_views

__all__ = ["rotate_views"]
