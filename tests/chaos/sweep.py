"""A training under real launchers, struck at any instant, damaged and begun again until it ends: as if nothing had been."""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file

from chaos.strikes import FILES, STRIKES, Running, Strike, damage, sound
from conftest import metrics, runnable_decoders, write_folder, write_shards
from workers.launched import Start, run
from workers.ranks import forked

STEPS, IMAGES, EVERY = 40, 6, 3
WORDS = [
    "model.arch=resnet18", "data.crop=16", f"optim.images_per_step={IMAGES}", "optim.lr=0.01", "optim.epochs=20",
    "optim.warmup_epochs=0", "run.log_every=1", f"run.checkpoint_every={EVERY}", "run.evaluate_every=5",
    "run.tensorboard=false",
]  # fmt: skip
HANGS_S, ORPHANS_S = 120, 20


# until which step a training went on which (engine, ranks, decoder), one after the other
Course = tuple[tuple[int, tuple[str, int, str]], ...]


@dataclass
class Place:
    """Where sweeps work. sources: the same images by kind of storage; small: a disk of a few MB for run folders."""

    root: Path
    small: Path
    sources: dict[str, Path]
    decoders: list[str]
    bug: str = ""
    ranks: tuple[int, ...] = (1, 2, 3)
    references: dict["Course", "Reference"] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """A run of the same course that nothing disturbed: its folder, the images of each step, seconds until its first step
    and of each."""

    folder: Path
    ids: dict[int, list]
    begins_s: float
    step_s: float


def make_place(root: Path, small: Path, bug: str = "", ranks: tuple[int, ...] = (1, 2, 3)) -> Place:
    from fastrot.cli import main

    folder = write_folder(root / "folder")
    shutil.copytree(folder, root / "moved")
    write_shards(folder, root)
    assert main(["pack", str(folder), str(root / "images.beton")]) == 0
    sources = {
        "folder": folder,
        "moved": root / "moved",
        "tar": root / "shard-{0..1}.tar",
        "beton": root / "images.beton",
    }
    return Place(root, small, sources, runnable_decoders(["torch", "turbo"]), bug, ranks)


def newest_sound(run: Path) -> int | None:
    """Steps completed by the newest checkpoint that is whole; None where there is none."""
    whole = sound(run)
    return int(whole[-1].name.removeprefix("step-")) if whole else None


def trained_on(notes: list[dict]) -> tuple[dict[int, list], dict[int, int]]:
    """Of each step the (epoch, row) that its ranks noted, in their order, and the start that did it; a start drops what
    it does again."""
    steps: dict[int, dict[int, list]] = {}
    by: dict[int, int] = {}
    for note in (note for note in notes if "step" in note):
        if note["start"] not in by.values():
            steps = {step: ranks for step, ranks in steps.items() if step < note["step"]}
            by = {step: start for step, start in by.items() if step < note["step"]}
        ids = [list(pair) for pair in zip(note["epochs"], note["rows"], strict=True)]
        steps.setdefault(note["step"], {}).setdefault(note["rank"], []).extend(ids)
        by[note["step"]] = note["start"]
    return {step: list(chain(*(ids for _, ids in sorted(ranks.items())))) for step, ranks in sorted(steps.items())}, by


def learnt(run: Path) -> dict[tuple, dict]:
    """By (step, held out or not), what was learnt: not how fast. A second line of a step is a KeyError."""
    lines: dict[tuple, dict] = {}
    for line in metrics(run):
        key = line["step"], "held_out_loss" in line
        if key in lines:
            raise KeyError(f"two lines of step {key[0]}")
        lines[key] = {
            name: value
            for name, value in line.items()
            if name in ("step", "epoch", "loss", "lr", "grad_norm") or name.startswith(("accuracy", "held_out"))
        }
    return lines


