"""The products that stand where blocks meet, in Triton: a block's result is made as a product reads it, its gradient
goes on to before the ReLU as one writes it, and through the last norm as the next one reads it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot_kernels.norm.triton_norm import merge
from fastrot_kernels.pointwise.triton_tiles import (
    dot,
    generation,
    precision,
    scaled,
    spread,
    store_sums,
    store_through_relu,
    store_with_moments,
    through_relu,
    tile,
)


def joined_forward(
    x: Tensor, weight: Tensor, affine: Tensor, residual: Tensor, residual_affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, inputs), outputs, how = x.shape, len(weight), tile("joined_forward", len(weight), x.dtype, generation(x))
    joined, mask = torch.empty_like(x), x.new_empty(rows, triton.cdiv(inputs, 8), dtype=torch.uint8)
    y = x.new_empty(rows, outputs)
    parts = x.new_empty(triton.cdiv(rows, how["BM"]), 3, outputs, dtype=torch.float32)
    normed = residual_affine is not None
    with torch.cuda.device_of(x):
        joined_forward_kernel[(len(parts) * triton.cdiv(outputs, how["BN"]),)](
            x, weight, affine, residual, residual_affine if normed else affine, joined, mask, y, parts,
            rows, outputs, inputs, NORMED=normed, PRECISION=precision(), **how,
        )  # fmt: skip
    return joined, mask, y, merge(parts)


def joined_gradient(
    dy: Tensor,
    weight: Tensor,
    xs: list[Tensor],
    affines: list[Tensor],
    mask: Tensor,
    added: Tensor,
    height: int,
    width: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    (x, *others), (affine, *other_affines), outputs = xs, affines, len(weight)
    (rows, inputs), how = x.shape, tile("joined_gradient", x.shape[1], x.dtype, generation(x))
    g = torch.empty_like(x)
    parts = x.new_empty(triton.cdiv(rows, how["BM"]), len(xs), 2, inputs, dtype=torch.float32)
    with torch.cuda.device_of(x):
        joined_gradient_kernel[(len(parts) * triton.cdiv(inputs, how["BN"]),)](
            dy, weight, x, affine, *(others or [x]), *(other_affines or [affine]), mask, added, g, parts,
            rows, outputs, inputs, height, width, NORMS=len(xs), STRIDE=stride, PRECISION=precision(), **how,
        )  # fmt: skip
    return g, parts.sum(0)


def normed_gradient(
    g: Tensor, weight: Tensor, y: Tensor, backward: Tensor, x: Tensor | None, affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, outputs), inputs = g.shape, weight.shape[1]
    how, normed = tile("normed_gradient", inputs, g.dtype, generation(g)), x is not None
    dy, gx = torch.empty_like(g), g.new_empty(rows, inputs)
    tiles = triton.cdiv(rows, how["BM"])
    parts = g.new_empty(tiles, 2 if normed else 0, inputs, dtype=torch.float32)
    with torch.cuda.device_of(g):
        normed_gradient_kernel[(tiles * triton.cdiv(inputs, how["BN"]),)](
            g, weight, y, backward, x if normed else gx, affine if normed else backward, dy, gx, parts,
            rows, outputs, inputs, NORMED=normed, PRECISION=precision(), **how,
        )  # fmt: skip
    return dy, gx, parts.sum(0)


@triton.jit
def joined_forward_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    affine,  # float32 [4, K]
    residual,  # [M, K]
    residual_affine,  # float32 [4, K], read if NORMED
    joined,  # [M, K]
    mask,  # uint8 [M, K / 8 or the next whole number]
    y,  # [M, N]
    parts,  # float32 [tiles of rows, 3, N]
    M,
    N,
    K,
    NORMED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: a tile of y and its moments; the first of a row's tiles writes what all of them multiply."""
    blocks = tl.cdiv(N, BN)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    n = block * BN + tl.arange(0, BN)
    r = tl.arange(0, BM)
    k = tl.arange(0, BK)
    byte = tl.arange(0, BK // 8)
    bytes = tl.cdiv(K, 8)
    first = tile * BM
    live = (first + r < M)[:, None]
    x += first.to(tl.int64) * K
    residual += first.to(tl.int64) * K
    joined += first.to(tl.int64) * K
    mask += first.to(tl.int64) * bytes
    y += first.to(tl.int64) * N
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        some = (start + k < K)[None, :]
        place = r[:, None] * K + (start + k)[None, :]
        a = tl.load(x + place, mask=live & some, other=0.0)
        e = tl.load(residual + place, mask=live & some, other=0.0)
        b = tl.load(weight + n[:, None] * K + (start + k)[None, :], mask=(n < N)[:, None] & some, other=0.0)
        z = scaled(a, affine, K, start + k)
        z += scaled(e, residual_affine, K, start + k) if NORMED else e.to(tl.float32)
        z = through_relu(z).to(a.dtype)
        tl.store(joined + place, z, mask=live & some & (block == 0))
        at = mask + r[:, None] * bytes + (start // 8 + byte)[None, :]
        tl.store(at, _bytes_of(z, BM, BK), mask=live & (start // 8 + byte < bytes)[None, :] & (block == 0))
        total = dot(b, tl.trans(z), total, PRECISION)
    store_with_moments(total, y, parts + tile * 3 * N, live, tl.minimum(BM, M - first), r, n, N)


@triton.jit
def joined_gradient_kernel(
    dy,  # [M, N]
    weight,  # [N, K]
    x,  # [M, K]
    affine,  # float32 [4, K]
    other,  # [M, K], read if NORMS is 2
    other_affine,  # float32 [4, K], read if NORMS is 2
    mask,  # uint8 [M, K / 8 or the next whole number]
    added,  # [M, K], or of every STRIDE-th row and column of the maps
    g,  # [M, K]
    parts,  # float32 [tiles of rows, NORMS, 2, K]
    M,
    N,
    K,
    height,  # of the maps
    width,
    NORMS: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # along K: a tile's columns
    BK: tl.constexpr,  # along N: what the product sums over
):
    """One program: a tile of g and its sums; the tiles of a row come one after the other, as they share dy."""
    blocks = tl.cdiv(K, BN)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    k = block * BN + tl.arange(0, BN)
    r = tl.arange(0, BM)
    n = tl.arange(0, BK)
    first = tile * BM
    live = (first + r < M)[:, None]
    inside = live & (k < K)[None, :]
    place = r[:, None] * K + k[None, :]
    dy += first.to(tl.int64) * N
    # on their way while the product runs
    seen = tl.load(x + first.to(tl.int64) * K + place, mask=inside, other=0.0)
    through = _bits(mask, first + r, block, M, K, BN)
    total = _added(added, first + r, k, M, K, height, width, STRIDE)
    for start in range(0, N, BK):
        some = start + n < N
        a = tl.load(dy + r[:, None] * N + (start + n)[None, :], mask=live & some[None, :], other=0.0)
        b = tl.load(weight + (start + n)[:, None] * K + k[None, :], mask=some[:, None] & (k < K)[None, :], other=0.0)
        total = dot(a, b, total, PRECISION)
    g += first.to(tl.int64) * K
    stored = spread(total.to(g.dtype.element_ty), g + place, live & (k < 0)[None, :])
    stored = tl.where(through, stored, 0.0)
    tl.store(g + place, stored, mask=inside)
    # rows past the end have neither dy nor what is added, so their g is 0
    value, sums = stored.to(tl.float32), parts + tile * NORMS * 2 * K
    store_sums(value, seen, affine, sums, k, K)
    if NORMS == 2:
        seen = tl.load(other + first.to(tl.int64) * K + place, mask=inside, other=0.0)
        store_sums(value, seen, other_affine, sums + 2 * K, k, K)


@triton.jit
def normed_gradient_kernel(
    g,  # [M, N]
    weight,  # [N, K]
    y,  # [M, N]
    backward,  # float32 [4, N]
    x,  # [M, K], read if NORMED
    affine,  # float32 [4, K], read if NORMED
    dy,  # [M, N]
    gx,  # [M, K]
    parts,  # float32 [tiles of rows, 2, K], written if NORMED
    M,
    N,
    K,
    NORMED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # along K: a tile's columns
    BK: tl.constexpr,  # along N: what the product sums over
):
    """One program: a tile of gx and its two sums; the first of a row's tiles writes what all of them multiply."""
    blocks = tl.cdiv(K, BN)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    k = block * BN + tl.arange(0, BN)
    r = tl.arange(0, BM)
    n = tl.arange(0, BK)
    first = tile * BM
    live = (first + r < M)[:, None]
    g += first.to(tl.int64) * N
    y += first.to(tl.int64) * N
    dy += first.to(tl.int64) * N
    x += first.to(tl.int64) * K
    gx += first.to(tl.int64) * K
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, N, BK):
        c = start + n
        inside = live & (c < N)[None, :]
        place = r[:, None] * N + c[None, :]
        a = tl.load(g + place, mask=inside, other=0.0)
        e = tl.load(y + place, mask=inside, other=0.0)
        b = tl.load(weight + c[:, None] * K + k[None, :], mask=(c < N)[:, None] & (k < K)[None, :], other=0.0)
        # mean, slope along y, level
        z = scaled(e, backward, N, c)
        z += a.to(tl.float32) * tl.load(backward + N + c, mask=c < N, other=0.0)[None, :]
        z = z.to(a.dtype)
        tl.store(dy + place, z, mask=inside & (block == 0))
        total = dot(tl.trans(b), tl.trans(z), total, PRECISION)
    if NORMED:
        store_through_relu(tl.trans(total), x, affine, gx, parts + tile * 2 * K, live, r, k, K)
    else:
        tl.store(
            gx + r[:, None] * K + k[None, :], tl.trans(total).to(gx.dtype.element_ty), mask=live & (k < K)[None, :]
        )


@triton.jit
def _added(added, row, k, M, K, height, width, STRIDE: tl.constexpr):
    """Rows and channels of what is added, float32; rows between strides have none."""
    live = row < M
    if STRIDE > 1:
        column, line = row % width, row // width
        live &= (column % STRIDE == 0) & (line % height % STRIDE == 0)
        line = line // height * tl.cdiv(height, STRIDE) + line % height // STRIDE
        row = line * tl.cdiv(width, STRIDE) + column // STRIDE
    place = added + row.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(place, mask=live[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _bits(mask, row, block, M, K, BN: tl.constexpr):
    """Whether a mask lets through, of rows and a block of BN channels."""
    byte = block * (BN // 8) + tl.arange(0, BN // 8)
    bytes = tl.cdiv(K, 8)
    place = mask + row.to(tl.int64)[:, None] * bytes + byte[None, :]
    some = tl.load(place, mask=(row < M)[:, None] & (byte < bytes)[None, :], other=0).to(tl.int32)
    return tl.reshape((some[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (row.shape[0], BN)) != 0


@triton.jit
def _bytes_of(tile, BM: tl.constexpr, BK: tl.constexpr):
    """Where a tile [BM, BK] that went through a ReLU is not 0, a bit a value: [BM, BK / 8]."""
    through = (tile.to(tl.float32) != 0).to(tl.int32)
    bits = tl.reshape(through, (BM, BK // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, 2).to(tl.uint8)
