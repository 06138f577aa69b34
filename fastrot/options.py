"""The words of every command: options, defaults, help."""

import argparse
import re

_EXAMPLES = """\
examples:
  deepspeed fastrot/train.py --config configs/in1k.yaml data.train=/data/train data.val=/data/val
  torchrun --nproc_per_node 8 fastrot/train.py --config configs/in1k_fast.yaml data.train=/data/train
  python fastrot/train.py --config configs/photos10.yaml data.train=/data/train run.out=runs/small
  fastrot train --config configs/in1k.yaml data.train=/data/train --dry-run
  fastrot stream --config configs/in1k.yaml data.train=/data/train --first-step 0 --steps 50 --ranks 4
  fastrot features --checkpoint runs/rotation --data /data/val --taps 1,2,3,4,5,avg --out features/val
  fastrot finetune --checkpoint runs/in1k --config configs/semi_in1k_1.yaml data.train=/data/train data.val=/data/val
  fastrot index '/data/shards/train-{000..146}.tar' --verify
  fastrot index 'voc:/data/VOCdevkit/VOC2007?split=trainval' --json
  fastrot tune --config configs/in1k.yaml data.train=/data/train
  fastrot pack /data/train train.beton --mode raw --max-side 256
  fastrot page --checkpoint runs/rotation --suite configs/page.yaml --out page
  fastrot export --checkpoint runs/rotation --to detectron2 --out rotation_r50_d2.pth
  fastrot svm --train features/voc07-train --test features/voc07-test --layers feature4,feature5 --out svm.json
"""


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of sections data, rotation, linear, finetune, model, optim, engine, run",
    )
    options.add_argument("--json", action="store_true", help="print the result as one line of JSON on standard output")
    options.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    overrides = {"nargs": "*", "metavar": "section.key=value", "help": "override a key; the last one wins"}
    common = argparse.ArgumentParser(add_help=False, parents=[options])
    common.add_argument("overrides", **overrides)

    page = {"epilog": _EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("fastrot", description="Pretrain ResNets by predicting image rotations.", **page)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="pretrain (fastrot/train.py is the same)", parents=[common], **page)
    train.add_argument(
        "--dry-run", action="store_true", help="build everything, run a few steps, say what the run would be"
    )
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: the newest sound checkpoint of run.out, if any; or a checkpoint or run folder",
    )
    train.add_argument(
        "--resume-anyway",
        action="append",
        default=[],
        metavar="KEY",
        help="let this config key differ from the checkpoint's (repeatable)",
    )
    train.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed's own JSON; it may not contradict the YAML"
    )
    # scripts written for DeepSpeed pass it
    train.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)

    stream = commands.add_parser(
        "stream", help="print and hash steps of the stream, without training", parents=[common], **page
    )
    stream.add_argument("--first-step", type=int, default=0, metavar="A")
    stream.add_argument("--steps", type=int, default=10, metavar="N")
    stream.add_argument("--ranks", type=int, default=1, metavar="R", help="plan as this many ranks would")
    stream.add_argument("--decode", metavar="D", help="same as data.decode=D")
    stream.add_argument("--pixels", action="store_true", help="decode, and hash the crops too")

    index = commands.add_parser(
        "index",
        help="index a source and say what is in it",
        description="Index SOURCE (default: data.train) and say what is in it: a folder of class folders, list:FILE, "
        "tar shards, or voc:ROOT?split=S.",
        usage="fastrot index [SOURCE] [--verify] [--json] [--config FILE] [section.key=value ...]",
        parents=[common],
        **page,
    )
    index.add_argument(
        "--verify", action="store_true", help="decode every image in full and quarantine what is damaged"
    )

    tune = commands.add_parser(
        "tune",
        help="find threads, prefetch and the hardware decoder's share for this machine and data",
        description="Time the loader at several settings, choose, say why, and keep the choice in the cache: training uses "
        "it where data.threads, data.prefetch and data.hw_decoder_load are not set. Start it as the training will be "
        "started (its launcher and ranks): ranks share a machine's cores. The stream does not depend on it.",
        parents=[common],
        **page,
    )
    tune.add_argument("--seconds", type=float, default=3, metavar="S", help="of timing a setting (default 3)")

    pack = commands.add_parser(
        "pack", help="write a source as one FFCV file (.beton), rows in order", parents=[options], **page
    )
    pack.add_argument("source", metavar="SOURCE", help="anything data.train may be")
    pack.add_argument("out", metavar="OUT.beton", help="a new file")
    pack.add_argument("overrides", **overrides)
    pack.add_argument(
        "--mode",
        choices=("keep", "jpeg", "raw", "mix"),
        default="keep",
        help="keep: JPEG bytes as they are where upright RGB or gray, else encoded anew (default); "
        "jpeg: all encoded anew; raw: pixels; mix: raw for --raw-share of the rows, keep for the others",
    )
    pack.add_argument("--quality", type=int, default=90, metavar="Q", help="of JPEGs encoded anew, 1 to 100")
    pack.add_argument("--max-side", type=int, metavar="N", help="shrink images whose longer side is above N pixels")
    pack.add_argument("--raw-share", type=float, default=0.5, metavar="P", help="--mode mix: share of raw rows")
    pack.add_argument("--workers", type=int, metavar="N", help="processes; default: this machine's cores")
    _add_features(commands, common, page)
    _add_linear(commands, common, page)
    _add_finetune(commands, common, page)
    _add_probes(commands)

    report = commands.add_parser("page", help="run a suite of probes and write the report", parents=[common], **page)
    report.add_argument("--checkpoint", required=True, metavar="C", help="as for fastrot features")
    report.add_argument("--suite", required=True, metavar="FILE", help="which sets and probes, as in configs/page.yaml")
    report.add_argument("--out", required=True, metavar="DIR", help="features, results and page.html, .md, .json")

    export = commands.add_parser("export", help="write a backbone under another library's key names, with a card")
    export.add_argument("--checkpoint", required=True, metavar="C", help="as for fastrot features")
    export.add_argument("--to", required=True, choices=("torchvision", "timm", "detectron2", "mmpretrain"))
    export.add_argument("--out", required=True, metavar="FILE", help="ends in .safetensors or .pth; the card in .md")
    export.add_argument("--json", action="store_true", help="print the result as one line of JSON on standard output")
    return parser


