"""The Triton kernel compiles for each GPU generation, without a GPU, and spills no register."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrot_kernels import triton_views

FORMATS = [(3, 3, 4), (3, 4, 4), (4, 8, 1)]  # channels in and out, views
# a Latin square: any two of generation, dtype and format together; the rest of their product is slow
CASES = [
    pytest.param(capability, dtype, *FORMATS[k], marks=[] if k == (i + j) % 3 else pytest.mark.slow)
    for i, capability in enumerate([80, 90, 100])
    for j, dtype in enumerate(["fp32", "fp16", "bf16"])
    for k in range(3)
]
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def compiled(dtype, capability, in_channels, channels, views):
    kernel = triton_views.rotate_views_kernel
    constants = {"C": in_channels, "V": views} | triton_views.block_shape(channels)
    pointers = {
        "x": "*u8",
        "flips": "*u8",
        "turns": "*u8",
        "mean": "*fp32",
        "std": "*fp32",
        "out": f"*{dtype}",
    }
    signature = pointers | {"S": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    # What a launch finds out by itself: torch aligns its memory to 16 bytes.
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": triton_views.WARPS})


@pytest.mark.skipif(triton_views.INTERPRETED, reason="TRITON_INTERPRET is set: nothing to compile")
@pytest.mark.parametrize("capability, dtype, in_channels, channels, views", CASES)
def test_it_compiles_without_spills(tmp_path, monkeypatch, capability, dtype, in_channels, channels, views):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compile, do not find
    kernel = compiled(dtype, capability, in_channels, channels, views)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    assert resources["REG"] > 0 and resources["STACK"] == resources["LOCAL"] == 0, usage

    if channels % 4 == 0:  # whole pixels, not single values, leave for memory
        assert not re.search(r"st\.global\.b(16|32)", kernel.asm["ptx"])
