"""Rotated views in one pass: each source byte is read once, each output value written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrot_kernels.layout import Crops, channels_first

# A program holds 32 x 32 pixels of 4 channels, 16 values a thread: twice as many per thread spill
# registers where C' is not a power of two (tests/kernels/test_triton_compile.py).
VALUES_PER_PROGRAM = 4096
WARPS = 8


def obstacle(device: torch.device) -> str:
    """Why this backend cannot run on such a device; empty if it can."""
    if device.type == "cuda" or INTERPRETED:
        return ""
    return f"tensors are on {device.type}, not CUDA, and TRITON_INTERPRET=1 was not set"


def rotate_views(crops: Crops) -> Tensor:
    """As `reference.rotate_views`, within 1 ulp of dtype."""
    x, flips, turns, mean, std, _, channels = crops
    n, side = x.shape[:2]
    if side * side * channels >= 2**31:
        raise ValueError(f"a view of {side} x {side} x {channels} exceeds 2**31 values; use reference")
    out = crops.empty_views()
    shape = block_shape(channels)
    programs = n * triton.cdiv(side, shape["TILE"]) ** 2
    if programs:
        with torch.cuda.device_of(x):  # Triton launches on the current device, not the tensor's
            rotate_views_kernel[(programs,)](
                x.contiguous(),
                flips.contiguous(),
                turns.contiguous(),
                mean.contiguous(),
                std.contiguous(),
                out,
                side,
                C=x.shape[3],
                V=turns.shape[1],
                **shape,
                num_warps=WARPS,
            )
    return channels_first(out)


def block_shape(channels: int) -> dict[str, int]:
    """The kernel's compile-time sizes for C' output channels."""
    width = triton.next_power_of_2(channels)
    tile = 32
    while tile > 1 and tile * tile * width > VALUES_PER_PROGRAM:
        tile //= 2
    return {"CO": channels, "WIDTH": width, "TILE": tile}


@triton.jit
def rotate_views_kernel(
    x,  # uint8 [n, S, S, C]
    flips,  # uint8 [n]
    turns,  # uint8 [n, V]
    mean,  # float32 [C]
    std,  # float32 [C]
    out,  # dtype [n, V, S, S, CO]
    S,
    C: tl.constexpr,
    V: tl.constexpr,
    CO: tl.constexpr,
    WIDTH: tl.constexpr,  # CO, rounded up to a power of two
    TILE: tl.constexpr,
):
    """One program: a TILE x TILE tile of one flipped image, into all V views of it."""
    tiles = tl.cdiv(S, TILE)
    program = tl.program_id(0)
    tile = program % (tiles * tiles)
    # 64 bits for the image's place, as a batch of views may exceed 2**31 values; 32 within a view,
    # as an address a value in 64 bits would spill registers.
    image = (program // (tiles * tiles)).to(tl.int64)
    pixels_per_view = S * S

    # r, f: row and column in the flipped image; the source's column is f, or its mirror.
    r = (tile // tiles) * TILE + tl.arange(0, TILE)
    f = (tile % tiles) * TILE + tl.arange(0, TILE)
    c = tl.arange(0, WIDTH)[None, None, :]
    column = tl.where(tl.load(flips + image) != 0, S - 1 - f, f)

    is_source = (r < S)[:, None, None] & (f < S)[None, :, None] & (c < C)
    offset = (r[:, None, None] * S + column[None, :, None]) * C + c
    pixels = tl.load(x + image * pixels_per_view * C + offset, mask=is_source, other=0)

    # div_rn: plain `/` is Triton's approximate division, which the reference is not.
    means = tl.load(mean + c, mask=c < C, other=0.0)
    stds = tl.load(std + c, mask=c < C, other=1.0)
    values = tl.div_rn(pixels.to(tl.float32) - means, stds)
    values = tl.where(c < C, values, 0.0).to(out.dtype.element_ty)

    # An odd turn writes the transposed tile, so that the block's second axis always runs along
    # an output row and neighbouring threads write neighbouring pixels.
    transposed = tl.permute(values, (1, 0, 2))
    is_inside = (r < S)[:, None, None] & (f < S)[None, :, None] & (c < CO)
    is_inside_transposed = (f < S)[:, None, None] & (r < S)[None, :, None] & (c < CO)
    for v in range(V):
        turn = tl.load(turns + image * V + v) & 3
        view = out + (image * V + v) * pixels_per_view * CO
        if turn % 2 == 0:
            i = tl.where(turn == 0, r, S - 1 - r)
            j = tl.where(turn == 0, f, S - 1 - f)
            offset = (i[:, None, None] * S + j[None, :, None]) * CO + c
            tl.store(view + offset, values, mask=is_inside)
        else:
            i = tl.where(turn == 1, S - 1 - f, f)
            j = tl.where(turn == 1, r, S - 1 - r)
            offset = (i[:, None, None] * S + j[None, :, None]) * CO + c
            tl.store(view + offset, transposed, mask=is_inside_transposed)


# Decided by TRITON_INTERPRET when triton is imported: only then can the kernel take CPU tensors.
INTERPRETED = not isinstance(rotate_views_kernel, triton.JITFunction)
