"""Batch norm, addition and ReLU in as few passes over the maps as there can be: six operations on rows [M, C].

A map [N, C, H, W] in channels-last memory is rows [N*H*W, C]. The moments of a batch, float32 [3, C], are each
channel's count, mean and variance (over the count): what partial batches, and ranks, are merged from.
"""

from fastrot_kernels.norm.op import apply, gradient_sums, gradients, merge, moments, update_running

__all__ = ["apply", "gradient_sums", "gradients", "merge", "moments", "update_running"]
