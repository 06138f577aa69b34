"""DeepSpeed's host collectives, compiled into our cache: half a minute, once a machine.

DeepSpeed would compile them at its start, behind a lock file that outlives a killed process, in the folder that they
are loaded from. Here they are found ready when it asks.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastrot.errors import UserError
from fastrot_kernels.build import BuildError, make

_DOING = "compiling DeepSpeed's host collectives (C++, about 30 s)"


def load_host_collectives() -> None:
    """What `deepspeed.initialize` loads where there is no GPU. Raises UserError where it cannot be compiled."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    target = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / f"deepspeed-{deepspeed.__version__}" / builder.name
    try:
        make(target, _DOING, partial(_compile, builder), partial(_loads, builder))
    except (BuildError, RuntimeError, OSError, ImportError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"engine.kind deepspeed: its host collectives cannot be compiled ({line}); install g++ and ninja, or set "
            "engine.kind=plain"
        ) from None


@contextmanager
def without_shared_memory() -> Iterator[None]:
    """DeepSpeed takes 66 MB of /dev/shm a rank for all-reduces of inference where LOCAL_SIZE says that all ranks are here,
    and never gives them back."""
    kept = os.environ.pop("LOCAL_SIZE", None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ["LOCAL_SIZE"] = kept


def _compile(builder: Any, scratch: Path) -> None:
    """Compile and load into a folder of our own, where the lock of torch's builder finds no other's."""
    scratch.mkdir()
    kept = os.environ["TORCH_EXTENSIONS_DIR"]
    os.environ["TORCH_EXTENSIONS_DIR"] = str(scratch)
    try:
        builder.load(verbose=False)
    finally:
        os.environ["TORCH_EXTENSIONS_DIR"] = kept
    for path in (scratch / builder.name).iterdir():
        path.rename(scratch / path.name)


def _loads(builder: Any, folder: Path) -> bool:
    """Whether the compiled module loads; DeepSpeed, which asks the builder for it, then finds it there."""
    spec = importlib.util.spec_from_file_location(builder.name, folder / f"{builder.name}.so")
    assert spec and spec.loader
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError):
        return False
    builder._loaded_ops[builder.name] = module
    return True
