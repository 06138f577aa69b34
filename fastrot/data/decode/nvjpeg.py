"""The nvJPEG under DALI's `mixed`: which library it will be, and whether it filters chroma inside windows."""

import ctypes
import functools
import logging
from importlib.metadata import PackageNotFoundError, files

log = logging.getLogger(__name__)

# Below this nvImageCodec sends windows whose chroma is to be filtered to the CPU: their edges would be wrong.
_FILTERS_WINDOWS = (13, 2)
_SONAME = "libnvjpeg.so.13"
_MAJOR, _MINOR = 0, 1  # library_types.h


@functools.cache
def filters_windows() -> bool:
    """Whether windows keep to the GPU with libjpeg-turbo's chroma filter; says so where they would not.

    To be asked before DALI loads nvJPEG by name: it then takes the one loaded here, the wheel's, whatever the
    container's library path finds first.
    """
    try:
        found = version(ctypes.CDLL(_path(), ctypes.RTLD_GLOBAL))
    except OSError as error:
        log.warning("nvJPEG cannot be loaded (%s): DALI decodes as it can", error)
        return True
    if found >= _FILTERS_WINDOWS:
        return True
    log.warning(
        "nvJPEG %d.%d is older than %d.%d: chroma is not filtered, or windows would be decoded on the CPU; "
        "pip install --upgrade nvidia-nvjpeg",
        *found,
        *_FILTERS_WINDOWS,
    )
    return False


def version(library: ctypes.CDLL) -> tuple[int, int]:
    """Major and minor."""
    parts = ctypes.c_int(), ctypes.c_int()
    for kind, part in zip((_MAJOR, _MINOR), parts, strict=True):
        library.nvjpegGetProperty(kind, ctypes.byref(part))
    return parts[0].value, parts[1].value


def _path() -> str:
    """The wheel's library; without that wheel, the one that the system finds by name."""
    try:
        ours = [file for file in files("nvidia-nvjpeg") or [] if file.name == _SONAME]
    except PackageNotFoundError:
        ours = []
    return str(ours[0].locate()) if ours else _SONAME
