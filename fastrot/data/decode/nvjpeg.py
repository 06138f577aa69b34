"""The nvJPEG under DALI's `mixed`: which library it will be, what it can, what its hardware decoder is told."""

import ctypes
import functools
import logging
from importlib.metadata import PackageNotFoundError, files
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

HARDWARE_LOAD = 0.99

# Below this nvImageCodec sends windows whose chroma is to be filtered to the CPU: their edges would be wrong.
_FILTERS_WINDOWS = (13, 2)
_SONAME = "libnvjpeg.so.13"
_MAJOR, _MINOR = 0, 1  # library_types.h

# What the hardware decoder sets memory aside for at most: NVIDIA's own hints for ImageNet, in DALI's ResNet-50 example.
_MOST_HEIGHT, _MOST_WIDTH = 6430, 5980


class Hardware(NamedTuple):
    """The GPU's hardware JPEG decoder: its share of the JPEGs, and the largest height and width there are (0: not known).

    What it leaves costs the step multiprocessors and the host its cores, so by default it takes all but one in a hundred.
    """

    load: float | None = None
    height: int = 0
    width: int = 0

    def options(self) -> dict[str, Any]:
        """Of DALI's decoders. The sizes spare it allocations while the step runs, which wait for the device."""
        return {
            "hw_decoder_load": HARDWARE_LOAD if self.load is None else self.load,
            "preallocate_height_hint": min(self.height, _MOST_HEIGHT),
            "preallocate_width_hint": min(self.width, _MOST_WIDTH),
        }


UNKNOWN = Hardware()


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
