"""`fastrot warmup`: compile once, at set-up, what the first run would wait for."""

import argparse
import sys
import warnings

from fastrot.commands.base import Command


def _options(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def _run(args: argparse.Namespace) -> None:
    """The turbo decoder (2 s); and, without a GPU, DeepSpeed's host collectives (30 s)."""
    import torch

    from fastrot import machine
    from fastrot.engine.host_collectives import load_host_collectives
    from fastrot.errors import UserError, why_not_there
    from fastrot_kernels.build import BuildError
    from fastrot_kernels.turbo import Turbo

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
        except ModuleNotFoundError as error:
            print(f"setup: {why_not_there(error)}; engine.kind=plain works without", file=sys.stderr)


COMMAND = Command("warmup", "compile at set-up what the first run would wait for", "fastrot warmup", _options, _run)
