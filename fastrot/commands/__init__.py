"""The commands, a file each, in the order of a user's day. One file and one name here adds another."""

from importlib import import_module

from fastrot.commands.base import Command

GROUPS = {
    "this machine": ("doctor", "warmup"),
    "data": ("index", "pack", "stage", "tune"),
    "training": ("train", "linear", "finetune", "detect", "segment"),
    "on a cluster": ("launch",),
    "judging a backbone": ("features", "svm", "lowshot", "knn", "page"),
    "handing it on": ("predict", "orient", "odd", "shortcuts", "export"),
    "runs that are there": ("runs", "verify"),
    "looking behind": ("profile", "bench", "estimate", "selfcheck", "stream", "config", "demo-data"),
}


def find(name: str) -> Command:
    """The command of a name in GROUPS; imports its file and no other's."""
    command: Command = import_module(f"fastrot.commands.{name.replace('-', '_')}").COMMAND
    return command
