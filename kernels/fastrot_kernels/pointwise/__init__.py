"""1x1 convolutions of a ResNet with the batch norms around them, as matrix products on rows [M, C].

A product takes in the norm and ReLU of the map it reads, and gives the moments of the map it writes (`norm`'s float32
[3, C]), so that neither costs a pass over memory. Where nothing is taken in, plain torch does the data's gradient.
"""

from fastrot_kernels.pointwise.op import (
    affine,
    backward_affine,
    data_gradient,
    forward,
    joined_forward,
    joined_gradient,
    normed_gradient,
    weight_gradient,
)

__all__ = [
    "affine",
    "backward_affine",
    "data_gradient",
    "forward",
    "joined_forward",
    "joined_gradient",
    "normed_gradient",
    "weight_gradient",
]
