"""State on disk: whole or not there, verified before it is believed, nothing that executes.

checkpoints/step-00000123/ (123 = steps completed): model.safetensors, optimizer.safetensors
(momentum_buffer/<parameter>), backbone.safetensors, state.json, manifest.json (sha256 and bytes of
each file, written last). `latest` and `best` are text files beside the folders.
"""

import difflib
import itertools
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrot.errors import Diverged, Fault, UserError
from fastrot.files import Sealed, clear_scratch, read_json, remove, replacing, sha256_of, write_text
from fastrot.models.key_names import backbone_in

_NAME = re.compile(r"step-(\d{8,})")
_FAILURES = 3  # checkpoints in a row that may fail before the run ends


_TENSORS = ("model.safetensors", "optimizer.safetensors", "backbone.safetensors")
_FILES = {*_TENSORS, "state.json"}
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class State:
    """state.json: steps completed, next stream position, the engine's scalars, and what defines the run (flat keys)."""

    step: Count
    position: Count
    scalars: dict[str, Any]
    defining: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: State


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, Sealed]


@dataclass(frozen=True)
class _Best:
    name: str
    accuracy: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint; empty where every file is there and as its manifest says."""
    name = "manifest.json"
    try:
        files = read_json(folder / name, _Manifest).files
        if missing := sorted(_FILES - files.keys()):
            return f"manifest.json lacks {', '.join(missing)}"
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry.bytes:
                return f"{name} has {path.stat().st_size} bytes, not {entry.bytes}"
            if sha256_of(path) != entry.sha256:
                return f"{name} does not match its sha256"
        name = "state.json"
        read_json(folder / name, State)
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except ValueError as error:
        return f"{name!r} cannot be read ({error})"
    return ""


def weights_sha256(folder: Path) -> str:
    """Of a sound checkpoint's model.safetensors, as its manifest says."""
    return read_json(folder / "manifest.json", _Manifest).files["model.safetensors"].sha256


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises UserError where it cannot be."""
    try:
        return Checkpoint(
            folder,
            load_file(folder / "model.safetensors"),
            load_file(folder / "optimizer.safetensors"),
            read_json(folder / "state.json", State),
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); name another checkpoint") from None


def trained(run: str, by: str) -> tuple[Checkpoint, Path]:
    """The best checkpoint of a run folder, or the one that is named itself; and the run's folder.

    by  the commands whose runs are meant. Raises UserError.
    """
    path = Path(run)
    folder = path if (path / "config.yaml").is_file() else path.absolute().parent.parent
    if not path.is_dir() or not (folder / "config.yaml").is_file():
        what = "is no run's" if path.exists() else "no such folder"
        raise UserError(f"{run}: {what}; name a run folder of {by}, or one of its checkpoints")
    best = find_best(folder) if folder == path else path
    if wrong := verify(best):
        raise UserError(f"{best}: not a sound checkpoint: {wrong}")
    return load(best), folder


def find_best(run: Path) -> Path:
    """The sound checkpoint of a run that was best on its held-out images, or, where nothing was held out, the newest.

    Raises UserError where there is none, or the note of the best is damaged.
    """
    root = run / "checkpoints"
    candidates = folders(root)[::-1]
    try:
        candidates.insert(0, root / read_json(root / "best", _Best).name)
    except FileNotFoundError:
        pass  # nothing was held out
    except (OSError, ValueError) as error:
        raise UserError(f"{root / 'best'}: cannot be read ({error}); name a checkpoint, {root}/step-...") from None
    sound = next((folder for folder in candidates if not verify(folder)), None)
    if sound is None:
        raise UserError(f"{run}: holds no sound checkpoint; train first, or name another run")
    return sound


def folders(root: Path) -> list[Path]:
    """What has a checkpoint's name, oldest first."""
    return sorted((p for p in root.glob("step-*") if _step(p) >= 0), key=_step)


def newest_step(run: Path) -> int:
    """Steps completed by the newest checkpoint, sound or not; -1 where there is none."""
    return max(map(_step, folders(run / "checkpoints")), default=-1)


def _step(folder: Path) -> int:
    return step_of(folder.name)


