"""The CUDA kernels without a GPU: their index arithmetic on the host, and their machine code read."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton.backends.nvidia
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrot_kernels import cuda_views, reference
from fastrot_kernels.layout import Crops, channels_first
from fastrot_kernels.nvrtc import cubin

HERE = Path(__file__).parent
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
DTYPES = (torch.float32, torch.bfloat16)
# one generation; the others and another compiler are slow
COMPILED = [
    pytest.param(compiler, name, marks=[] if (compiler, name) == ("nvrtc", "sm_90") else pytest.mark.slow)
    for compiler in ("nvrtc", "nvcc")
    for name in ("sm_80", "sm_90", "sm_100")
]
KINDS = ("3_chunks", "4_chunks", "3_values", "4_values", "any")


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    """The device functions of views/tile.h in a host library, with checks of bounds and alignment."""
    target = tmp_path_factory.mktemp("host") / "rotate_host.so"
    flags = ["-O0", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan"]
    source = [f"-I{cuda_views.SOURCE.parent}", str(HERE / "rotate_host.cpp"), "-o", str(target)]
    subprocess.run(["g++", *flags, *checks, *source], check=True)
    return ctypes.CDLL(str(target))


def on_host(host, crops, aligned=True):
    """As `cuda_views.rotate_views`, and by the kernel that it would launch."""
    x, flips, turns, mean, std, dtype, channels = crops
    out = crops.empty_views().view(torch.uint8).fill_(255).view(dtype)  # NaN where not written
    n, side, _, in_channels = x.shape
    pointers = (t.data_ptr() for t in (x, flips, turns, mean, std, out))
    batch = cuda_views.Batch(*pointers, n, side, turns.shape[1], in_channels, channels)
    getattr(host, cuda_views.kernel_name(side, in_channels, channels, dtype, aligned))(ctypes.byref(batch))
    return channels_first(out)


def case(n, side, views, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(0, high, shape, dtype=torch.uint8, generator=generator)  # noqa: E731
    mean, std = torch.linspace(99, 123, channels), torch.linspace(57, 61, channels)
    return draw(256, n, side, side, channels), draw(3, n), draw(8, n, views), mean, std


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("side", [1, 2, 5, 16, 31, 32, 33, 48, 64, 75, 80, 96])
def test_each_flip_and_turn_is_the_reference_s(host, side, channels, dtype):
    x, _, _, mean, std = case(2, side, 4, seed=side)
    turns = torch.arange(4, dtype=torch.uint8).repeat(2, 1)
    crops = Crops(x, torch.tensor([0, 1], dtype=torch.uint8), turns, mean, std, dtype, channels)
    assert torch.equal(on_host(host, crops), reference.rotate_views(crops))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 100), st.integers(1, 4), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_any_size_any_views_any_channels(host, n, side, views, dtype, aligned, data):
    in_channels = data.draw(st.sampled_from([3, 3, 3, 1, 4, 5]))
    channels = in_channels + data.draw(st.integers(0, 2))
    crops = Crops(*case(n, side, views, in_channels, seed=side), dtype, channels)
    assert torch.equal(on_host(host, crops, aligned), reference.rotate_views(crops))


def test_sides_of_whole_chunks_take_the_wide_kernel_and_others_do_not():
    names = [cuda_views.kernel_name(side, 3, 3, torch.bfloat16, True) for side in (224, 96, 64, 16, 100, 225)]
    assert names == ["bfloat16_3_chunks"] * 4 + ["bfloat16_3_values"] * 2
    assert cuda_views.kernel_name(224, 3, 4, torch.float16, False) == "float16_4_values"
    assert cuda_views.kernel_name(224, 1, 1, torch.float32, True) == "float32_any"


def nvcc_cubin(source: Path, architecture: str, target: Path) -> bytes:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    subprocess.run(["nvcc", "-O3", "-std=c++17", f"-arch={architecture}", "-cubin", source, "-o", target], check=True)
    return target.read_bytes()


@pytest.mark.parametrize("compiler, architecture", COMPILED)
def test_the_machine_code_moves_16_bytes_an_access_and_spills_nothing(tmp_path, compiler, architecture):
    file = tmp_path / "rotate.cubin"
    if compiler == "nvrtc":
        file.write_bytes(cubin(cuda_views.SOURCE, architecture))
    else:
        nvcc_cubin(cuda_views.SOURCE, architecture, file)

    def dump(what):
        return subprocess.run([CUOBJDUMP, what, file], capture_output=True, text=True, check=True).stdout

    usage = re.findall(r"Function (\w+):\s*(.*)", dump("-res-usage"))
    assert {name for name, _ in usage} >= {f"{t}_{k}" for t in ("float32", "float16", "bfloat16") for k in KINDS}
    for name, line in usage:
        spent = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        blocks = 3 if name.startswith("float32") or name.endswith("values") else 4  # as in rotate.cu
        assert spent["STACK"] == spent["LOCAL"] == 0, (name, line)
        assert 0 < spent["REG"] * cuda_views.THREADS * blocks <= 65536, (name, line)
        assert spent["SHARED"] <= 48 * 1024, (name, line)

    for body in re.split(r"Function : ", dump("-sass"))[1:]:
        name = body.split()[0]
        assert not re.search(r"\b(LDL|STL)\b", body), name
        if name.endswith("chunks"):
            widths = {word: {int(w) for w in re.findall(rf"\b{word}\.E\.(\d+)\b", body)} for word in ("LDG", "STG")}
            assert widths == {"LDG": {128}, "STG": {128}}, (name, widths)
            assert len(re.findall(r"\bSTG\b", body)) == len(re.findall(r"\bSTG\.E\.128\b", body)), name
