"""Both operations in Triton: each map read once and written once. Nothing is atomic: a run gives the same bits again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot_kernels.norm.interface import Norm
from fastrot_kernels.norm.triton_norm import block_shape
from fastrot_kernels.pool.op import empty_pooled

# Windows times channels of a program: eight a thread, one load of 16-bit values a pixel. All loads stand before what is
# computed, so a thread takes up to 140 registers: small programs, of which three or four share a multiprocessor.
VALUES_PER_PROGRAM = 1024
WARPS = 4


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_pooled(x)
    peaks, winners = torch.empty_like(y), torch.empty_like(y, dtype=torch.uint8)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not the tensor's
        forward_kernel[_programs(y)](
            x, norm.moments, norm.weight, norm.bias, y, peaks, winners, *x.shape, norm.eps,
            **block_shape(x.shape[3], VALUES_PER_PROGRAM), num_warps=WARPS,
        )  # fmt: skip
    return y, peaks, winners


def gradient(dy: Tensor, winners: Tensor, x: Tensor, norm: Norm, sums: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        gradient_kernel[_programs(dy)](
            dy, winners, x, norm.moments, norm.weight, norm.bias, sums, dx, *x.shape, norm.eps,
            **block_shape(x.shape[3], VALUES_PER_PROGRAM), num_warps=WARPS,
        )  # fmt: skip
    return dx


def _programs(pooled: Tensor) -> tuple[int]:
    n, height, width, channels = pooled.shape
    tile = block_shape(channels, VALUES_PER_PROGRAM)
    return (triton.cdiv(n * height * width, tile["BM"]) * triton.cdiv(channels, tile["BC"]),)


@triton.jit
def _windows(N, H, W, C, BM: tl.constexpr, BC: tl.constexpr):
    """A program's channels, its windows and where they are not past the end; of each the row and the column among
    windows, and the pixel at its centre."""
    blocks = tl.cdiv(C, BC)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    m = (tl.program_id(0) // blocks) * BM + tl.arange(0, BM)
    height, width = (H + 1) // 2, (W + 1) // 2
    row, column = m // width % height, m % width
    image = m // width // height
    return c, m, image < N, row, column, (image * H + 2 * row) * W + 2 * column


@triton.jit
def _affine(moments, weight, bias, C, c, eps):
    """Count, mean, 1 / deviation, weight / deviation and bias of channels c; no exact root: a thread has eight."""
    count = tl.load(moments + c, mask=c < C, other=1.0)
    mean = tl.load(moments + C + c, mask=c < C, other=0.0)
    rstd = tl.rsqrt(tl.load(moments + 2 * C + c, mask=c < C, other=1.0) + eps)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    return count, mean, rstd, w * rstd, b


@triton.jit
def forward_kernel(
    x,  # [N, H, W, C]
    moments,  # float32 [3, C]
    weight,  # [C]
    bias,  # [C]
    y,  # [N, ceil(H/2), ceil(W/2), C]
    peaks,  # like y
    winners,  # uint8, like y
    N,
    H,
    W,
    C,
    eps,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: BM windows, in BC channels."""
    c, m, inside, row, column, centre = _windows(N, H, W, C, BM, BC)
    _, mean, _, scale, b = _affine(moments, weight, bias, C, c, eps)
    # 64 bits for a value's place, as maps may exceed 2**31 values
    here = x + centre.to(tl.int64)[:, None] * C + c[None, :]
    best = tl.full((BM, BC), float("-inf"), tl.float32)
    peak = tl.zeros((BM, BC), tl.float32)
    winner = tl.zeros((BM, BC), tl.int32)
    for tap in tl.static_range(9):
        down, right = 2 * row + tap // 3 - 1, 2 * column + tap % 3 - 1
        there = inside & (down >= 0) & (down < H) & (right >= 0) & (right < W)
        known = there[:, None] & (c < C)[None, :]
        value = tl.load(here + ((tap // 3 - 1) * W + tap % 3 - 1) * C, mask=known, other=0.0).to(tl.float32)
        z = ((value - mean[None, :]) * scale[None, :] + b[None, :]).to(y.dtype.element_ty).to(tl.float32)
        z = tl.where(there[:, None], z, float("-inf"))
        more = (z > best) | (z != z)  # not so of a NaN, which stays, as in torch
        best = tl.where(more, z, best)
        peak = tl.where(more, value, peak)
        winner = tl.where(more, tap, winner)
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    kept = inside[:, None] & (c < C)[None, :]
    # the ReLU after the maximum: whichever of the values below 0 is the largest
    tl.store(y + at, tl.where(best <= 0, 0.0, best).to(y.dtype.element_ty), mask=kept)
    tl.store(peaks + at, peak.to(peaks.dtype.element_ty), mask=kept)
    tl.store(winners + at, winner.to(tl.uint8), mask=kept)


@triton.jit
def _window(dy, winners, at, inside):
    """Gradients of windows, and which of its nine values each goes to."""
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    return g, tl.load(winners + at, mask=inside, other=9)


@triton.jit
def _store(dx, at, inside, value, g, mean, scale, b, along, level):
    """The gradient of x's values where g comes out of the pool; the ReLU lets through what was above 0, and a NaN."""
    distance = value.to(tl.float32) - mean[None, :]
    g = tl.where(distance * scale[None, :] + b[None, :] <= 0, 0.0, g)
    z = g * scale[None, :] - level[None, :] - distance * along[None, :]
    tl.store(dx + at, z.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    dy,  # [N, ceil(H/2), ceil(W/2), C]
    winners,  # uint8, like dy
    x,  # [N, H, W, C]
    moments,  # float32 [3, C]
    weight,  # [C]
    bias,  # [C]
    sums,  # float32 [2, C]
    dx,  # [N, H, W, C]
    N,
    H,
    W,
    C,
    eps,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: of each of BM windows the centre and the pixels right of it, below, and right of that one."""
    c, m, inside, row, column, centre = _windows(N, H, W, C, BM, BC)
    width = (W + 1) // 2
    known = inside[:, None] & (c < C)[None, :]
    right = known & (2 * column + 1 < W)[:, None]
    below = known & (2 * row + 1 < H)[:, None]
    here = x + centre.to(tl.int64)[:, None] * C + c[None, :]
    x0 = tl.load(here, mask=known, other=0.0)
    x1 = tl.load(here + C, mask=right, other=0.0)
    x2 = tl.load(here + W * C, mask=below, other=0.0)
    x3 = tl.load(here + (W + 1) * C, mask=right & below, other=0.0)
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    more = known & (column + 1 < width)[:, None]
    under = known & (row + 1 < (H + 1) // 2)[:, None]
    g0, n0 = _window(dy, winners, at, known)
    g1, n1 = _window(dy, winners, at + C, more)
    g2, n2 = _window(dy, winners, at + width * C, under)
    g3, n3 = _window(dy, winners, at + (width + 1) * C, more & under)

    count, mean, rstd, scale, b = _affine(moments, weight, bias, C, c, eps)
    along = tl.load(sums + c, mask=c < C, other=0.0) / count * rstd * scale
    level = tl.load(sums + C + c, mask=c < C, other=0.0) / count * scale
    to = centre.to(tl.int64)[:, None] * C + c[None, :]
    g = tl.where(n0 == 4, g0, 0.0)
    _store(dx, to, known, x0, g, mean, scale, b, along, level)
    g = tl.where(n0 == 5, g0, 0.0) + tl.where(n1 == 3, g1, 0.0)
    _store(dx, to + C, right, x1, g, mean, scale, b, along, level)
    g = tl.where(n0 == 7, g0, 0.0) + tl.where(n2 == 1, g2, 0.0)
    _store(dx, to + W * C, below, x2, g, mean, scale, b, along, level)
    g = (
        tl.where(n0 == 8, g0, 0.0)
        + tl.where(n1 == 6, g1, 0.0)
        + tl.where(n2 == 2, g2, 0.0)
        + tl.where(n3 == 0, g3, 0.0)
    )
    _store(dx, to + (W + 1) * C, right & below, x3, g, mean, scale, b, along, level)


# Decided by TRITON_INTERPRET when triton is imported: only then can the kernels take CPU tensors.
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
