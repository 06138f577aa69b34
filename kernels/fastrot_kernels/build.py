"""Sources -> a compiled file in the cache, made when first needed, then found there."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-pthread")


class BuildError(Exception):
    """A library cannot be made here; the message says in a line what is missing."""


def library(folder: Path, name: str, links: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile all of `folder`/*.c into one library and load it; calls into it release the GIL.

    links  libraries to link with, without `lib`; flags: of the compiler, beside the usual.
    The compiled file lies under FASTROT_CACHE (default: the user's XDG cache), by the hash of what it is made of.
    Raises BuildError where there is no compiler or a header or library is missing.
    """
    sources = sorted(folder.glob("*.c"))
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise BuildError("there is no C compiler; install gcc, or set CC")
    command = [compiler, *_FLAGS, *flags]
    made_of = hashlib.sha256(repr((command, links, platform.machine())).encode())
    for file in sorted(folder.glob("*.[ch]")):
        made_of.update(file.read_bytes())
    target = cache_folder() / f"{name}-{made_of.hexdigest()[:16]}.so"
    if not target.exists():
        _compile([*command, *map(str, sources), *(f"-l{link}" for link in links), "-lm"], target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"{target} cannot be loaded ({error}); remove it") from None


def cache_folder() -> Path:
    """Where compiled kernels and their timings lie."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTROT_CACHE") or Path(home) / "fastrot") / "kernels"


def _compile(command: list[str], target: Path) -> None:
    with replacing(target) as scratch:
        done = subprocess.run([*command, "-o", str(scratch)], capture_output=True, text=True, check=False)
        if done.returncode:
            wrong = [line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line]
            raise BuildError(f"{command[0]} failed: {(wrong or done.stderr.splitlines() or ['no word'])[0]}")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A scratch file that becomes `target` at the end: ranks that make it at once each replace it by the same.

    Raises BuildError where it cannot be written.
    """
    scratch = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        scratch.rename(target)
    except OSError as error:
        raise BuildError(f"{target} cannot be made ({error})") from None
