"""The six operations in Triton: each map is read as often as the arithmetic needs and written once; sums are
taken in a fixed order, so results are equal bit for bit from run to run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot_kernels.norm.interface import Norm

# A program holds a tile of so many values: 16 a thread where each is used once, 8 where two sums a value stay in
# registers. Sums are split among at most PROGRAMS: four a multiprocessor of an H100, and few enough for one
# program to merge a channel's partial sums.
VALUES_PER_PROGRAM, VALUES_PER_SUM = 4096, 2048
WARPS = 8
PROGRAMS = 512
# Tiles of a sum at once: one that is summed, others on their way to shared memory; one load a thread leaves memory idle.
STAGES = tl.constexpr(4)


def moments(x: Tensor) -> Tensor:
    (rows, channels), parts, split = x.shape, *_split(x)
    out = x.new_empty(parts, 3, channels, dtype=torch.float32)
    tile = block_shape(channels, VALUES_PER_SUM)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not the tensor's
        moments_kernel[(parts * triton.cdiv(channels, tile["BC"]),)](
            x, out, rows, channels, split, **tile, num_warps=WARPS
        )
    return merge(out)


def merge(parts: Tensor) -> Tensor:
    many, _, channels = parts.shape
    shape = merge_shape(min(many, PROGRAMS))
    groups = triton.cdiv(many, shape["BR"])
    out = parts.new_empty(groups, 3, channels)
    with torch.cuda.device_of(parts):
        merge_kernel[(groups * triton.cdiv(channels, shape["BC"]),)](
            parts, out, many, channels, **shape, num_warps=WARPS
        )
    return out[0] if groups == 1 else merge(out)


def update_running(running_mean: Tensor, running_var: Tensor, moments: Tensor, momentum: float) -> None:
    channels = moments.shape[1]
    with torch.cuda.device_of(moments):
        update_running_kernel[(triton.cdiv(channels, 256),)](
            running_mean, running_var, moments, channels, momentum, BC=256, num_warps=WARPS
        )


def apply(x: Tensor, residual: Tensor | None, norm: Norm) -> Tensor:
    rows, channels = x.shape
    out = torch.empty_like(x)
    added, tile = residual is not None, block_shape(channels)
    with torch.cuda.device_of(x):
        apply_kernel[_tiles(rows, channels)](
            x, residual if added else x, norm.moments, norm.weight, norm.bias, out, rows, channels, norm.eps,
            RELU=norm.relu, RESIDUAL=added, **tile, num_warps=WARPS,
        )  # fmt: skip
    return out


def gradient_sums(dy: Tensor, x: Tensor, y: Tensor | None, norm: Norm) -> Tensor:
    (rows, channels), parts, split = x.shape, *_split(x)
    out = x.new_empty(parts, 2, channels, dtype=torch.float32)
    kept, tile = y is not None, block_shape(channels, VALUES_PER_SUM)
    with torch.cuda.device_of(x):
        gradient_sums_kernel[(parts * triton.cdiv(channels, tile["BC"]),)](
            dy, x, y if kept else x, norm.moments, norm.weight, norm.bias, out, rows, channels, split, norm.eps,
            RELU=norm.relu, KEPT=kept, **tile, num_warps=WARPS,
        )  # fmt: skip
    return out.sum(0)


def gradients(dy: Tensor, x: Tensor, y: Tensor | None, norm: Norm, sums: Tensor) -> tuple[Tensor, Tensor]:
    rows, channels = x.shape
    kept, tile = y is not None, block_shape(channels)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if kept else x.new_empty(0, channels)
    with torch.cuda.device_of(x):
        gradients_kernel[_tiles(rows, channels)](
            dy, x, y if kept else x, norm.moments, norm.weight, norm.bias, sums, dx, dresidual if kept else dx,
            rows, channels, norm.eps, RELU=norm.relu, KEPT=kept, **tile, num_warps=WARPS,
        )  # fmt: skip
    return dx, dresidual


def block_shape(channels: int, values: int = VALUES_PER_PROGRAM) -> dict[str, int]:
    """A tile's rows and channels: at most 128 channels, two memory lines of 16-bit values."""
    width = min(128, triton.next_power_of_2(channels))
    return {"BM": values // width, "BC": width}


def merge_shape(parts: int) -> dict[str, int]:
    """All parts of a few channels at once; eight channels are a sector of memory."""
    return {"BR": triton.next_power_of_2(parts), "BC": 8}


def _split(x: Tensor) -> tuple[int, int]:
    """(parts, rows of each but the last): whole tiles, none empty."""
    rows, channels = x.shape
    tile = block_shape(channels, VALUES_PER_SUM)
    tiles = triton.cdiv(rows, tile["BM"])
    parts = max(1, min(tiles, PROGRAMS // triton.cdiv(channels, tile["BC"])))
    split = triton.cdiv(tiles, parts) * tile["BM"]
    return triton.cdiv(rows, split), split


def _tiles(rows: int, channels: int) -> tuple[int]:
    tile = block_shape(channels)
    return (triton.cdiv(rows, tile["BM"]) * triton.cdiv(channels, tile["BC"]),)


@triton.jit
def moments_kernel(
    x,  # [M, C]
    out,  # float32 [parts, 3, C]
    M,
    C,
    split,  # rows of a part
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: the moments of one part of the rows, in BC channels."""
    blocks = tl.cdiv(C, BC)
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    r = tl.arange(0, BM)
    count = tl.minimum(split, M - part * split)
    # 64 bits for a part's place, as maps may exceed 2**31 values; 32 within a tile
    here = x + part.to(tl.int64) * split * C
    # distances from the part's first row: squares of values far from 0 would cancel
    origin = tl.load(here + c, mask=c < C, other=0.0).to(tl.float32)
    offset = r[:, None] * C + c[None, :]
    sums = tl.zeros((BM, BC), tl.float32)
    squares = tl.zeros((BM, BC), tl.float32)
    for start in tl.range(0, count, BM, num_stages=STAGES):
        inside = (start + r < count)[:, None] & (c < C)[None, :]
        distance = tl.load(here + offset, mask=inside, other=0.0).to(tl.float32) - origin[None, :]
        distance = tl.where(inside, distance, 0.0)
        sums += distance
        squares += distance * distance
        here += BM * C
    mean = tl.sum(sums, 0) / count
    variance = tl.sum(squares, 0) / count - mean * mean
    variance = tl.where(variance < 0, 0.0, variance)
    row = out + part * 3 * C + c
    tl.store(row, tl.zeros((BC,), tl.float32) + count, mask=c < C)
    tl.store(row + C, origin + mean, mask=c < C)
    tl.store(row + 2 * C, variance, mask=c < C)


@triton.jit
def merge_kernel(
    parts,  # float32 [R, 3, C]
    out,  # float32 [groups of BR parts, 3, C]
    R,
    C,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: BC channels of one group's parts. Source: Chan, Golub, LeVeque 1979."""
    blocks = tl.cdiv(C, BC)
    group = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    r = group * BR + tl.arange(0, BR)
    out += group * 3 * C
    inside = (r < R)[:, None] & (c < C)[None, :]
    place = parts + r[:, None] * 3 * C + c[None, :]
    counts = tl.load(place, mask=inside, other=0.0)
    means = tl.load(place + C, mask=inside, other=0.0)
    variances = tl.load(place + 2 * C, mask=inside, other=0.0)
    total = tl.sum(counts, 0)
    share = counts / tl.where(c < C, total, 1.0)[None, :]
    mean = tl.sum(share * means, 0)
    off = means - mean[None, :]
    variance = tl.sum(share * (variances + off * off), 0)
    tl.store(out + c, total, mask=c < C)
    tl.store(out + C + c, mean, mask=c < C)
    tl.store(out + 2 * C + c, variance, mask=c < C)


@triton.jit
def update_running_kernel(
    running_mean,  # float32 [C]
    running_var,  # float32 [C]
    moments,  # float32 [3, C]
    C,
    momentum,
    BC: tl.constexpr,
):
    """One program: BC channels."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    count = tl.load(moments + c, mask=inside, other=2.0)
    mean = tl.load(moments + C + c, mask=inside, other=0.0)
    variance = tl.load(moments + 2 * C + c, mask=inside, other=0.0) * (count / (count - 1))
    old_mean = tl.load(running_mean + c, mask=inside, other=0.0)
    old_var = tl.load(running_var + c, mask=inside, other=0.0)
    tl.store(running_mean + c, old_mean + momentum * (mean - old_mean), mask=inside)
    tl.store(running_var + c, old_var + momentum * (variance - old_var), mask=inside)


@triton.jit
def _constants(moments, weight, bias, C, c, eps):
    """Count, mean, 1 / deviation, weight and bias of channels c."""
    count = tl.load(moments + c, mask=c < C, other=1.0)
    mean = tl.load(moments + C + c, mask=c < C, other=0.0)
    variance = tl.load(moments + 2 * C + c, mask=c < C, other=1.0)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    return count, mean, 1.0 / tl.sqrt_rn(variance + eps), w, b


@triton.jit
def _xhat_and_gradient(dy, x, y, at, inside, mean, rstd, w, b, RELU: tl.constexpr, KEPT: tl.constexpr):
    """The normalised values of a tile, and its gradient before the ReLU. A NaN is not below 0: it passes, as torch's
    does."""
    xhat = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        out = tl.load(y + at, mask=inside, other=0.0) if KEPT else xhat * w[None, :] + b[None, :]
        g = tl.where(out <= 0, 0.0, g)
    return xhat, g


@triton.jit
def apply_kernel(
    x,  # [M, C]
    residual,  # [M, C], read if RESIDUAL
    moments,  # float32 [3, C]
    weight,  # [C]
    bias,  # [C]
    out,  # [M, C]
    M,
    C,
    eps,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: a tile; neighbours in a row of tiles come one after the other."""
    blocks = tl.cdiv(C, BC)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    first = (tl.program_id(0) // blocks) * BM
    r = tl.arange(0, BM)
    inside = (first + r < M)[:, None] & (c < C)[None, :]
    base = first.to(tl.int64) * C
    offset = r[:, None] * C + c[None, :]
    _, mean, rstd, w, b = _constants(moments, weight, bias, C, c, eps)
    values = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
    z = (values - mean[None, :]) * rstd[None, :] * w[None, :] + b[None, :]
    if RESIDUAL:
        z += tl.load(residual + base + offset, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        z = tl.where(z <= 0, 0.0, z)  # a NaN stays one
    tl.store(out + base + offset, z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums_kernel(
    dy,  # [M, C]
    x,  # [M, C]
    y,  # [M, C], read if KEPT
    moments,  # float32 [3, C]
    weight,  # [C]
    bias,  # [C]
    out,  # float32 [parts, 2, C]
    M,
    C,
    split,  # rows of a part
    eps,
    RELU: tl.constexpr,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: the sums of one part of the rows, in BC channels."""
    blocks = tl.cdiv(C, BC)
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    r = tl.arange(0, BM)
    count = tl.minimum(split, M - part * split)
    _, mean, rstd, w, b = _constants(moments, weight, bias, C, c, eps)
    base = part.to(tl.int64) * split * C
    offset = r[:, None] * C + c[None, :]
    along = tl.zeros((BM, BC), tl.float32)
    level = tl.zeros((BM, BC), tl.float32)
    for start in tl.range(0, count, BM, num_stages=STAGES):
        inside = (start + r < count)[:, None] & (c < C)[None, :]
        xhat, g = _xhat_and_gradient(dy, x, y, base + offset, inside, mean, rstd, w, b, RELU, KEPT)
        along += g * xhat
        level += g
        base += BM * C
    row = out + part * 2 * C + c
    tl.store(row, tl.sum(along, 0), mask=c < C)
    tl.store(row + C, tl.sum(level, 0), mask=c < C)


@triton.jit
def gradients_kernel(
    dy,  # [M, C]
    x,  # [M, C]
    y,  # [M, C], read if KEPT
    moments,  # float32 [3, C]
    weight,  # [C]
    bias,  # [C]
    sums,  # float32 [2, C]
    dx,  # [M, C]
    dresidual,  # [M, C], written if KEPT
    M,
    C,
    eps,
    RELU: tl.constexpr,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """One program: a tile."""
    blocks = tl.cdiv(C, BC)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    first = (tl.program_id(0) // blocks) * BM
    r = tl.arange(0, BM)
    inside = (first + r < M)[:, None] & (c < C)[None, :]
    base = first.to(tl.int64) * C
    offset = r[:, None] * C + c[None, :]
    count, mean, rstd, w, b = _constants(moments, weight, bias, C, c, eps)
    along = tl.load(sums + c, mask=c < C, other=0.0) / count
    level = tl.load(sums + C + c, mask=c < C, other=0.0) / count
    xhat, g = _xhat_and_gradient(dy, x, y, base + offset, inside, mean, rstd, w, b, RELU, KEPT)
    z = (g - level[None, :] - xhat * along[None, :]) * (w * rstd)[None, :]
    tl.store(dx + base + offset, z.to(dx.dtype.element_ty), mask=inside)
    if KEPT:
        tl.store(dresidual + base + offset, g.to(dresidual.dtype.element_ty), mask=inside)


# Decided by TRITON_INTERPRET when triton is imported: only then can the kernels take CPU tensors.
INTERPRETED = not isinstance(apply_kernel, triton.JITFunction)
