"""fastrot: pretrain ResNets by predicting image rotations, fast and exactly; and its loader in a loop of your own.

    manifest = fastrot.open("/data/train")
    with fastrot.Loader(manifest, images=256) as loader:
        for batch in loader:
            ...

Nothing heavy is imported until it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastrot.errors import Fault, UserError

if TYPE_CHECKING:
    from fastrot import probes as probes
    from fastrot import profiling as profiling
    from fastrot.api import extract as extract
    from fastrot.api import load_backbone as load_backbone
    from fastrot.api import open as open
    from fastrot.api import pretrain as pretrain
    from fastrot.data.library import Batch as Batch
    from fastrot.data.library import Loader as Loader
    from fastrot_kernels import rotate_views as rotate_views

__version__ = "0.2.0"
__all__ = [
    "Batch",
    "Fault",
    "Loader",
    "UserError",
    "extract",
    "load_backbone",
    "open",
    "pretrain",
    "probes",
    "profiling",
    "rotate_views",
]

_LIES_IN = {
    "Batch": "fastrot.data.library",
    "Loader": "fastrot.data.library",
    "extract": "fastrot.api",
    "load_backbone": "fastrot.api",
    "open": "fastrot.api",
    "pretrain": "fastrot.api",
    "rotate_views": "fastrot_kernels",
}


def __getattr__(name: str) -> Any:
    if name in ("probes", "profiling"):
        return import_module(f"fastrot.{name}")
    if name not in _LIES_IN:
        raise AttributeError(f"module 'fastrot' has no attribute {name!r}")
    return getattr(import_module(_LIES_IN[name]), name)


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))
