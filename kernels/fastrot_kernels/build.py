"""Sources -> a compiled file in the cache, made when first needed, then found there."""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-pthread")
_log = logging.getLogger(__name__)


class BuildError(Exception):
    """A library cannot be made here; the message says in a line what is missing."""


def library(folder: Path, name: str, links: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile all of `folder`/*.c into one library and load it; calls into it release the GIL.

    links  libraries to link with, without `lib`; flags: of the compiler, beside the usual.
    The compiled file lies under FASTROT_CACHE (default: the user's XDG cache), by the hash of what it is made of: the
    sources, the compiler and its version, the machine and its C library. One that cannot be loaded is made anew.
    Raises BuildError where there is no compiler or a header or library is missing.
    """
    sources = sorted(folder.glob("*.c"))
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise BuildError("there is no C compiler; install gcc, or set CC")
    command = [compiler, *_FLAGS, *flags]
    made_of = hashlib.sha256(repr((command, links, _run([compiler, "--version"]), *machine())).encode())
    for file in sorted(folder.glob("*.[ch]")):
        made_of.update(file.read_bytes())
    target = cache_folder() / f"{name}-{made_of.hexdigest()[:16]}.so"
    libraries = [f"-l{link}" for link in links]

    def build(scratch: Path) -> None:
        _run([*command, *map(str, sources), *libraries, "-lm", "-o", str(scratch)])

    make(target, f"compiling {name} (C, a few seconds)", build, _loads)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"{target} cannot be loaded, though newly made ({error})") from None


def _loads(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def cache_folder() -> Path:
    """Where compiled kernels and their timings lie."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTROT_CACHE") or Path(home) / "fastrot") / "kernels"


def machine() -> tuple[str, str]:
    """What a compiled file runs on: the processor's kind and the C library. For the names of a shared cache."""
    return platform.machine(), os.confstr("CS_GNU_LIBC_VERSION") or ""


def _run(command: list[str]) -> str:
    """A compiler's standard output. Raises BuildError with its first complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started ({error.strerror})") from None
    if done.returncode:
        wrong = [line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line]
        raise BuildError(f"{command[0]} failed: {(wrong or done.stderr.splitlines() or ['no word'])[0]}")
    return done.stdout


def make(
    target: Path,
    doing: str,
    build: Callable[[Path], object],
    sound: Callable[[Path], bool] = lambda target: True,
) -> None:
    """See to it that the file or folder `target` exists: build(scratch) makes it, in one process at a time.

    doing  what, and about how long it takes, for the line that says so before it begins.
    sound  whether what is found can be used; it is made anew otherwise.
    The lock dies with its process, killed or not; a process that waits says for whom. What a killed one left
    is removed. Where the file system knows no locks each makes its own, and one of them stays: nothing half-made
    ever bears the name. Raises BuildError where it cannot be written, and what build raises.
    """
    if target.exists() and sound(target):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise BuildError(f"{target} cannot be made ({error})") from None
    try:
        if _lock(handle, doing):
            for left in target.parent.glob(f".{target.name}-*"):
                _remove(left)
        if target.exists() and sound(target):  # another made it meanwhile
            return
        _remove(target)
        _log.warning("%s", doing)
        with _replacing(target) as scratch:
            build(scratch)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _lock(handle: int, doing: str) -> bool:
    """Wait for an open lock file and write our name into it; False where the file system has no locks."""
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            _log.warning("waiting for %s: %s", holder, doing)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        _log.warning("the cache cannot be locked (%s), so others may be %s too", error.strerror, doing)
        return False
    os.truncate(handle, 0)
    os.pwrite(handle, f"host {socket.gethostname()}, process {os.getpid()}".encode(), 0)
    return True


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A scratch file or folder that becomes `target` at the end, or goes. Raises BuildError where it cannot be."""
    scratch = target.with_name(f".{target.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        yield scratch
        if scratch.is_file():
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
        scratch.rename(target)
    except OSError as error:
        if not target.is_dir():  # another's, where there are no locks: as good
            raise BuildError(f"{target} cannot be made ({error})") from None
    finally:
        _remove(scratch)
