"""A ResNet's stem after its convolution: batch norm, ReLU and a 3x3 max-pool of stride 2 and padding 1, in one pass.

Maps are [N, H, W, C], the memory of channels-last ones. Moments are `norm`'s; so are the sums of the backward pass:
`norm.gradient_sums` over the peaks, which is all that a gradient reaches.
"""

from fastrot_kernels.pool.op import forward, gradient

__all__ = ["forward", "gradient"]
