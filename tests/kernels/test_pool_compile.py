"""The pool's Triton kernels compile for each GPU generation, without a GPU: no spills, 16 bytes an access, and every load
of a map on its way before a value is computed."""

import pytest
import triton
from test_pointwise_compile import machine_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrot_kernels.pool import triton_pool

MAPS = {"x", "y", "peaks", "dy", "dx"}
NUMBERS = {"N": "i32", "H": "i32", "W": "i32", "C": "i32", "eps": "fp32"}
# loads and stores of maps [16 bytes, 8 bytes: of winners], a thread's eight values
ACCESSES = {"forward_kernel": ((9, 0), (2, 1)), "gradient_kernel": ((8, 4), (4, 0))}
CONSTANTS = {"forward_kernel": 4 * 2, "gradient_kernel": 7 * 2}  # loads of eight float32 a channel's number


def compiled(name, capability):
    kernel, constants = getattr(triton_pool, name), triton_pool.block_shape(64, triton_pool.VALUES_PER_PROGRAM)
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(MAPS, "*bf16") | {"winners": "*u8"} | NUMBERS
    signature = {n: types[n] for n in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    # what a launch finds out by itself: torch aligns its memory, and the network's channels divide by 16
    aligned = [n for n, kind in signature.items() if n == "C" or kind.startswith("*")]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_pool.WARPS})


@pytest.mark.skipif(triton_pool.INTERPRETED, reason="TRITON_INTERPRET is set: nothing to compile")
@pytest.mark.parametrize("name", ACCESSES)
@pytest.mark.parametrize("capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))])
def test_it_compiles_without_spills(tmp_path, monkeypatch, capability, name):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compile, do not find
    kernel = compiled(name, capability)
    resources, instructions = machine_code(tmp_path, kernel)
    assert resources["STACK"] == resources["LOCAL"] == kernel.metadata.shared == 0, resources
    assert 3 * resources["REG"] * 32 * triton_pool.WARPS <= 65536, "three programs share a multiprocessor"
    memory = [op for op in instructions if op.startswith(("LDG", "STG"))]
    loads, stores = ([op for op in memory if op.startswith(kind)] for kind in ("LDG", "STG"))
    assert memory == loads + stores, "no load waits for a store"
    (wide, narrow), written = ACCESSES[name]
    read = tuple(sum(op.endswith(width) for op in loads) for width in (".128", ".64"))
    assert read == (wide + CONSTANTS[name], narrow) and len(loads) == sum(read)
    assert tuple(sum(op.endswith(width) for op in stores) for width in (".128", ".64")) == written
    assert len(stores) == sum(written)
