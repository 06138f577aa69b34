"""The doors: hand over, and say what went wrong."""

import argparse
import json
import os
import sys
import time
import warnings

from fastrot.errors import Fault, UserError
from fastrot.options import parse

_OTHERS_WAIT_S = 5  # launchers end the other ranks within two


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 2 the user's error, 3 a fault, 130 Ctrl-C."""
    args = parse(argv)
    try:
        return _run(args)
    except (UserError, Fault) as error:
        _complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        goes_on = (
            "; --resume auto goes on from the last checkpoint"
            if args.command in ("train", "linear", "finetune")
            else ""
        )
        _complain(f"stopped by Ctrl-C{goes_on}")
        return 130


def _complain(error: UserError | Fault | str) -> None:
    """The error's lines. What all ranks found alike rank 0 says; the others wait, and speak only
    where no launcher has ended them by then: the error was theirs alone. A fault is said at once."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not isinstance(error, Fault):
        time.sleep(_OTHERS_WAIT_S)
    who = "fastrot" if rank == "0" else f"fastrot: rank {rank}"
    for line in str(error).splitlines():
        print(f"{who}: {line}", file=sys.stderr, flush=True)


def _run(args: argparse.Namespace) -> int:
    if args.command == "linear":
        begins = (args.checkpoint, args.random_init, args.features)
        if sum(one is not None for one in begins) != 1:
            raise UserError("name either --checkpoint C or --random-init SEED, or --features TRAIN with --test TEST")
    if args.command == "linear" and args.features is not None:
        return _run_linear_on_features(args)
    if args.command in ("svm", "lowshot", "knn"):
        return _run_probe(args)
    if args.command == "export":
        return _run_export(args)
    from fastrot import config as configs

    overrides = args.overrides + ([f"data.decode={args.decode}"] if getattr(args, "decode", None) else [])
    config, sources = configs.load(args.config, overrides)
    warnings.filterwarnings("ignore", module=r"torch\..*|deepspeed\..*")

    if args.command == "pack":  # one process and its workers, no ranks
        result = _pack(args, config)
        if args.json:
            print(json.dumps(result), flush=True)
        return 0

    from fastrot import distributed

    ranks = distributed.start()
    try:
        with distributed.lost_peer_is_a_fault(ranks):
            result = _hand_over(args, config, sources, ranks)
    except UserError:
        distributed.end()
        raise  # after a Fault the other ranks sit in a collective: leaving the group would wait for them
    if args.json and ranks.first:
        print(json.dumps(result), flush=True)
    distributed.end()
    return 0


def _pack(args, config) -> dict:
    from fastrot.data.encode import Encoding
    from fastrot.data.pack import pack

    encoding = Encoding(args.mode, args.quality, args.max_side, args.raw_share)
    return pack(args.source, args.out, encoding, args.workers, config.data)


def _run_export(args: argparse.Namespace) -> int:
    from fastrot.models.export import export

    result = export(args.checkpoint, args.to, args.out)
    if args.json:
        print(json.dumps(result), flush=True)
    return 0


def _run_linear_on_features(args: argparse.Namespace) -> int:
    from fastrot.report import probing

    if args.test is None:
        raise UserError("--features: name the store to judge by, --test TEST")
    run = probing.PROBES["linear"]
    result = probing.run(run, args.features, args.test, args.layers, args.out, args.device, epochs=args.epochs)
    if args.json:
        print(json.dumps(result), flush=True)
    return 0


def _run_probe(args: argparse.Namespace) -> int:
    from fastrot.report import probing

    options = dict(vars(args))
    command, as_json = options.pop("command"), options.pop("json")
    if "k" in options:
        options["ks"] = options.pop("k")
    result = probing.run(probing.PROBES[command], **options)
    if as_json:
        print(json.dumps(result), flush=True)
    return 0


def _hand_over(args, config, sources, ranks) -> dict:
    if args.command == "stream":
        from fastrot.runs.stream import stream

        result = stream(config, ranks, args.first_step, args.steps, args.ranks, args.pixels)
        if not args.json:
            for name in ("sha256", "pixels_sha256"):
                if name in result:
                    print(f"{name} {result[name]}")
        return result
    if args.command == "index":
        from fastrot.data.contents import describe_source

        return describe_source(args.source or config.data.train, config, ranks, args.verify)
    if args.command == "features":
        from fastrot.features import extract

        taps = extract.parse_taps(args.taps)
        request = extract.Request(
            args.data,
            args.out,
            args.checkpoint,
            args.random_init,
            taps,
            args.pool,
            args.transform,
            args.dtype,
            args.passes,
        )
        return extract.dump(request, config, ranks)
    if args.command == "linear":
        from fastrot.runs.heads import train_heads

        return train_heads(args.checkpoint, args.random_init, config, ranks, args.resume)
    if args.command == "finetune":
        from fastrot.runs.finetune import fine_tune

        return fine_tune(args.checkpoint, args.random_init, config, ranks, args.resume)
    if args.command == "page":
        from fastrot.report.page import build

        return build(args.checkpoint, args.suite, args.out, config, ranks)
    if args.command == "tune":
        from fastrot.runs.tune import tune

        return tune(config, ranks, args.seconds)
    from fastrot.runs.dry_run import dry_run
    from fastrot.runs.run import train

    if args.dry_run:
        return dry_run(config, sources, ranks, args.deepspeed_config)
    return train(config, ranks, args.resume, args.resume_anyway, args.deepspeed_config)


def entry(argv: list[str] | None = None) -> None:
    """Run a command and leave. At once after a fault, since a stuck reader would hold up the exit; and under a
    launcher, where a library's thread that outlives the interpreter may abort a rank whose work is done."""
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == Fault.exit_code or "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
