"""Rotated views of a batch of crops: one operation, several backends."""

from fastrot_kernels.op import rotate_views

__all__ = ["rotate_views"]