def _add_backbone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", metavar="C", help="a run folder, a checkpoint, or any ResNet's .safetensors or .pth"
    )
    parser.add_argument("--random-init", type=int, metavar="SEED", help="the control: an untrained model.arch instead")


def _add_linear(commands, common, page) -> None:
    linear = commands.add_parser(
        "linear",
        help="linear heads on a frozen backbone; or, fast, on stored features",
        description="With --checkpoint: the protocol's heads on data.train, augmented, judged on data.val, in run.out. "
        "With --features: a grid of rates and decays at once on stored features, which is not the protocol.",
        parents=[common],
        **page,
    )
    _add_backbone(linear)
    linear.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="as for fastrot train")
    linear.add_argument("--features", metavar="DIR", help="feature store to fit")
    linear.add_argument("--test", metavar="DIR", help="feature store to judge by")
    linear.add_argument("--layers", metavar="A,B", help="taps, such as feature4,feature5; all by default")
    linear.add_argument("--epochs", type=int, default=20, metavar="N", help="over the stored features")
    linear.add_argument("--out", metavar="FILE", help="write every figure on stored features to this JSON file")
    linear.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="where stored features are fitted")


def _add_finetune(commands, common, page) -> None:
    tune = commands.add_parser(
        "finetune",
        help="learn classes with the whole network, from all or few of the images",
        description="Train a pretrained backbone and a last layer together on data.train, or on the share of it that "
        "finetune.fraction draws or finetune.names lists, judged on data.val, in run.out.",
        parents=[common],
        **page,
    )
    _add_backbone(tune)
    tune.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="as for fastrot train")


def _add_features(commands, common, page) -> None:
    features = commands.add_parser("features", help="a frozen backbone's taps over a source", parents=[common], **page)
    _add_backbone(features)
    features.add_argument(
        "--data", required=True, metavar="SOURCE", help="a folder, list:FILE, shards, voc:ROOT?split=S"
    )
    features.add_argument("--taps", default="1,2,3,4,5", metavar="LIST", help="of 1,2,3,4,5,avg (default: 1,2,3,4,5)")
    features.add_argument("--pool", choices=("specified", "gap", "adaptive"), default="specified")
    features.add_argument(
        "--transform",
        choices=("test", "svm"),
        default="test",
        help="test: short side 256, centre 224; svm: short side 256, then squashed to 224",
    )
    features.add_argument(
        "--passes",
        type=int,
        metavar="N",
        help="N passes with the plan's random windows and flips, epoch = pass, instead of one as evaluation shows images",
    )
    features.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    features.add_argument("--out", required=True, metavar="DIR", help="the feature store; one that was begun goes on")


def _add_probes(commands) -> None:
    """The probes read feature stores: they take no config, and run without ranks."""
    stores = argparse.ArgumentParser(add_help=False)
    stores.add_argument("--train", required=True, metavar="DIR", help="feature store to fit")
    stores.add_argument("--test", required=True, metavar="DIR", help="feature store to judge by")
    stores.add_argument("--layers", metavar="A,B", help="taps, such as feature4,feature5; all by default")
    stores.add_argument("--out", metavar="FILE", help="write every figure to this JSON file")
    stores.add_argument("--json", action="store_true", help="print the result as one line of JSON on standard output")
    stores.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="where to compute")

    def numbers(text: str) -> list[int]:
        values = [int(word) for word in text.split(",")]
        if min(values) < 1:
            raise ValueError
        return values

    commands.add_parser("svm", help="VOC07's linear SVMs on features", parents=[stores])
    low = commands.add_parser("lowshot", help="VOC07's low-shot SVMs on features", parents=[stores])
    low.add_argument("--k", type=numbers, default=[1, 2, 4, 8, 16, 32, 64, 96], metavar="K,K", help="positives a class")
    low.add_argument("--seed", type=int, default=0, help="of the five draws")
    low.add_argument("--draws", metavar="DIR", help="published draws, train_targets_sample1_k1.npy and so on, instead")
    near = commands.add_parser("knn", help="weighted k-nearest-neighbour classification of features", parents=[stores])
    near.add_argument("--k", type=numbers, default=[10, 20, 100, 200], metavar="K,K", help="neighbours")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """argparse, with overrides allowed before, between and after the options."""
    args, rest = _parser().parse_known_args(argv)
    takes_overrides = hasattr(args, "overrides")
    unknown = [word for word in rest if word.startswith("-") or not takes_overrides]
    if unknown:
        _parser().error(f"unknown option {' '.join(unknown)}")
    if takes_overrides:
        args.overrides += rest
    if args.command == "index":
        args.source, args.overrides = _place_and_overrides(args.overrides)
    return args


def _place_and_overrides(words: list[str]) -> tuple[str | None, list[str]]:
    """The first word that is no `section.key=value` (a source's own `=` comes later in it), and the others."""
    places = [word for word in words if not re.match(r"[A-Za-z_]\w*\.\w+=", word)]
    if not places:
        return None, words
    words = words.copy()
    words.remove(places[0])
    return places[0], words
