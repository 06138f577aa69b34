"""python -m fastrot.warmup: compile once, at set-up, what the first run would wait for."""

import contextlib
import io
import sys
import warnings

import torch

from fastrot import distributed


def main() -> None:
    """Without a GPU, DeepSpeed compiles its host collectives when a process group starts (30 s)."""
    if torch.cuda.is_available():
        return
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


if __name__ == "__main__":
    main()
