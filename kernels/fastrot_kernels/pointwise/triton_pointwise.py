"""The products in Triton: norm and ReLU as tiles are read, sums as they are written. Every sum is taken in a
fixed order, so results are equal bit for bit from run to run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot_kernels.norm.triton_norm import merge
from fastrot_kernels.pointwise.triton_joined import joined_forward, joined_gradient, normed_gradient
from fastrot_kernels.pointwise.triton_tiles import (
    INTERPRETED,
    dot,
    generation,
    norm_relu,
    precision,
    programs,
    store_through_relu,
    store_with_moments,
    tile,
)

__all__ = [
    "INTERPRETED",
    "data_gradient",
    "forward",
    "joined_forward",
    "joined_gradient",
    "normed_gradient",
    "plain_weight_gradient",
    "weight_gradient",
]


def forward(x: Tensor, weight: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    (rows, inputs), outputs = x.shape, len(weight)
    normed = affine is not None
    how = tile("normed" if normed else "plain", outputs, x.dtype, generation(x))
    y = x.new_empty(rows, outputs)
    parts = x.new_empty(triton.cdiv(rows, how["BM"]), 3, outputs, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not the tensor's
        forward_kernel[(len(parts) * triton.cdiv(outputs, how["BN"]),)](
            x, weight, affine if normed else parts, y, parts, rows, outputs, inputs,
            NORMED=normed, PRECISION=precision(), **how,
        )  # fmt: skip
    return y, merge(parts)


def data_gradient(dy: Tensor, weight: Tensor, x: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    (rows, inputs), outputs, how = x.shape, len(weight), tile("data_gradient", x.shape[1], x.dtype, generation(x))
    g = torch.empty_like(x)
    parts = x.new_empty(triton.cdiv(rows, how["BM"]), 2, inputs, dtype=torch.float32)
    with torch.cuda.device_of(x):
        data_gradient_kernel[(len(parts) * triton.cdiv(inputs, how["BN"]),)](
            dy, weight, x, affine, g, parts, rows, outputs, inputs, PRECISION=precision(), **how
        )
    return g, parts.sum(0)


def weight_gradient(dy: Tensor, x: Tensor, affine: Tensor | None) -> Tensor:
    if affine is None:
        return plain_weight_gradient(dy, x)
    (rows, inputs), outputs, how = x.shape, dy.shape[1], tile("weight_gradient", x.shape[1], x.dtype, generation(x))
    tiles = triton.cdiv(outputs, how["BM"]) * triton.cdiv(inputs, how["BN"])
    steps = triton.cdiv(rows, how["BK"])
    split = triton.cdiv(steps, max(1, min(steps, programs(x) // tiles))) * how["BK"]
    parts = x.new_empty(triton.cdiv(rows, split), outputs, inputs, dtype=torch.float32)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[(len(parts) * tiles,)](
            dy, x, affine, parts, rows, outputs, inputs, split, PRECISION=precision(), **how
        )
    return parts.sum(0)


def plain_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """cuBLAS's: where it splits a sum over many rows it adds the parts in the result's dtype, so that is float32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return dy.float().t() @ x.float()


@triton.jit
def forward_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    affine,  # float32 [4, K], read if NORMED
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
    """One program: a tile of y and its moments; the tiles of a row come one after the other, as they share x."""
    blocks = tl.cdiv(N, BN)
    tile = tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    r = tl.arange(0, BM)
    k = tl.arange(0, BK)
    first = tile * BM
    live = (first + r < M)[:, None]
    # 64 bits for a tile's place, as maps may exceed 2**31 values; 32 within it
    x += first.to(tl.int64) * K
    y += first.to(tl.int64) * N
    # transposed, weight @ x.T: Hopper reads the right factor from shared memory, where what norm and ReLU give is put;
    # as the left one it would stay in registers, and each product wait for the one before
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        some = (start + k < K)[None, :]
        a = tl.load(x + r[:, None] * K + (start + k)[None, :], mask=live & some, other=0.0)
        b = tl.load(weight + n[:, None] * K + (start + k)[None, :], mask=(n < N)[:, None] & some, other=0.0)
        if NORMED:
            a = norm_relu(a, affine, K, start + k)
        total = dot(b, tl.trans(a), total, PRECISION)
    store_with_moments(total, y, parts + tile * 3 * N, live, tl.minimum(BM, M - first), r, n, N)


@triton.jit
def data_gradient_kernel(
    dy,  # [M, N]
    weight,  # [N, K]
    x,  # [M, K]
    affine,  # float32 [4, K]
    g,  # [M, K]
    parts,  # float32 [tiles of rows, 2, K]
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # along K: a tile's columns
    BK: tl.constexpr,  # along N: what the product sums over
):
    """One program: a tile of g and its two sums; the tiles of a row come one after the other, as they share dy."""
    blocks = tl.cdiv(K, BN)
    tile = tl.program_id(0) // blocks
    k = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    r = tl.arange(0, BM)
    n = tl.arange(0, BK)
    first = tile * BM
    live = (first + r < M)[:, None]
    dy += first.to(tl.int64) * N
    x += first.to(tl.int64) * K
    g += first.to(tl.int64) * K
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, N, BK):
        some = start + n < N
        a = tl.load(dy + r[:, None] * N + (start + n)[None, :], mask=live & some[None, :], other=0.0)
        b = tl.load(weight + (start + n)[:, None] * K + k[None, :], mask=some[:, None] & (k < K)[None, :], other=0.0)
        total = dot(a, b, total, PRECISION)
    store_through_relu(total, x, affine, g, parts + tile * 2 * K, live, r, k, K)


@triton.jit
def weight_gradient_kernel(
    dy,  # [M, N]
    x,  # [M, K]
    affine,  # float32 [4, K]
    parts,  # float32 [parts, N, K]
    M,
    N,
    K,
    split,  # rows of a part
    PRECISION: tl.constexpr,
    BM: tl.constexpr,  # along N: a tile's rows
    BN: tl.constexpr,  # along K: its columns
    BK: tl.constexpr,  # along M: what the product sums over
):
    """One program: a tile of one part's gradient; the tiles of a part come one after the other, as they share rows."""
    across = tl.cdiv(K, BN)
    tiles = tl.cdiv(N, BM) * across
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = (tile // across) * BM + tl.arange(0, BM)
    k = (tile % across) * BN + tl.arange(0, BN)
    r = tl.arange(0, BK)
    count = tl.minimum(split, M - part * split)
    dy += part.to(tl.int64) * split * N
    x += part.to(tl.int64) * split * K
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, count, BK):
        live = (start + r < count)[:, None]
        a = tl.load(dy + r[:, None] * N + n[None, :], mask=live & (n < N)[None, :], other=0.0)
        b = tl.load(x + r[:, None] * K + k[None, :], mask=live & (k < K)[None, :], other=0.0)
        total = dot(tl.trans(a), norm_relu(b, affine, K, k), total, PRECISION)
        dy += BK * N
        x += BK * K
    place = parts + part.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(place, total, mask=(n < N)[:, None] & (k < K)[None, :])