def step_of(name: str) -> int:
    """Steps completed by a checkpoint's name; -1 where it is no such name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else -1


def newest(run: Path) -> Path | None:
    """The newest sound checkpoint of a run."""
    return next((one for one in reversed(folders(run / "checkpoints")) if not verify(one)), None)


def find(resume: str, run: Path, say: Callable[[str], None]) -> Path | None:
    """The folder of the checkpoint to continue from; changes nothing.

    resume  auto: the newest sound one of this run, or None; never: None, refused where there is
            one; or the path of a checkpoint or of a run folder, where a branch begins: once it has
            checkpoints of its own it goes on from those, as with auto.
    say     called with a line for each checkpoint passed over.
    Raises UserError.
    """
    here = folders(run / "checkpoints")
    if resume == "never":
        if here:
            raise UserError(f"{run}: holds a run at {here[-1].name}; choose another run.out, or --resume auto")
        return None
    path = Path(resume)
    if resume != "auto" and not path.exists():
        raise UserError(f"--resume {resume}: no such folder; expected a checkpoint or a run folder, auto or never")
    if resume == "auto" or (here and not path.resolve().is_relative_to(run.resolve())):
        resume, candidates = "auto", here
    else:
        candidates = folders(path / "checkpoints") or [path]
    for folder in reversed(candidates):
        wrong = verify(folder)
        if not wrong:
            newer = [other for other in here if _step(other) > _step(folder)]
            if newer and resume != "auto":
                raise UserError(
                    f"--resume {resume}: {run} holds {newer[-1].name}, which is newer; choose another run.out"
                )
            return folder
        if resume != "auto" and len(candidates) == 1:
            raise UserError(f"--resume {resume}: not a sound checkpoint: {wrong}")
        say(f"{folder.name} is damaged ({wrong}); taking the one before")
    if candidates:
        raise UserError(
            f"{run / 'checkpoints'}: none of {len(candidates)} checkpoints is sound; "
            "choose another run.out to start anew"
        )
    return None


def standing(run: Path) -> str:
    """In a few words, what a run could go on from."""
    sound = newest(run)
    return f"{sound.name} stands, and --resume auto goes on from it" if sound else "there is no checkpoint yet"


def make_way(run: Path, step: int) -> None:
    """Before a run goes on from `step`: later checkpoints, damaged all, lose the names that will be written again,
    and what a kill left half written goes. Raises OSError."""
    root = run / "checkpoints"
    root.mkdir(exist_ok=True)
    clear_scratch(root)
    for damaged in folders(root):
        if _step(damaged) > step:
            names = (
                f"damaged-{damaged.name}{more}" for more in itertools.chain([""], (f".{n}" for n in itertools.count(2)))
            )
            damaged.rename(next(aside for name in names if not (aside := root / name).exists()))


def refuse_poisoned(model: dict[str, Tensor], optimizer: dict[str, Tensor], step: int) -> None:
    """One reduction over what would be saved. Raises Diverged where a weight, statistic or momentum is not finite."""
    tensors = [t for t in (*model.values(), *optimizer.values()) if t.is_floating_point() and t.numel()]
    largest = torch.stack(torch._foreach_norm(tensors, float("inf")))
    if not bool(largest.isfinite().all()):
        raise Diverged(f"the weights or their momentum are not finite after {step:,} steps and are not saved")


def better(figure: float | None, best: float | None) -> bool:
    """Whether a held-out figure makes its checkpoint the best; one that is not finite never does."""
    return figure is not None and math.isfinite(figure) and (best is None or figure > best)


class Saver:
    """Writes checkpoints beside the training: tensors are copied at once, files by a thread.

    written  called by that thread with each folder that is whole.
    """

    def __init__(
        self, run: Path, keep_last: int, say: Callable[[str], None], written: Callable[[Path], None] | None = None
    ):
        self._root, self._keep, self._say, self._written = run / "checkpoints", keep_last, say, written
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._error: Exception | None = None
        self._best = self._read_best()

    @property
    def best(self) -> float | None:
        """Held-out figure, 0..1, of the checkpoint kept as best, None before there is one; on disk it is `accuracy`."""
        return self._best.accuracy if self._best else None

    def _read_best(self) -> _Best | None:
        try:
            return read_json(self._root / "best", _Best)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._say(f"{self._root / 'best'} is damaged ({error}); the next evaluation writes it anew")
            return None

    def save(
        self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: State, accuracy: float | None
    ) -> None:
        """Begin to write step-<state.step>; waits for the one before. accuracy: held out, decides `best`.

        Raises Fault after three failures in a row.
        """
        self.finish()
        if self._failures >= _FAILURES or self._error:
            self.check()
        tensors = {
            "model.safetensors": _copied(model),
            "optimizer.safetensors": _copied(optimizer),
            "backbone.safetensors": _copied(backbone_in(model)),
        }
        self._thread = threading.Thread(target=self._write, args=(tensors, state, accuracy), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until what was begun is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raises Fault where the newest checkpoint could not be written."""
        if self._error:
            raise self._error
        if self._failures:
            raise Fault(
                f"{self._root}: the last {self._failures} checkpoints could not be written; {standing(self._root.parent)}"
            )

    def _write(self, tensors: dict[str, dict[str, Tensor]], state: State, accuracy: float | None) -> None:
        folder = self._root / f"step-{state.step:08d}"
        try:
            with replacing(folder, folder=True) as scratch:
                for name, content in tensors.items():
                    save_file(content, scratch / name)
                (scratch / "state.json").write_text(json.dumps(asdict(state), indent=1))
                files = {path.name: asdict(Sealed.of(path)) for path in sorted(scratch.iterdir())}
                (scratch / "manifest.json").write_text(json.dumps({"files": files}, indent=1))
            write_text(self._root / "latest", folder.name + "\n")
            if accuracy is not None and better(accuracy, self.best):
                best = _Best(folder.name, accuracy)
                write_text(self._root / "best", json.dumps(asdict(best)) + "\n")
                self._best = best
            self._thin_out()
            self._failures = 0
            if self._written:
                self._written(folder)
        except (OSError, SafetensorError) as error:
            self._failures += 1
            self._say(
                f"checkpoint {folder.name} could not be written ({error}); "
                "training goes on, the next interval tries again"
            )
        except Exception as error:  # carried to the thread that trains, which raises it
            self._error = error

    def _thin_out(self) -> None:
        for folder in folders(self._root)[: -self._keep]:
            if self._best is None or folder.name != self._best.name:
                remove(folder)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous host copies: the step may go on while they are written."""
    return {
        name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format).copy_(t)
        for name, t in tensors.items()
    }


def refuse_differences(
    saved: dict[str, Any], now: dict[str, Any], may_differ: list[str], fixed: tuple[str, ...], where: Path
) -> None:
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
