"""The three products in Triton: norm and ReLU as tiles are read, sums as they are written. Every sum is taken in a
fixed order, so results are equal bit for bit from run to run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot_kernels.norm.triton_norm import merge

# Tiles of 16-bit values: 128 rows fill both of Hopper's warp groups, 64 values along the sum are a 128-byte line.
ROWS, COLUMNS, ALONG = 128, 128, 64
# Products of float32 without TF32 run on the plain units, where a tile must be small to stay in registers.
PLAIN = {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2}

# Decided by TRITON_INTERPRET when triton is imported: only then can the kernels take CPU tensors.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def forward(x: Tensor, weight: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    (rows, inputs), outputs = x.shape, len(weight)
    normed = affine is not None
    how = tile("normed" if normed else "plain", outputs, x.dtype, _capability(x))
    y = x.new_empty(rows, outputs)
    parts = x.new_empty(triton.cdiv(rows, how["BM"]), 3, outputs, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not the tensor's
        forward_kernel[(len(parts) * triton.cdiv(outputs, how["BN"]),)](
            x, weight, affine if normed else parts, y, parts, rows, outputs, inputs,
            NORMED=normed, PRECISION=precision(), **how,
        )  # fmt: skip
    return y, merge(parts)


def data_gradient(dy: Tensor, weight: Tensor, x: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    (rows, inputs), outputs, how = x.shape, len(weight), tile("data_gradient", x.shape[1], x.dtype, _capability(x))
    g = torch.empty_like(x)
    parts = x.new_empty(triton.cdiv(rows, how["BM"]), 2, inputs, dtype=torch.float32)
    with torch.cuda.device_of(x):
        data_gradient_kernel[(len(parts) * triton.cdiv(inputs, how["BN"]),)](
            dy, weight, x, affine, g, parts, rows, outputs, inputs, PRECISION=precision(), **how
        )
    return g, parts.sum(0)


def joined_gradient(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    moments: Tensor,
    eps: float,
    mask: Tensor,
    added: Tensor,
    height: int,
    width: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    (rows, inputs), outputs, how = x.shape, len(weight), tile("joined_gradient", x.shape[1], x.dtype, _capability(x))
    g = torch.empty_like(x)
    parts = x.new_empty(triton.cdiv(rows, how["BM"]), 2, inputs, dtype=torch.float32)
    with torch.cuda.device_of(x):
        joined_gradient_kernel[(len(parts) * triton.cdiv(inputs, how["BN"]),)](
            dy, weight, x, moments, mask, added, g, parts, rows, outputs, inputs, height, width, eps,
            STRIDE=stride, PRECISION=precision(), **how,
        )  # fmt: skip
    return g, parts.sum(0)


def weight_gradient(dy: Tensor, x: Tensor, affine: Tensor | None) -> Tensor:
    if affine is None:
        return plain_weight_gradient(dy, x)
    (rows, inputs), outputs, how = x.shape, dy.shape[1], tile("weight_gradient", x.shape[1], x.dtype, _capability(x))
    tiles = triton.cdiv(outputs, how["BM"]) * triton.cdiv(inputs, how["BN"])
    steps = triton.cdiv(rows, how["BK"])
    split = triton.cdiv(steps, max(1, min(steps, _programs(x) // tiles))) * how["BK"]
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


def tile(kernel: str, columns: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """How a kernel's product with so many columns is cut, by how many warps, and how many steps ahead it loads.

    kernel      plain or normed (of forward), data_gradient, joined_gradient, weight_gradient.
    capability  the GPU's generation: 8 Ampere, 9 Hopper.
    Such that nothing spills, and where it can be, two programs share a multiprocessor.
    """
    joined = kernel == "joined_gradient"
    if dtype == torch.float32 and precision() == "ieee":
        return PLAIN | ({"BN": 32} if joined else {})
    # joined: four maps pass by a product that is short, so small tiles, and many loads under way
    low, narrow = dtype != torch.float32, joined or columns <= COLUMNS // 2
    shape = {"BM": ROWS, "BN": COLUMNS // 2 if narrow else COLUMNS, "BK": ALONG if low else ALONG // 2}
    # Ampere's products hold their operands in registers too: two programs of eight warps would spill
    twice = low and (joined or (not narrow and capability >= 9 and kernel != "data_gradient"))
    stages = 2 if not low or (twice and kernel == "normed") else 3
    how = {"num_warps": 4 if low and narrow and not joined else 8, "num_stages": stages}
    return shape | how | ({"maxnreg": 128} if twice else {})


def precision() -> str:
    """Of products of float32: that of torch's convolutions, in whose place these stand."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def _capability(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


