"""Bugs of the past, or such as were feared, brought back for a sweep to find."""

import json
from dataclasses import replace

from fastrot import distributed
from fastrot.engine.base import Engine
from fastrot.files import sha256_of
from fastrot.runs import checkpoint, log


def _any_manifest_is_believed() -> None:
    """Until cfa4ffd a manifest that names no files was one of a sound checkpoint."""

    def verify(folder) -> str:
        try:
            files = json.loads((folder / "manifest.json").read_text())["files"]
            for name, entry in files.items():
                if sha256_of(folder / name) != entry["sha256"]:
                    return f"{name} does not match its sha256"
        except OSError as error:
            return f"{error.strerror}"
        except (ValueError, KeyError, TypeError) as error:
            return f"manifest.json cannot be read ({error})"
        return ""

    checkpoint.verify = verify


def _half_lines_stay() -> None:
    """Until cfa4ffd a line of metrics that a full disk cut stayed, and the next was written behind it."""

    def record(self, folder, values) -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    log.RunLog._record = record


def _nobody_waits_in_vain() -> None:
    """Until 6bf212b ranks waited two hours for one that was stopped."""
    distributed.limit_waits = lambda seconds: None


def _momentum_is_lost() -> None:
    load_state = Engine.load_state
    Engine.load_state = lambda self, model, momenta, scalars: load_state(self, model, {}, scalars)


def _position_is_off_by_one() -> None:
    save = checkpoint.Saver.save

    def one_more(self, model, optimizer, state, accuracy) -> None:
        save(self, model, optimizer, replace(state, position=state.position + 1), accuracy)

    checkpoint.Saver.save = one_more


def _checkpoints_are_written_in_place() -> None:
    from contextlib import contextmanager

    @contextmanager
    def in_place(path, folder=False):
        if folder:
            path.mkdir(exist_ok=True)
        yield path

    checkpoint.replacing = in_place
    checkpoint.verify = lambda folder: "" if (folder / "state.json").exists() else "no state.json"


def _lines_are_not_cut_back() -> None:
    log.cut_back = lambda path, steps: None


BUGS = {
    "any manifest is believed": _any_manifest_is_believed,
    "half lines stay": _half_lines_stay,
    "nobody waits in vain": _nobody_waits_in_vain,
    "momentum is lost": _momentum_is_lost,
    "position is off by one": _position_is_off_by_one,
    "checkpoints are written in place": _checkpoints_are_written_in_place,
    "lines are not cut back": _lines_are_not_cut_back,
}
