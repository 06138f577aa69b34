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
NEAR = 0.02  # of a loss, between ranks and decoders that round otherwise


@dataclass
class Place:
    """Where sweeps work. sources: the same images by kind of storage; small: a disk of a few MB for run folders."""

    root: Path
    small: Path
    sources: dict[str, Path]
    decoders: list[str]
    bug: str = ""
    references: dict[tuple, "Reference"] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """The undisturbed run: its folder, the images of each step, seconds until its first step and of each."""

    folder: Path
    ids: dict[int, list]
    begins_s: float
    step_s: float


def make_place(root: Path, small: Path, bug: str = "") -> Place:
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
    return Place(root, small, sources, [name for name in runnable_decoders() if name in ("torch", "turbo", "pil")], bug)


def newest_sound(run: Path) -> int | None:
    """Steps completed by the newest checkpoint that is whole; None where there is none."""
    whole = sound(run)
    return int(whole[-1].name.removeprefix("step-")) if whole else None


def trained_on(notes: list[dict]) -> dict[int, list]:
    """Of each step the (epoch, row) that its ranks noted, in their order; a start drops what it does again."""
    steps: dict[int, dict[int, list]] = {}
    begun: set[int] = set()
    for note in (note for note in notes if "step" in note):
        if note["start"] not in begun:
            begun.add(note["start"])
            steps = {step: ranks for step, ranks in steps.items() if step < note["step"]}
        ids = [list(pair) for pair in zip(note["epochs"], note["rows"], strict=True)]
        steps.setdefault(note["step"], {}).setdefault(note["rank"], []).extend(ids)
    return {step: list(chain(*(ids for _, ids in sorted(ranks.items())))) for step, ranks in sorted(steps.items())}


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
        self.fixed = self._draw()
        self.run, self.notes = place.small / f"run-{number}", place.root / f"notes-{number}"
        self.holes = False  # lines of metrics may be missing: there was a time without a disk

    def _draw(self) -> dict:
        return {
            "ranks": self.chance.choice([1, 2, 3]),
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
        how["launcher"] = self.chance.choice(["deepspeed", "torchrun", *(["python"] * 2 if how["ranks"] == 1 else [])])
        how["storage"] = self.chance.choice(list(self.place.sources))
        name = self.chance.choices(list(self.strikes), list(self.strikes.values()))[0] if disturb else "none"
        strike, before = STRIKES[name], newest_sound(self.run)
        reference = self._reference(how)
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
        found = []
        running.join(HANGS_S)
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
        """The end against the undisturbed run's."""
        reference = self._reference(self.fixed)
        notes = [json.loads(line) for line in self.notes.read_text().splitlines()]
        ids, found = trained_on(notes), []
        seen = Counter(tuple(pair) for step in ids.values() for pair in step)
        planned = Counter(tuple(pair) for step in reference.ids.values() for pair in step)
        repeated, missing = sorted((seen - planned).elements()), sorted((planned - seen).elements())
        if ids != reference.ids:
            found.append("other images, or in another order")
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
        ours, theirs = learnt(self.run), learnt(reference.folder)
        missing = sorted(theirs.keys() - ours.keys())
        same = self._near if self.roaming else lambda a, b: a == b
        lines = [key for key, line in ours.items() if key not in theirs or not same(line, theirs[key])]
        tensors = []
        for name in FILES[:3]:
            a, b = (load_file(run / f"checkpoints/step-{STEPS:08d}" / name) for run in (self.run, reference.folder))
            if a.keys() != b.keys():
                raise KeyError(name)
            if self.roaming:
                tensors += [key for key in a if not torch.allclose(a[key].float(), b[key].float(), rtol=0.1, atol=0.05)]
            else:
                tensors += [key for key in a if not torch.equal(a[key], b[key])]
        far = max((abs(ours[key]["loss"] - theirs[key]["loss"]) for key in ours if "loss" in ours[key]), default=0.0)
        return {
            "unequal_lines": lines,
            "unequal_tensors": tensors,
            "lines_missing": [] if self.holes else missing,
            "lines_in_holes": len(missing) if self.holes else 0,
            "largest_loss_difference": far,
        }

    @staticmethod
    def _near(ours: dict, theirs: dict) -> bool:
        exact = all(ours[name] == theirs[name] for name in ("step", "epoch", "lr") if name in theirs)
        return exact and all(
            abs(ours[name] - theirs[name]) <= NEAR for name in ("loss", "held_out_loss") if name in theirs
        )

    def _reference(self, how: dict) -> Reference:
        key = how["engine"], how["ranks"], how["decode"]
        references = self.place.references
        if key not in references:
            references[key] = self._undisturbed(how, self.place.root / "-".join(map(str, ("whole", *key))))
        return references[key]

    def _undisturbed(self, how: dict, folder: Path) -> Reference:
        """Made without the bug that a sweep is to find."""
        words = [*WORDS, f"engine.kind={how['engine']}", f"data.decode={how['decode']}", f"run.out={folder}"]
        words += [f"data.{name}={self.place.sources['folder']}" for name in ("train", "val")]
        notes, output = folder.with_suffix(".notes"), folder.with_suffix(".output")
        start = Start(0, "python" if how["ranks"] == 1 else "torchrun", how["ranks"], words, str(output), str(notes))
        began = time.monotonic()
        running = Running(start, forked(run, start), folder, self.place.small, self.chance)
        running.wait(lambda: running.steps(), HANGS_S)
        begins = time.monotonic() - began
        running.join(HANGS_S)
        assert running.code == 0, output.read_text()
        ids = trained_on([json.loads(line) for line in notes.read_text().splitlines()])
        return Reference(folder, ids, begins, (time.monotonic() - began - begins) / STEPS)

    def _report(self, line: dict, findings: list[str]) -> None:
        self.findings += len(findings)
        self.write(line | ({"found": findings} if findings else {}))


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
