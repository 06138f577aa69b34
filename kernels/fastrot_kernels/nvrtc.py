"""CUDA source -> machine code, by the compiler library that comes with torch: no toolkit is needed."""

import ctypes
import functools
import hashlib
from pathlib import Path

import torch

from fastrot_kernels.build import BuildError, cache_folder, make


def cubin(source: Path, architecture: str) -> bytes:
    """`source` compiled for one GPU architecture, as in sm_90; includes are looked for beside it.

    Kept in the cache by the hash of the source, its headers and the compiler's version.
    Raises BuildError where there is no compiler library, or with its first complaint.
    """
    compiler, version = _compiler()
    made_of = hashlib.sha256(repr((version, architecture)).encode())
    for file in (source, *sorted(source.parent.glob("*.h"))):
        made_of.update(file.read_bytes())
    target = cache_folder() / f"{source.stem}-{architecture}-{made_of.hexdigest()[:16]}.cubin"
    make(
        target,
        f"compiling {source.name} for {architecture} (about a second)",
        lambda scratch: scratch.write_bytes(_compiled(compiler, source, architecture)),
        lambda made: made.read_bytes().startswith(b"\x7fELF"),
    )
    return target.read_bytes()


@functools.cache
def _compiler() -> tuple[ctypes.CDLL, str]:
    if not torch.version.cuda:
        raise BuildError("this torch is not built for CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    wheels = Path(torch.__file__).parent.parent / "nvidia"
    for path in (name, *map(str, sorted(wheels.glob(f"*/lib/{name}")))):
        try:
            compiler = ctypes.CDLL(path)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        compiler.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return compiler, f"{major.value}.{minor.value}"
    raise BuildError(f"{name} was not found; it comes with torch's CUDA packages")


def _compiled(compiler: ctypes.CDLL, source: Path, architecture: str) -> bytes:
    program = ctypes.c_void_p()
    text, name = source.read_bytes(), str(source).encode()
    options = [f"--gpu-architecture={architecture}", "--std=c++17", f"--include-path={source.parent}"]
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _must(compiler, compiler.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
    try:
        if compiler.nvrtcCompileProgram(program, len(options), words):
            said = _read(compiler, program, "ProgramLog").decode(errors="replace").splitlines()
            raise BuildError(f"nvrtc: {next((line for line in said if 'error' in line), 'no word')}")
        return _read(compiler, program, "CUBIN")
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _read(compiler: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _must(compiler, getattr(compiler, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _must(compiler, getattr(compiler, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _must(compiler: ctypes.CDLL, status: int) -> None:
    if status:
        compiler.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise BuildError(f"nvrtc: {compiler.nvrtcGetErrorString(status).decode()}")
