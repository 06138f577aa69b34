"""State on disk: whole or not there, verified before it is believed, nothing that executes.

checkpoints/step-00000123/ (123 = steps completed): model.safetensors, optimizer.safetensors
(momentum_buffer/<parameter>), backbone.safetensors, state.json, manifest.json (sha256 and bytes of
each file, written last). `latest` and `best` are text files beside the folders.
"""

import difflib
import json
import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrot.errors import Fault, UserError
from fastrot.files import fsync, sha256_of, write_text

_NAME = re.compile(r"step-(\d{8,})")
_FAILURES = 3  # checkpoints in a row that may fail before the run ends


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from. state: stream position, step, scalars, config and content hash."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint; empty where every file is as its manifest says."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_of(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({error})"
    return ""


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises UserError where it cannot be."""
    try:
        return Checkpoint(
            folder,
            load_file(folder / "model.safetensors"),
            load_file(folder / "optimizer.safetensors"),
            json.loads((folder / "state.json").read_text()),
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); name another checkpoint") from None


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted((p for p in root.glob("step-*") if _step(p) >= 0 and p.is_dir()), key=_step)


def _step(folder: Path) -> int:
    """Steps completed by a checkpoint's name; -1 where it is no such name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def find(resume: str, run: Path, say) -> Path | None:
    """The folder of the checkpoint to continue from.

    resume  auto: the newest sound one of this run, or None; never: None, refused where there is
            one; or the path of a checkpoint or of a run folder.
    say     called with a line for each checkpoint passed over.
    Raises UserError.
    """
    here = _folders(run / "checkpoints")
    if resume == "never":
        if here:
            raise UserError(f"{run}: holds a run at {here[-1].name}; choose another run.out, or --resume auto")
        return None
    if resume == "auto":
        candidates = here
    else:
        path = Path(resume)
        if not path.exists():
            raise UserError(f"--resume {resume}: no such folder; expected a checkpoint or a run folder, auto or never")
        candidates = _folders(path / "checkpoints") or [path]
    for folder in reversed(candidates):
        wrong = verify(folder)
        if not wrong:
            newer = [other for other in here if _step(other) > _step(folder)]
            if newer and resume != "auto":
                raise UserError(
                    f"--resume {resume}: {run} holds {newer[-1].name}, which is newer; choose another run.out"
                )
            for damaged in newer:  # out of the way of what will be written under that name
                damaged.replace(damaged.with_name(f"damaged-{damaged.name}"))
            return folder
        if resume not in ("auto", "never") and len(candidates) == 1:
            raise UserError(f"--resume {resume}: not a sound checkpoint: {wrong}")
        say(f"{folder.name} is damaged ({wrong}); taking the one before")
    if candidates:
        raise UserError(
            f"{run / 'checkpoints'}: none of {len(candidates)} checkpoints is sound; "
            "choose another run.out to start anew"
        )
    return None


class Saver:
    """Writes checkpoints beside the training: tensors are copied at once, files by a thread.

    best  held-out accuracy of the checkpoint kept as best, None before there is one.
    """

    def __init__(self, run: Path, keep_last: int, say):
        self._root, self._keep, self._say = run / "checkpoints", keep_last, say
        self._thread: threading.Thread | None = None
        self._failures = 0
        self.best: float | None = None
        try:
            best = json.loads((self._root / "best").read_text())
            self.best = best["accuracy"]
        except (OSError, ValueError, KeyError):
            pass  # no best yet

    def save(self, step: int, model, optimizer, state: dict, accuracy: float | None) -> None:
        """Begin to write step-<step>; waits for the one before. accuracy: held out, decides `best`.

        Raises Fault after three failures in a row.
        """
        self.finish()
        if self._failures >= _FAILURES:
            self.check()
        tensors = {
            "model.safetensors": _copied(model),
            "optimizer.safetensors": _copied(optimizer),
            "backbone.safetensors": _copied({k: v for k, v in model.items() if not k.startswith("fc.")}),
        }
        self._thread = threading.Thread(
            target=self._write, args=(step, tensors, dict(state), accuracy), name="checkpoint"
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait until what was begun is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raises Fault where the newest checkpoint could not be written."""
        if self._failures:
            raise Fault(
                f"{self._root}: the last {self._failures} checkpoints could not be written; an earlier one stands"
            )

    def _write(self, step: int, tensors: dict, state: dict, accuracy: float | None) -> None:
        folder = self._root / f"step-{step:08d}"
        scratch = self._root / f".tmp-{folder.name}"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            for name, content in tensors.items():
                save_file(content, scratch / name)
            (scratch / "state.json").write_text(json.dumps(state, indent=1))
            files = {}
            for name in sorted(p.name for p in scratch.iterdir()):
                fsync(scratch / name)
                files[name] = {"sha256": sha256_of(scratch / name), "bytes": (scratch / name).stat().st_size}
            (scratch / "manifest.json").write_text(json.dumps({"files": files}, indent=1))
            fsync(scratch / "manifest.json")
            fsync(scratch)
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
            fsync(self._root)
            write_text(self._root / "latest", folder.name + "\n")
            if accuracy is not None and (self.best is None or accuracy > self.best):
                self.best = accuracy
                write_text(self._root / "best", json.dumps({"name": folder.name, "accuracy": accuracy}) + "\n")
            self._thin_out()
            self._failures = 0
        except (OSError, SafetensorError) as error:
            self._failures += 1
            self._say(
                f"checkpoint {folder.name} could not be written ({error}); "
                "training goes on, the next interval tries again"
            )

    def _thin_out(self) -> None:
        try:
            best = json.loads((self._root / "best").read_text())["name"]
        except (OSError, ValueError, KeyError):
            best = None
        for folder in _folders(self._root)[: -self._keep]:
            if folder.name != best:
                shutil.rmtree(folder, ignore_errors=True)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous host copies: the step may go on while they are written."""
    return {
        name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format).copy_(t)
        for name, t in tensors.items()
    }


def refuse_differences(saved: dict, now: dict, may_differ: list[str], fixed: tuple[str, ...], where: Path) -> None:
    """Compare what defines a run (flat keys) between a checkpoint and now.

    may_differ  keys that the user allows to differ (--resume-anyway).
    fixed       keys that nobody can allow to differ.
    Raises UserError with every differing key, old -> new, a line each.
    """
    for key in may_differ:
        if key not in now or key in fixed:
            near = difflib.get_close_matches(key, now, 1, 0.6)
            hint = "a run cannot go on with another" if key in fixed else "no key that a resume compares"
            raise UserError(
                f"--resume-anyway {key}: {hint}" + (f"; did you mean {near[0]}?" if near and key not in now else "")
            )
    lines = [
        f"{where.name}: {key} was {saved.get(key)!r}, is {now[key]!r}; restore it, or choose another run.out"
        + ("" if key in fixed else f", or --resume-anyway {key}")
        for key in now
        if saved.get(key) != now[key] and key not in may_differ
    ]
    if lines:
        raise UserError("\n".join(lines))
