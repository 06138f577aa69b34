"""`fastrot warmup`: compile once, at set-up, what the first run would wait for."""

import argparse
import contextlib
import io
import sys
import warnings

from fastrot.commands.base import Command


def _options(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def _run(args: argparse.Namespace) -> None:
    """The turbo decoder (2 s); and, without a GPU, DeepSpeed's host collectives (30 s)."""
    import torch

    from fastrot_kernels.build import BuildError
    from fastrot_kernels.turbo import Turbo

    try:
        Turbo(1).close()
    except BuildError as error:
        print(f"setup: the turbo decoder did not compile ({error}); data.decode=dali works without", file=sys.stderr)
    if not torch.cuda.is_available():
        _compile_collectives()


def _compile_collectives() -> None:
    from fastrot import distributed

    distributed.start()
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    except (RuntimeError, OSError, ImportError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(
            f"setup: DeepSpeed's host collectives did not compile ({line}); engine.kind=plain works without",
            file=sys.stderr,
        )
    finally:
        distributed.end()


COMMAND = Command("warmup", "compile at set-up what the first run would wait for", "fastrot warmup", _options, _run)
