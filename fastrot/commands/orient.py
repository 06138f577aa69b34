"""`fastrot orient`: which way is up in each image of a source."""

import argparse
import time
from pathlib import Path

from fastrot.commands.base import IMAGES, NETWORK, Command, Result, add_json
from fastrot.errors import UserError

_SHOWN = 20  # files that were not turned, in the table


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="SOURCE", help=IMAGES)
    parser.add_argument(
        "--checkpoint",
        metavar="RUN|FILE.onnx",
        help=NETWORK,
    )
    parser.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="write the answers there, one line of JSON an image, and a contact sheet beside it, FILE.html "
        "(default: nothing is written, the table alone is printed)",
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        metavar="P",
        help="leave images undecided that are less sure than this (default: the network's own threshold)",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="SOURCE is held-out images that are upright: find how far a run's answers can be believed, and from which "
        "probability on they count; kept in the run's folder, orientation.json and calibration.html",
    )
    parser.add_argument("--without-up", metavar="SOURCE", help="--calibrate: pictures that have no up")
    parser.add_argument(
        "--also", metavar="SOURCE", help="--calibrate: upright images of another kind, judged by what was chosen"
    )
    parser.add_argument(
        "--apply",
        metavar="copy:DIR|exif|lossless",
        help="put decided images upright: copies of all images into DIR, without loss; or the files themselves, by the EXIF tag "
        "alone or by their pixels without loss, which both need --in-place",
    )
    parser.add_argument(
        "--in-place", action="store_true", help="let --apply change SOURCE; originals are kept beside the journal"
    )
    parser.add_argument(
        "--trim", action="store_true", help="let --apply cut JPEGs whose sides are no whole blocks, where it must"
    )
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="where --apply notes what it does, outside SOURCE (default: FOLDER.orient-journal.jsonl beside what is written)",
    )
    parser.add_argument(
        "--undo", type=Path, metavar="JOURNAL", help="give back every byte that --apply changed; no SOURCE"
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    if args.undo:
        from fastrot import terminal
        from fastrot.orient.journal import undo

        undone = undo(args.undo)
        terminal.table("undone", [(key.replace("_", " "), str(value)) for key, value in undone.items()])
        return undone
    if args.source is None or args.checkpoint is None:
        raise UserError("fastrot orient: name SOURCE and --checkpoint, or --undo JOURNAL alone")
    if args.apply is None and any((args.in_place, args.trim, args.journal)):
        raise UserError("--in-place, --trim and --journal are for --apply")
    if args.calibrate:
        return _calibrate(args)
    if args.without_up is not None or args.also is not None:
        raise UserError("--without-up and --also are for --calibrate")
    from fastrot.orient.job import orient

    if args.apply is None:
        return orient(args.source, args.checkpoint, args.out, args.min_confidence, show=not args.json)
    return _applied(args)


def _applied(args: argparse.Namespace) -> Result:
    """Look, then carry out what was found."""
    from fastrot import terminal
    from fastrot.files import as_words
    from fastrot.orient.answers import Answer
    from fastrot.orient.job import orient
    from fastrot.orient.turning import apply, places

    folder = Path(args.source.removeprefix("images:"))
    places(folder, args.apply, args.in_place, args.journal)  # before minutes of looking
    kept: list[Answer] = []
    began = time.time_ns()
    result = orient(args.source, args.checkpoint, args.out, args.min_confidence, not args.json, kept)
    done = apply(kept, folder, args.apply, args.in_place, args.trim, args.journal, began, terminal.track).plain()
    if not args.json:
        rows = [(kind, f"{count:,}") for kind, count in done["counts"].items()]
        rows += [(as_words(file), why) for file, why in list(done["left"].items())[:_SHOWN]]
        terminal.table(
            f"--apply {args.apply}", [*rows, ("to take it back", f"fastrot orient --undo {done['journal']}")]
        )
    return result | {"applied": done}


def _calibrate(args: argparse.Namespace) -> Result:
    if any(one is not None for one in (args.out, args.min_confidence, args.apply)):
        raise UserError(
            "--calibrate: takes no --out, --min-confidence or --apply; it keeps what it finds in the run's folder"
        )
    from fastrot.orient.calibrate import calibrate
    from fastrot.report.trust_page import write

    result = calibrate(args.source, args.checkpoint, args.without_up, args.also, show=not args.json)
    return result | {"page": write(result)}


COMMAND = Command(
    "orient",
    "which way is up in each image of a source, and how sure that is",
    "fastrot orient photos/ --checkpoint runs/orient --out orient.jsonl",
    _options,
    _run,
    "Shows each image to the network in all four turns and joins what it says. Images that have no up, or that it cannot "
    "tell, stay undecided. The source is touched by --apply with --in-place alone. A line of --out holds file, row, class, "
    "clockwise (degrees that put the image upright), probabilities (of having been turned by 0, 90, 180, 270 degrees counter-clockwise), decided, "
    "exif (the orientation by which it is shown) and tag (right, wrong, missing or none); of a file that cannot be read "
    "file and unreadable (why).",
)
