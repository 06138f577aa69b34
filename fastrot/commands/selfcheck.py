"""`fastrot selfcheck`: from a bare machine to every figure."""

import argparse
import difflib
import json
import time
from pathlib import Path

from fastrot.commands.base import Command, add_json


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", action="store_true", help="on this machine's GPUs; default: rehearsed small on the CPU"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, in their order (default: all)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all parts; each has a limit of its own")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the evidence's folder (default: results/gpu_NAME_DATE); parts in it stay",
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> None:
    import torch

    from fastrot.errors import Fault, UserError
    from fastrot.selfcheck import report, run
    from fastrot.selfcheck.parts import PARTS

    names = [part.name for part in PARTS]
    for word in args.only or ():
        if word not in names:
            near = difflib.get_close_matches(word, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"parts: {', '.join(names)}"
            raise UserError(f"--only {word}: no such part; {hint}")
    if args.budget is not None and not args.budget > 0:
        raise UserError(f"--budget {args.budget:g}: seconds, above 0")
    if args.gpu and not torch.cuda.is_available():
        raise UserError("--gpu: torch finds no CUDA device; look at nvidia-smi, or rehearse on the CPU without --gpu")
    gpus = [torch.cuda.get_device_name()] if args.gpu else []
    kind = f"gpu_{report.name_of(gpus)}" if args.gpu else "cpu"
    bundle = args.out or Path("results") / f"{kind}_{time.strftime('%Y-%m-%d')}"
    chosen = [part for part in PARTS if not args.only or part.name in args.only]
    outcomes = run.run(chosen, args.gpu, bundle, args.budget)
    said = json.loads((bundle / "verdict.json").read_text())
    print(json.dumps({"bundle": str(bundle), **said}) if args.json else bundle / "report.html", flush=True)
    lines = [f"{one.part}: {why}; open {bundle / one.opens}" for one in outcomes for why in one.failures]
    if lines:
        raise Fault("\n".join(lines))


COMMAND = Command(
    "selfcheck",
    "test and measure everything on this machine, into one folder",
    "fastrot selfcheck --gpu",
    _options,
    _run,
    "Tests, kernels, decoders, the step's switches, the loader, a training: in order of value, each part within its "
    "time and kept as it ends. Writes a JSON a part, report.html, a verdict and the config of the switches that pay.",
)
