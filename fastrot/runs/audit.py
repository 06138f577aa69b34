"""`fastrot verify`: whether what a run has written still is what it wrote. Only reads, and takes no lock."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastrot import terminal
from fastrot.config import Config, load
from fastrot.data.build import plan_of
from fastrot.data.manifest import Manifest, changed_files
from fastrot.errors import Fault, UserError
from fastrot.files import Damaged, Sealed, read_json, sha256_of
from fastrot.runs import checkpoint, epochs
from fastrot.runs.folder import is_run, read_lines, state
from fastrot.runs.log import read_status
from fastrot.runs.run import defining

SOUND, NOTED, DAMAGED = "sound", "noted", "damaged"
_REMOVAL_S = 5.0  # that the removal of a checkpoint may take


@dataclass(frozen=True)
class Finding:
    """what: a file or folder of the run. state: sound; damaged; or noted, which is worth a word and no damage."""

    what: str
    state: str
    says: str


@dataclass(frozen=True)
class _Files:
    """Of a manifest or a feature store: its files as they were sealed; older ones lack it."""

    files: dict[str, Sealed] | None = None


def audit(folder: Path) -> dict[str, Any]:
    """What is sound and what is damaged in a run's folder, in a checkpoint, or in a feature store.

    resume  the checkpoint that `--resume auto` would take, None where there is none.
    Raises UserError where the folder is none of these.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run's, as in run.out")
    resume: Path | None = None
    stands = state(folder), read_status(folder)  # first: a run may end while the rest is read
    if is_run(folder):
        of_checkpoints, resume = _checkpoints(folder, stands[0] == "running")
        findings = [*of_checkpoints, *_Run(folder, resume, *stands).findings()]
    elif (folder / "labels.npy").exists():
        findings = [_store(folder, folder.name)]
    elif (folder / "state.json").exists():
        findings = [_checkpoint(folder)]
    else:
        empty = "is empty" if not any(folder.iterdir()) else "holds no run"
        raise UserError(f"{folder}: {empty}; expected a run's config.yaml and checkpoints/, a checkpoint, or features")
    damaged = [one for one in findings if one.state == DAMAGED]
    return {
        "folder": str(folder),
        "sound": not damaged,
        "state": stands[0],
        "resume": resume.name if resume else None,
        "findings": [asdict(one) for one in findings],
    }


def _checkpoints(run: Path, running: bool) -> tuple[list[Finding], Path | None]:
    """The checkpoints' hashes, and the newest sound one."""
    root, findings = run / "checkpoints", []
    folders = checkpoint.folders(root)
    for folder in terminal.track(folders, len(folders), "checkpoints"):
        found = _checkpoint(folder)
        if found.state == SOUND or not _thinned_out(folder, running):
            findings.append(found)
    sound = {one.what for one in findings if one.state == SOUND}
    resume = next((one for one in reversed(folders) if f"checkpoints/{one.name}" in sound), None)
    if not findings:
        findings.append(Finding("checkpoints", NOTED, "there is none yet"))
    findings += [
        Finding(f"checkpoints/{one.name}", NOTED, "was damaged, and a resume set it aside; it may be removed")
        for one in sorted(root.glob("damaged-step-*"))
    ]
    findings += [one for one in (_pointer(root, "latest"), _pointer(root, "best")) if one]
    return findings, resume


def _thinned_out(folder: Path, running: bool) -> bool:
    """Whether a run removes an old checkpoint while it is looked at: its files go before it does."""
    until = time.monotonic() + _REMOVAL_S
    while running and folder.exists() and time.monotonic() < until:
        time.sleep(0.1)
    return not folder.exists()


def _checkpoint(folder: Path) -> Finding:
    wrong = checkpoint.verify(folder)
    says = wrong or f"{len(list(folder.iterdir()))} files, every hash as its manifest says"
    return Finding(f"checkpoints/{folder.name}", DAMAGED if wrong else SOUND, says)


