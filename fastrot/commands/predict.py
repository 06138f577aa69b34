"""`fastrot predict`: what a trained detector or segmenter finds in a folder of images."""

import argparse

from fastrot.commands.base import Command, Result, add_json, among_ranks


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="a run folder of fastrot detect or segment, or one of its checkpoints"
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder of images, at any depth; or voc:, coco:, list:")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the predictions go; new, or empty")
    parser.add_argument(
        "--min-score",
        type=float,
        metavar="P",
        help="leave out objects less sure than this; 0.05 is the least that a detector gives (default: 0.5)",
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> Result:
    with among_ranks() as ranks:
        from fastrot.report.contact_sheet import ContactSheet
        from fastrot.runs.predict import predict

        return predict(args.run, args.source, args.out, args.min_score, ranks, ContactSheet)


COMMAND = Command(
    "predict",
    "what a trained detector or segmenter finds in a folder of images",
    "fastrot predict runs/detect_voc0712 holiday/ --out holiday_found",
    _options,
    _run,
    "Of a detector: predictions.json, in COCO's format with scores, and masks where it learnt them. Of a segmenter: "
    "masks/, a PNG an image, whose values are the classes. index.html shows some dozens of images with what was found; "
    "images that cannot be read are passed over and listed in bad_images.jsonl.",
)