class Sweep:
    """One training, from its first start to its end."""

    def __init__(
        self, place: Place, number: int, seed: int, strikes: dict[str, float], write: Callable[[dict], object]
    ):
        self.place, self.number, self.write = place, number, write
        self.chance = random.Random(f"{seed}/{number}")
        self.strikes, self.struck, self.starts, self.findings = strikes, 0, 0, 0
        self.roaming = number % 3 == 2
        self.fixed = self._draw() | {"ranks": place.ranks[(number + number // 3) % len(place.ranks)]}  # as many of each
        self.run, self.notes = place.small / f"run-{number}", place.root / f"notes-{number}"
        self.hows: dict[int, tuple[str, int, str]] = {}
        self.holes = False  # lines of metrics may be missing: there was a time without a disk

    def _draw(self) -> dict:
        return {
            "ranks": self.chance.choice(self.place.ranks),
            "engine": self.chance.choice(["plain", "deepspeed"]),
            "decode": self.chance.choice(self.place.decoders),
        }

    def until_done(self, kills: int) -> None:
        """Strike until the run ends by itself; after `kills` strikes nothing disturbs it any more."""
        while not self._once(self.struck < kills):
            assert self.starts < 60, f"sweep {self.number} does not end"
        self._compare()
        shutil.rmtree(self.run)

    def _begin(self, how: dict, more: list[str], **settings) -> Running:
        self.starts += 1
        words = [*WORDS, f"engine.kind={how['engine']}", f"data.decode={how['decode']}", f"run.out={self.run}"]
        words += [f"data.train={self.place.sources[how['storage']]}", f"data.val={self.place.sources['folder']}", *more]
        output = self.place.root / f"output-{self.number}-{self.starts}"
        start = Start(
            self.starts,
            how["launcher"],
            how["ranks"],
            words,
            str(output),
            str(self.notes),
            bug=self.place.bug,
            **settings,
        )
        return Running(start, forked(run, start), self.run, self.place.small, self.chance)

    def _once(self, disturb: bool) -> bool:
        """One start and what becomes of it; whether the run is done."""
        how = self._draw() if self.roaming else dict(self.fixed)
        how["launcher"] = self.chance.choice(["deepspeed", "torchrun", *(["python"] * 4 if how["ranks"] == 1 else [])])
        how["storage"] = self.chance.choice(list(self.place.sources))
        name = self.chance.choices(list(self.strikes), list(self.strikes.values()))[0] if disturb else "none"
        strike, before = STRIKES[name], newest_sound(self.run)
        self.hows[self.starts + 1] = _what(how)
        reference = self._reference(((STEPS, _what(how)),))
        if self.chance.random() < 0.2:  # before it trains
            step, delay = None, self.chance.uniform(0, reference.begins_s)
        else:
            step = min((before or 0) + self.chance.randrange(14), STEPS - 2)
            delay = self.chance.uniform(0, 2 * reference.step_s)
        settings = strike.settings(self.chance, self.place.root)
        running = self._begin(how, settings.pop("words", []), **settings)
        struck = strike.strikes(running, step, delay)
        line = {"sweep": self.number, "start": self.starts, **how, "strike": name, "at_step": step, **struck}
        findings = self._judge(running, before, strike, line)
        self.struck += bool(struck)
        self.holes |= strike.leaves_holes
        done = running.status.get("state") == "done" and running.code == 0
        if not done and self.chance.random() < 0.5:
            line["damage"] = damage(self.run, self.chance)
        if not done and self.chance.random() < 0.1 and self.run.exists():
            self.run = self.run.rename(self.run.with_name(f"run-{self.number}-{self.starts}"))
        self._report(line, findings)
        return done

    def _judge(self, running: Running, before: int | None, strike: Strike, line: dict) -> list[str]:
        running.join(HANGS_S)
        found = running.complaints
        if running.hung:
            found.append(f"hung for {HANGS_S} s")
        strike.undo(running)
        if orphans := running.orphans(ORPHANS_S):
            found.append(f"orphans: {orphans}")
        steps, after = running.steps(), newest_sound(self.run)
        line |= {"code": running.code, "state": running.status.get("state"), "begun_at": before, "stands": after}
        line |= {"trained_to": max(steps, default=None), "ended_s": round(running.seconds, 2), "said": running.said()}
        if steps and min(steps) != (before or 0):
            found.append(f"went on from step {min(steps)} where checkpoint {before} stood")
        if (after or 0) < (before or 0):
            found.append(f"checkpoint {before} stood before, {after} after")
        if steps and not strike.stops_writing and max(steps) + 1 - (after or 0) > 2 * EVERY:
            found.append(f"{max(steps) + 1 - (after or 0)} steps lost")
        state, at_end = running.status.get("state"), after == STEPS
        if strike.graceful and running.was_training and state not in ("stopped", "done") and not at_end:
            found.append(f"asked to stop, and STATUS.json says {running.status}")
        if strike.graceful and state == "stopped" and running.status["steps"] != after:
            found.append(f"stopped after {running.status['steps']} steps, and checkpoint {after} stands")
        if not line.get("struck") and running.code != 0:
            found.append("ended by itself, and not well")
        return found

    def _compare(self) -> None:
        """The end against that of the undisturbed run of the same course."""
        ids, by = trained_on(_lines(self.notes))
        course = [(step + 1, self.hows[by[step]]) for step in sorted(by)]
        reference = self._reference(
            tuple(
                one for one, following in zip(course, [*course[1:], (0, None)], strict=True) if one[1] != following[1]
            )
        )
        seen = Counter(tuple(pair) for step in ids.values() for pair in step)
        planned = Counter(tuple(pair) for step in reference.ids.values() for pair in step)
        repeated, missing = sorted((seen - planned).elements()), sorted((planned - seen).elements())
        found = ["other images, or in another order"] if ids != reference.ids else []
        line = {"sweep": self.number, "roaming": self.roaming, "starts": self.starts, "struck": self.struck}
        line |= {"ids": seen.total(), "repeated": repeated, "missing": missing}
        try:
            line |= self._unequal(reference)
        except (OSError, ValueError, KeyError) as error:
            found.append(f"the end cannot be read: {type(error).__name__}: {error}")
        found += [
            f"{name}: {line[name]}" for name in ("unequal_lines", "unequal_tensors", "lines_missing") if line.get(name)
        ]
        self._report(line, found)

    def _unequal(self, reference: Reference) -> dict:
        """Bit for bit. Held-out lines are those of whole epochs: an undisturbed run has one wherever it was stopped."""
        ours, theirs = (
            {key: line for key, line in learnt(run).items() if not key[1] or (key[0] + 1) % 10 == 0}
            for run in (self.run, reference.folder)
        )
        missing, tensors = sorted(theirs.keys() - ours.keys()), []
        for name in FILES[:3]:
            a, b = (load_file(run / f"checkpoints/step-{STEPS:08d}" / name) for run in (self.run, reference.folder))
            if a.keys() != b.keys():
                raise KeyError(name)
            tensors += [key for key in a if not torch.equal(a[key], b[key])]
        return {
            "unequal_lines": [key for key, line in ours.items() if line != theirs.get(key)],
            "unequal_tensors": tensors,
            "lines_missing": [] if self.holes else missing,
            "lines_in_holes": len(missing) if self.holes else 0,
        }

    def _reference(self, course: Course) -> Reference:
        references = self.place.references
        if course not in references:
            references[course] = self._undisturbed(course, self.place.root / f"whole-{len(references)}")
        return references[course]

    def _undisturbed(self, course: Course, folder: Path) -> Reference:
        """Stopped where it changes, and by run.max_steps alone; made without the bug that a sweep is to find."""
        notes, output = folder.with_suffix(".notes"), folder.with_suffix(".output")
        for number, (until, (engine, ranks, decode)) in enumerate(course):
            words = [*WORDS, f"engine.kind={engine}", f"data.decode={decode}", f"run.out={folder}"]
            words += [f"data.{name}={self.place.sources['folder']}" for name in ("train", "val")]
            start = Start(
                number, "python" if ranks == 1 else "torchrun", ranks, [*words, f"run.max_steps={until}"], str(output), str(notes)
            )  # fmt: skip
            began = time.monotonic()
            running = Running(start, forked(run, start), folder, self.place.small, self.chance)
            running.wait(running.steps, HANGS_S)
            begins = time.monotonic() - began
            running.join(HANGS_S)
            assert running.code == 0, output.read_text()
        ids, _ = trained_on(_lines(notes))
        return Reference(folder, ids, begins, (time.monotonic() - began - begins) / STEPS)

    def _report(self, line: dict, findings: list[str]) -> None:
        self.findings += len(findings)
        self.write(line | ({"found": findings} if findings else {}))


def _what(how: dict) -> tuple[str, int, str]:
    return how["engine"], how["ranks"], how["decode"]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sweeps(
    place: Place, seed: int, kills: int, each: int, strikes: dict[str, float], write: Callable[[dict], object]
) -> int:
    """Sweeps until `kills` strikes have struck, at most `each` a sweep; how many things were found."""
    struck = found = number = 0
    while struck < kills:
        sweep = Sweep(place, number, seed, strikes, write)
        sweep.until_done(min(each, kills - struck))
        struck, found, number = struck + sweep.struck, found + sweep.findings, number + 1
    return found
