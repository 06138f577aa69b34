"""`fastrot launch`: a training as the file that a cluster's system takes."""

import argparse
import re

from fastrot.commands.base import Command, Result, add_config


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, metavar="SYSTEM", help="slurm, k8s, skypilot, dstack or hostfile")
    parser.add_argument(
        "--nodes", required=True, metavar="N|A,B", help="how many nodes; or, for a hostfile, their names"
    )
    parser.add_argument("--gpus", required=True, metavar="[KIND:]G", help="GPUs of a node; 0: a rank on its CPU")
    parser.add_argument("--hours", type=float, metavar="H", help="time limit (default: the system's own)")
    parser.add_argument("--image", default="", metavar="NAME", help="container; .sif: Apptainer's (default: none)")
    parser.add_argument("--out", metavar="FILE", help="write it there (default: standard output)")
    add_config(parser, "data", "rotation", "model", "optim", "engine", "run")


def _run(args: argparse.Namespace) -> Result | None:
    from pathlib import Path

    from fastrot import terminal
    from fastrot.clusters import SYSTEMS, Start
    from fastrot.config import as_overrides, load
    from fastrot.errors import UserError
    from fastrot.files import write_text
    from fastrot.runs.arithmetic import arithmetic

    if args.to not in SYSTEMS:
        raise UserError(f"--to {args.to}: no such system; choose {', '.join(SYSTEMS)}")
    if args.hours is not None and not 0 < args.hours < 10_000:
        raise UserError(f"--hours {args.hours}: expected hours above 0")
    config, sources = load(args.config, args.overrides, "train")
    if not config.data.train:
        raise UserError("data.train is not set; name the images as the nodes see them, as in data.train=/data/train")
    gpu, gpus = _gpus(args.gpus)
    words = as_overrides(config, sources)
    start = Start(name_of(Path(config.run.out).name), _nodes(args.nodes), gpus, gpu, args.hours, words, args.image)
    arithmetic(config, start.ranks, start.ranks)
    text = SYSTEMS[args.to].render(start)
    if args.out is None and not args.json:
        print(text, end="")
        return None
    if args.out is not None:
        try:
            write_text(Path(args.out), text)
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from None
        terminal.console().print(f"{SYSTEMS[args.to].submit} {args.out}", soft_wrap=True, markup=False)
    return {"to": args.to, "ranks": start.ranks, "out": args.out, "text": text}


def name_of(folder: str) -> str:
    """A job's name, which every system takes."""
    return re.sub("[^a-z0-9]+", "-", f"fastrot-{folder.lower()}")[:40].strip("-")


def _nodes(text: str) -> tuple[str, ...]:
    """Names, or as many empty ones. Raises UserError."""
    from fastrot.errors import UserError

    names = ("",) * int(text) if text.isdecimal() else tuple(text.split(","))
    if not names or (names[0] and not all(re.fullmatch(r"[\w.-]+", name) for name in names)):
        raise UserError(f"--nodes {text}: expected a number of 1 or more, or names of hosts, as in gpu1,gpu2")
    return names


def _gpus(text: str) -> tuple[str, int]:
    """ "H100:8" -> (H100, 8). Raises UserError."""
    from fastrot.errors import UserError

    found = re.fullmatch(r"(?:([\w.-]+):)?(\d{1,4})", text)
    if not found:
        raise UserError(f"--gpus {text}: expected a number, or a kind and a number, as in H100:8")
    return found[1] or "", int(found[2])


COMMAND = Command(
    "launch",
    "write a training as the file that Slurm, Kubernetes, SkyPilot, dstack or deepspeed takes",
    "fastrot launch --to slurm --nodes 4 --gpus 8 --hours 24 --config configs/in1k.yaml data.train=/data/train "
    "--out train.sbatch",
    _options,
    _run,
    "Render one training, its config and what the command line overrides, as a file that a cluster's system takes.",
)
