"""The norm's Triton kernels compile for each GPU generation, without a GPU, spill nothing, and move 16 bytes at a time."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrot_kernels.norm import triton_norm

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
WHOLE = triton_norm.block_shape(256)
SUMS = triton_norm.block_shape(256, triton_norm.VALUES_PER_SUM)
# kernel, its compile-time values, most registers: 65,536 / (256 threads * the blocks meant to be resident)
KERNELS = [
    ("moments_kernel", SUMS, 64),
    ("merge_kernel", triton_norm.merge_shape(triton_norm.PROGRAMS), 128),
    ("update_running_kernel", {"BC": 256}, 64),
    ("apply_kernel", {"RELU": False, "RESIDUAL": False, **WHOLE}, 64),
    ("apply_kernel", {"RELU": True, "RESIDUAL": True, **WHOLE}, 64),
    ("gradient_sums_kernel", {"RELU": True, "KEPT": False, **SUMS}, 84),
    ("gradient_sums_kernel", {"RELU": True, "KEPT": True, **SUMS}, 84),
    ("gradients_kernel", {"RELU": True, "KEPT": False, **WHOLE}, 84),
    ("gradients_kernel", {"RELU": True, "KEPT": True, **WHOLE}, 84),
]
SLOW = [
    pytest.param(*each, marks=pytest.mark.slow) for each in [(80, "bf16"), (90, "fp32"), (100, "fp32"), (100, "bf16")]
]
GENERATIONS = [(80, "fp32"), (90, "bf16"), *SLOW]
MAPS = {"x", "dy", "y", "residual", "dx", "dresidual"}
NUMBERS = {"M": "i32", "C": "i32", "R": "i32", "split": "i32", "eps": "fp32", "momentum": "fp32"}


def kernel_names(name):
    return set(getattr(triton_norm, name).arg_names)


def compiled(name, dtype, capability, constants):
    kernel = getattr(triton_norm, name)
    maps = MAPS | ({"out"} if name == "apply_kernel" else set())
    pointers = {n: f"*{dtype if n in maps else 'fp32'}" for n in kernel.arg_names if n not in NUMBERS | constants}
    signature = {n: pointers.get(n) or NUMBERS.get(n, "constexpr") for n in kernel.arg_names}
    # what a launch finds out by itself: torch aligns its memory, and the network's channels divide by 16
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in {*pointers, "C"}}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_norm.WARPS})


@pytest.mark.skipif(triton_norm.INTERPRETED, reason="TRITON_INTERPRET is set: nothing to compile")
@pytest.mark.parametrize("name, constants, most", KERNELS)
@pytest.mark.parametrize("capability, dtype", GENERATIONS)
def test_it_compiles_without_spills(tmp_path, monkeypatch, capability, dtype, name, constants, most):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compile, do not find
    kernel = compiled(name, dtype, capability, constants)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    assert 0 < resources["REG"] <= most and resources["STACK"] == resources["LOCAL"] == 0, usage

    ptx = kernel.asm["ptx"]
    loads, stores = set(re.findall(r"ld\.global\S*", ptx)), set(re.findall(r"st\.global\S*", ptx))
    if name not in ("merge_kernel", "update_running_kernel"):
        assert loads == {"ld.global.v4.b32"}
    if "split" in kernel_names(name):
        tensors = len(MAPS & kernel_names(name)) - (constants.get("KEPT") is False)
        assert set(re.findall(r"cp\.async\.c[ag]\.shared\.global.*, (0x\w+)", ptx)) == {"0x10"}
        # groups of loads, one a tensor, that may be under way while a tile is summed: two tiles more
        assert max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx))) == 2 * tensors
        programs = 65_536 // 256 // most if dtype == "bf16" else 2
        assert kernel.metadata.shared * programs <= 164 * 1024, "an A100's"
    if name in ("apply_kernel", "gradients_kernel"):
        assert stores == {"st.global.v4.b32"}
