"""The products' Triton kernels compile for each GPU generation, without a GPU: on tensor cores, without spills, 16 bytes
an access, and with columns summed within threads."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrot_kernels.pointwise import triton_joined, triton_pointwise, triton_tiles

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
KERNELS = [
    ("forward_kernel", {"NORMED": False}),
    ("forward_kernel", {"NORMED": True}),
    ("joined_forward_kernel", {"NORMED": False}),
    ("joined_forward_kernel", {"NORMED": True}),
    ("data_gradient_kernel", {}),
    ("joined_gradient_kernel", {"NORMS": 1, "STRIDE": 1}),
    ("joined_gradient_kernel", {"NORMS": 2, "STRIDE": 1}),
    ("joined_gradient_kernel", {"NORMS": 1, "STRIDE": 2}),
    ("normed_gradient_kernel", {"NORMED": False}),
    ("normed_gradient_kernel", {"NORMED": True}),
    ("weight_gradient_kernel", {}),
]
# each kernel once, on the one or the other; the rest is slow, such as a twin without norms
QUICK = {
    (80, "bf16", 64): (4, 10),
    (90, "bf16", 256): (1, 3, 5, 7, 9),
}
PRODUCTS = [
    pytest.param(*chip, *kernel, marks=[] if number in QUICK.get(chip, ()) else pytest.mark.slow)
    for number, kernel in enumerate(KERNELS)
    for capability in (80, 90, 100)
    for product in [("bf16", 64), ("bf16", 256), ("tf32", 64), ("tf32", 256), ("ieee", 64)]
    for chip in [(capability, *product)]
]
MAPS = {"x", "weight", "dy", "y", "g", "added", "residual", "joined", "other", "gx"}
NUMBERS = dict.fromkeys(("M", "N", "K", "split", "height", "width"), "i32")
# Of a multiprocessor, and what a launch keeps of it; bytes. Source: CUDA C++ Programming Guide, compute capabilities.
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def compiled(name, dtype, capability, constants, how):
    kernel = getattr(triton_joined if hasattr(triton_joined, name) else triton_pointwise, name)
    kinds = dict.fromkeys(MAPS, dtype) | {"mask": "u8"}
    pointers = {n: f"*{kinds.get(n, 'fp32')}" for n in kernel.arg_names if n not in NUMBERS | constants}
    signature = {n: pointers.get(n) or NUMBERS.get(n, "constexpr") for n in kernel.arg_names}
    # what a launch finds out by itself: torch aligns its memory, and the network's channels divide by 16
    aligned = [n for n in (*pointers, "N", "K", "split") if n in kernel.arg_names]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)


def machine_code(folder, kernel) -> tuple[dict[str, int], list[str]]:
    """(registers, stack and local bytes a thread; the instructions)."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage, code = (
        subprocess.run([TOOLS / tool, *flags, cubin], capture_output=True, text=True, check=True).stdout
        for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return resources, re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", code, re.M)


@pytest.mark.skipif(bool(triton_tiles.INTERPRETED), reason="TRITON_INTERPRET is set: nothing to compile")
@pytest.mark.parametrize("capability, precision, columns, name, constants", PRODUCTS)
def test_it_compiles_without_spills(tmp_path, monkeypatch, capability, precision, columns, name, constants):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compile, do not find
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision != "ieee")
    low = precision == "bf16"
    kind = name.removesuffix("_kernel")
    kind = {False: "plain", True: "normed"}[constants["NORMED"]] if kind == "forward" else kind
    how = triton_tiles.tile(kind, columns, torch.bfloat16 if low else torch.float32, capability // 10)
    options = {key: value for key, value in how.items() if key not in ("BM", "BN", "BK")}
    constants = {"PRECISION": triton_tiles.precision(), **constants} | {key: how[key] for key in ("BM", "BN", "BK")}
    kernel = compiled(name, "bf16" if low else "fp32", capability, constants, options)
    resources, instructions = machine_code(tmp_path, kernel)
    assert resources["LOCAL"] == 0 and not [op for op in instructions if op.startswith(("LDL", "STL"))], resources
    # so many share a multiprocessor
    small = columns == 64 or kind == "joined_gradient"
    resident = 2 if low and (small or (kind not in ("data_gradient", "normed_gradient") and capability >= 90)) else 1
    assert resident * resources["REG"] * 32 * options["num_warps"] <= 65536
    assert resident * (kernel.metadata.shared + 1024) <= SHARED_MEMORY[capability]
    products = {op.split(".")[0] for op in instructions} & set(TENSOR_CORES.values())
    assert products == ({TENSOR_CORES[capability]} if precision != "ieee" else set())
    # Hopper's run one after another where each waits for the one before
    if capability == 90 and precision == "bf16":
        assert sum(op.startswith("WARPGROUP.DEPBAR") for op in instructions) <= 2
    if low:
        maps = [op for op in instructions if op.startswith(("LDGSTS.", "STG."))]
        narrow = [op for op in maps if not op.endswith("128")]
        # but sums, and a mask's bytes, each of eight values that one thread holds
        bytes = [op for op in narrow if op.endswith("U8")]
        sums = 3 if "forward" in name else 2 * constants.get("NORMS", constants.get("NORMED", "weight" not in name))
        assert maps and len(narrow) - len(bytes) == sums and bool(bytes) == (name == "joined_forward_kernel")
        assert sum(op.startswith("SHFL") for op in instructions) <= 66