def _programs(x: Tensor) -> int:
    """So many run at once: two a multiprocessor."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


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
            a = _normed(a, affine, K, start + k)
        total = _dot(b, tl.trans(a), total, PRECISION)
    place = r[:, None] * N + n[None, :]
    stored = _spread(tl.trans(total).to(y.dtype.element_ty), y + place, live & (n < 0)[None, :])
    tl.store(y + place, stored, mask=live & (n < N)[None, :])
    # around the tile's own mean: squares of values far from 0 would cancel
    value = stored.to(tl.float32)
    count = tl.minimum(BM, M - first)
    mean = tl.sum(tl.where(live, value, 0.0), 0) / count
    distance = tl.where(live, value - mean[None, :], 0.0)
    row = parts + tile * 3 * N + n
    tl.store(row, tl.zeros((BN,), tl.float32) + count, mask=n < N)
    tl.store(row + N, mean, mask=n < N)
    tl.store(row + 2 * N, tl.sum(distance * distance, 0) / count, mask=n < N)


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
        total = _dot(a, b, total, PRECISION)
    inside = live & (k < K)[None, :]
    place = r[:, None] * K + k[None, :]
    mean, scale, shift = _constants(affine, K, k)
    rstd = tl.load(affine + K + k, mask=k < K, other=0.0)
    distance = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    value = _spread(total.to(g.dtype.element_ty), g + place, live & (k < 0)[None, :]).to(tl.float32)
    stored = tl.where(distance * scale[None, :] + shift[None, :] <= 0, 0.0, value).to(g.dtype.element_ty)
    tl.store(g + place, stored, mask=inside)
    # rows past the end have no dy, so their g is 0
    value = stored.to(tl.float32)
    row = parts + tile * 2 * K + k
    tl.store(row, tl.sum(value * distance, 0) * rstd, mask=k < K)
    tl.store(row + K, tl.sum(value, 0), mask=k < K)


@triton.jit
def joined_gradient_kernel(
    dy,  # [M, N]
    weight,  # [N, K]
    x,  # [M, K]
    moments,  # float32 [3, K]
    mask,  # uint8 [M, K / 8 or the next whole number]
    added,  # [M, K], or of every STRIDE-th row and column of the maps
    g,  # [M, K]
    parts,  # float32 [tiles of rows, 2, K]
    M,
    N,
    K,
    height,  # of the maps
    width,
    eps,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # along K: a tile's columns
    BK: tl.constexpr,  # along N: what the product sums over
):
    """One program: a tile of g and its two sums; the tiles of a row come one after the other, as they share dy."""
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
        total = _dot(a, b, total, PRECISION)
    g += first.to(tl.int64) * K
    stored = _spread(total.to(g.dtype.element_ty), g + place, live & (k < 0)[None, :])
    stored = tl.where(through, stored, 0.0)
    tl.store(g + place, stored, mask=inside)
    mean = tl.load(moments + K + k, mask=k < K, other=0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.load(moments + 2 * K + k, mask=k < K, other=1.0) + eps)
    # rows past the end have neither dy nor what is added, so their g is 0
    value = stored.to(tl.float32)
    row = parts + tile * 2 * K + k
    tl.store(row, tl.sum(value * (seen.to(tl.float32) - mean[None, :]), 0) * rstd, mask=k < K)
    tl.store(row + K, tl.sum(value, 0), mask=k < K)


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
        total = _dot(tl.trans(a), _normed(b, affine, K, k), total, PRECISION)
        dy += BK * N
        x += BK * K
    place = parts + part.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(place, total, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # Triton 3.6's interpreter multiplies bfloat16 as the integers of its bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


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
def _spread(tile, place, nowhere):
    """The tile, spread over threads as memory is, not as a product leaves it: each thread then sums its part of a
    column by itself, where it would shuffle five times as often. The load, of nothing, is there for its layout."""
    return tl.where(nowhere, tl.load(place, mask=nowhere, other=0.0), tile)


@triton.jit
def _constants(affine, C, c):
    """Mean, scale and shift of channels c."""
    mean = tl.load(affine + c, mask=c < C, other=0.0)
    scale = tl.load(affine + 2 * C + c, mask=c < C, other=0.0)
    return mean, scale, tl.load(affine + 3 * C + c, mask=c < C, other=0.0)


@triton.jit
def _normed(tile, affine, C, c):
    """relu(norm(tile)) of channels c, of the tile's dtype. A NaN is not below 0: it passes, as torch's does."""
    mean, scale, shift = _constants(affine, C, c)
    z = (tile.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
    return tl.where(z <= 0, 0.0, z).to(tile.dtype)