def _pointer(root: Path, name: str) -> Finding | None:
    """`latest` and `best` name checkpoints that are there."""
    path = root / name
    if not path.exists():
        return None
    try:
        named = path.read_text().strip() if name == "latest" else str(read_json(path, dict[str, Any])["name"])
    except (OSError, ValueError, KeyError) as error:
        return Finding(f"checkpoints/{name}", DAMAGED, f"cannot be read ({error})")
    there = bool(named) and (root / named).is_dir()
    return Finding(
        f"checkpoints/{name}", SOUND if there else DAMAGED, named if there else f"names {named!r}, not there"
    )


class _Run:
    """What stands beside the checkpoints. newest: the sound checkpoint that a resume would take, if any. state, status: as
    they were before the checkpoints were looked at."""

    def __init__(self, folder: Path, newest: Path | None, state: str, status: dict[str, Any]):
        self.folder, self.status, self.state = folder, status, state
        self.newest = read_json(newest / "state.json", checkpoint.State) if newest else None
        self.newest_folder = newest
        self.config: Config | None = None

    def findings(self) -> Iterator[Finding]:
        yield from self._guarded("STATUS.json", self._status)
        yield from self._guarded("metrics.jsonl", self._metrics)
        yield from self._guarded("config.yaml", self._config)
        for home in sorted((self.folder / "manifest").glob("[!.]*")):
            yield from self._guarded(f"manifest/{home.name}", partial(self._manifest, home))
        if not (self.folder / "manifest" / "train").is_dir():
            yield Finding("manifest/train", DAMAGED, "is gone: a resume would index the images anew")
        yield from self._guarded("stream.json", self._stream)
        yield from self._guarded("backbone.safetensors", self._backbone)
        for path in sorted(self.folder.glob("*.json*")):
            if path.name not in ("STATUS.json", "metrics.jsonl", "stream.json"):
                yield from self._guarded(path.name, partial(_json, path))
        for labels in sorted(self.folder.glob("*/labels.npy")):
            yield _store(labels.parent, labels.parent.name)

    def _guarded(self, what: str, look: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[Finding]:
        """Its findings, and as damage what cannot be read."""
        try:
            for state, says in look():
                yield Finding(what, state, says)
        except (OSError, RecursionError, ValueError, UserError, Fault) as error:
            yield Finding(what, DAMAGED, str(error).splitlines()[0])

    def _status(self) -> Iterator[tuple[str, str]]:
        read_json(self.folder / "STATUS.json", dict[str, Any])
        if self.state == "killed":
            yield NOTED, f"says running, and process {self.status.get('pid')} is gone: the same command goes on"
        elif self.state == "done" and self.newest and self.newest.step != self.status.get("steps"):
            yield (
                DAMAGED,
                f"says done at step {self.status.get('steps')}; the newest sound checkpoint is of {self.newest.step}",
            )
        else:
            yield SOUND, self.state + (f": {why}" if (why := self.status.get("reason")) else "")

    def _metrics(self) -> Iterator[tuple[str, str]]:
        found = read_lines(self.folder / "metrics.jsonl")
        for number, why in list(found.wrong.items())[:3]:
            yield DAMAGED, f"line {number} of it: {why}"
        steps = [line["step"] for line in found.lines if isinstance(line.get("step"), int)]
        if back := next((b for a, b in itertools.pairwise(steps) if b < a), None):
            yield DAMAGED, f"step {back} comes after a later one"
        if self.newest and self.newest.step > max(steps, default=-1) + 1:
            yield (
                DAMAGED,
                f"ends at step {max(steps, default=-1)}; the newest sound checkpoint is of {self.newest.step} steps",
            )
        if found.half and self.state != "running":
            yield NOTED, "ends in half a line, as a kill leaves it: a resume cuts it off"
        if not found.wrong:
            yield SOUND, f"{len(found.lines):,} lines, {max(steps, default=-1) + 1:,} steps"

    def _config(self) -> Iterator[tuple[str, str]]:
        self.config = load(str(self.folder / "config.yaml"), [])[0]
        now = defining(self.config, "")
        before = defining(Config(), "") | self.newest.defining if self.newest else now
        other = [key for key in now if key != "data" and now[key] != before[key]]
        if other and self.newest_folder:
            yield NOTED, f"{', '.join(other)}: not as {self.newest_folder.name} was trained"
        else:
            yield SOUND, "can be read" + (f", and is {self.newest_folder.name}'s" if self.newest_folder else "")

    def _manifest(self, home: Path) -> Iterator[tuple[str, str]]:
        manifest = Manifest.load(home)
        sealed = read_json(home / "meta.json", _Files).files
        for name, wrong in _differences(home, sealed or {}):
            yield DAMAGED, f"{name} {wrong}"
        trained = self.newest.defining.get("data") if self.newest and home.name == "train" else None
        if trained and trained != manifest.content:
            yield (
                DAMAGED,
                f"is of other images than the checkpoints: content {manifest.content[:12]}, not {trained[:12]}",
            )
        hashes = "every hash as it says" if sealed else "of a version that kept no hashes"
        yield SOUND, f"{len(manifest):,} images, {hashes}"
        try:
            changed, looked = changed_files(manifest)
        except (UserError, Fault) as error:
            yield NOTED, f"its image files cannot be looked at now: {error}"
            return
        if changed:
            first = ": ".join(changed[0])
            yield NOTED, f"{len(changed):,} of {looked:,} image files are not as the run saw them, the first: {first}"

    def _stream(self) -> Iterator[tuple[str, str]]:
        """Each recorded epoch computed again from the config and the run's own manifest."""
        recorded = epochs.read(self.folder)
        if not recorded or self.config is None:
            yield NOTED, "no epoch is recorded" if self.config else "cannot be judged without config.yaml"
            return
        manifest = Manifest.load(self.folder / "manifest" / "train")
        plan = plan_of(self.config, manifest)
        same = [one for one in recorded if one.plan == epochs.settings(plan)]
        for one in terminal.track(same, len(same), "epochs of the stream"):
            again = epochs.digest(plan, np.asarray(manifest.label), one.epoch)
            if again != one.sha256:
                yield DAMAGED, f"epoch {one.epoch} was {one.sha256[:12]}, and comes out as {again and again[:12]}"
        if len(same) < len(recorded):
            yield NOTED, f"{len(recorded) - len(same)} epochs were of other settings than config.yaml's"
        yield SOUND, f"{len(same)} epochs computed again from config.yaml and manifest/train"

    def _backbone(self) -> Iterator[tuple[str, str]]:
        path = self.folder / "backbone.safetensors"
        if self.state != "done" or self.newest_folder is None:
            return
        known = read_json(self.newest_folder / "manifest.json", _Files).files or {}
        if sha256_of(path) == known[path.name].sha256:
            yield SOUND, f"is {self.newest_folder.name}'s"
        else:
            yield DAMAGED, f"is not {self.newest_folder.name}'s; copy that one's over it"


def _differences(folder: Path, sealed: dict[str, Sealed]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of those that are not as they were sealed."""
    for name, entry in sealed.items():
        path = folder / name
        if not path.is_file():
            yield name, "is gone"
        elif path.stat().st_size != entry.bytes:
            yield name, f"has {path.stat().st_size:,} bytes, not {entry.bytes:,}"
        elif sha256_of(path) != entry.sha256:
            yield name, "does not match its sha256"


def _store(folder: Path, what: str) -> Finding:
    """A feature store."""
    path = folder / "manifest.json"
    if not path.exists():
        return Finding(what, NOTED, "features that are not all there yet; the same fastrot features goes on")
    try:
        sealed = read_json(path, _Files).files
    except (OSError, ValueError) as error:
        return Finding(what, DAMAGED, f"manifest.json cannot be read ({error})")
    wrong = [f"{name} {why}" for name, why in _differences(folder, sealed or {})]
    if wrong:
        return Finding(what, DAMAGED, "; ".join(wrong))
    return Finding(what, SOUND if sealed else NOTED, f"{len(sealed or {})} arrays, every hash as its manifest says")


def _json(path: Path) -> Iterator[tuple[str, str]]:
    """JSON, or JSON lines, that can be read: a record of bad images, a probe's figures."""
    if path.suffix == ".jsonl":
        wrong = read_lines(path).wrong
        if wrong:
            raise Damaged(f"line {min(wrong)} cannot be read: {wrong[min(wrong)]}")
    else:
        json.loads(path.read_bytes())
    yield SOUND, "can be read"
