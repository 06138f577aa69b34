"""What the products in Triton share: how a product is cut into tiles, and what is done to a tile."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of 16-bit values: 128 rows fill both of Hopper's warp groups, 64 values along the sum are a 128-byte line.
ROWS, COLUMNS, ALONG = 128, 128, 64
# Products of float32 without TF32 run on the plain units, where a tile must be small to stay in registers.
PLAIN = {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2}

# Decided by TRITON_INTERPRET when triton is imported: only then can the kernels take CPU tensors.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def tile(kernel: str, columns: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """How a kernel's product with so many columns is cut, by how many warps, and how many steps ahead it loads.

    kernel      plain or normed (of forward), joined_forward, data_gradient, joined_gradient, normed_gradient,
                weight_gradient.
    capability  the GPU's generation: 8 Ampere, 9 Hopper.
    Such that nothing spills, and where it can be, two programs share a multiprocessor.
    """
    joined = kernel == "joined_gradient"
    if dtype == torch.float32 and precision() == "ieee":
        return PLAIN | ({"BN": 32} if joined else {})
    # joined: four maps pass by a product that is short, so small tiles, and many loads under way
    low = dtype != torch.float32
    makes = kernel in ("joined_forward", "normed_gradient")  # what it multiplies, of two maps
    narrow = joined or columns <= COLUMNS // 2 or (makes and not low)
    shape = {"BM": ROWS, "BN": COLUMNS // 2 if narrow else COLUMNS, "BK": ALONG if low and not makes else ALONG // 2}
    # Ampere's products hold their operands in registers too: two programs of eight warps would spill
    sums = kernel in ("data_gradient", "normed_gradient")  # at whose end a map more is in registers
    twice = low and (joined or (not narrow and capability >= 9 and not sums))
    stages = 2 if not low or (twice and kernel == "normed") else 4 if makes else 3
    how = {"num_warps": 4 if low and narrow and not joined else 8, "num_stages": stages}
    return shape | how | ({"maxnreg": 128} if twice else {})


def precision() -> str:
    """Of products of float32: that of torch's convolutions, in whose place these stand."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def generation(x: Tensor) -> int:
    """Of its GPU: 8 Ampere, 9 Hopper."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


def programs(x: Tensor) -> int:
    """So many run at once: two a multiprocessor."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # Triton 3.6's interpreter multiplies bfloat16 as the integers of its bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def store_with_moments(total, y, parts, live, count, r, n, N):
    """A product's tile, transposed, and the moments of its live rows, of which there are `count`."""
    place = r[:, None] * N + n[None, :]
    stored = spread(tl.trans(total).to(y.dtype.element_ty), y + place, live & (n < 0)[None, :])
    tl.store(y + place, stored, mask=live & (n < N)[None, :])
    # around the tile's own mean: squares of values far from 0 would cancel
    value = stored.to(tl.float32)
    mean = tl.sum(tl.where(live, value, 0.0), 0) / count
    distance = tl.where(live, value - mean[None, :], 0.0)
    tl.store(parts + n, tl.zeros((n.shape[0],), tl.float32) + count, mask=n < N)
    tl.store(parts + N + n, mean, mask=n < N)
    tl.store(parts + 2 * N + n, tl.sum(distance * distance, 0) / count, mask=n < N)


@triton.jit
def store_through_relu(total, x, affine, g, parts, live, r, k, K):
    """A gradient's tile where relu(norm(x)) is above 0, and its two sums over the live rows."""
    inside = live & (k < K)[None, :]
    place = r[:, None] * K + k[None, :]
    seen = tl.load(x + place, mask=inside, other=0.0)
    value = spread(total.to(g.dtype.element_ty), g + place, live & (k < 0)[None, :])
    stored = tl.where((scaled(seen, affine, K, k) <= 0) | ~live, 0.0, value)
    tl.store(g + place, stored, mask=inside)
    store_sums(stored.to(tl.float32), seen, affine, parts, k, K)


@triton.jit
def store_sums(g, x, affine, sums, k, K):
    """The sums of g * xhat and of g over a tile's rows."""
    mean = tl.load(affine + k, mask=k < K, other=0.0)
    rstd = tl.load(affine + K + k, mask=k < K, other=0.0)
    tl.store(sums + k, tl.sum(g * (x.to(tl.float32) - mean[None, :]), 0) * rstd, mask=k < K)
    tl.store(sums + K + k, tl.sum(g, 0), mask=k < K)


@triton.jit
def spread(tile, place, nowhere):
    """The tile, spread over threads as memory is, not as a product leaves it: each thread then sums its part of a
    column by itself, where it would shuffle five times as often. The load, of nothing, is there for its layout."""
    return tl.where(nowhere, tl.load(place, mask=nowhere, other=0.0), tile)


@triton.jit
def constants(affine, C, c):
    """Mean, scale and shift of channels c."""
    mean = tl.load(affine + c, mask=c < C, other=0.0)
    scale = tl.load(affine + 2 * C + c, mask=c < C, other=0.0)
    return mean, scale, tl.load(affine + 3 * C + c, mask=c < C, other=0.0)


@triton.jit
def scaled(tile, affine, C, c):
    """norm(tile) of channels c, float32."""
    mean, scale, shift = constants(affine, C, c)
    return (tile.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def through_relu(z):
    """A NaN is not below 0: it passes, as torch's does."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def norm_relu(tile, affine, C, c):
    """relu(norm(tile)) of channels c, of the tile's dtype."""
    return through_relu(scaled(tile, affine, C, c)).to(tile.dtype)
