"""python -m fastrot.commands.warmup: compile once, at set-up, what the first run would wait for."""

import sys
import warnings

import torch

from fastrot import machine
from fastrot.engine.host_collectives import load_host_collectives
from fastrot.errors import UserError
from fastrot_kernels.build import BuildError
from fastrot_kernels.turbo import Turbo


def main() -> None:
    """The turbo decoder (2 s); and, without a GPU, DeepSpeed's host collectives (30 s)."""
    try:
        Turbo(1).close()
    except BuildError as error:
        print(f"setup: the turbo decoder did not compile ({error}); data.decode=dali works without", file=sys.stderr)
    if not torch.cuda.is_available():
        machine.set_caches()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_host_collectives()
        except UserError as error:
            print(f"setup: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
