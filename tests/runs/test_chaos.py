"""Chaos: kills at any instant, damage between them; the end is that of the undisturbed run, bit for bit."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import metrics
from fastrot.runs.checkpoint import verify
from workers import narrow

STEPS = 40
WORDS = [
    "train", "model.arch=resnet18", "data.crop=16", "data.decode=torch", "optim.images_per_step=2", "optim.lr=0.01",
    "optim.epochs=7", "optim.warmup_epochs=0", "run.log_every=1", "run.checkpoint_every=3", "run.tensorboard=false",
    "engine.kind=plain", f"run.max_steps={STEPS}",
]  # fmt: skip
LEARNT = ("step", "epoch", "loss", "accuracy", "lr", "grad_norm")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torchvision", "torch._dynamo", "fastrot.cli", "fastrot.runs.run"])


def train(words: list[str], output: Path) -> None:
    """A process of its own, as a user's would be, forked from one that has imported torch."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from fastrot.cli import main

    narrow.turn_on()
    os._exit(main(words))


def started(words: list[str], output: Path) -> multiprocessing.Process:
    process = FORKS.Process(target=train, args=(words, output))
    process.start()
    return process


def words_of(images: Path, run: Path) -> list[str]:
    return [*WORDS, f"data.train={images}", f"run.out={run}"]


def learnt(run: Path) -> list[list]:
    return [[line[key] for key in LEARNT] for line in metrics(run)]


def flip_a_bit(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def damage(run: Path, chance: random.Random) -> str:
    """Break one thing that a disk or a careless hand may break, so that a sound checkpoint is left; what it was."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    sound = [folder for folder in folders if folder.is_dir() and not verify(folder)]
    (run / "checkpoints" / ".tmp-step-00000099").mkdir(exist_ok=True, parents=True)
    kinds = ["half a line of metrics", "best is []", "half a STATUS.json"]
    if len(sound) > 1:
        kinds += ["bit", "cut", "gone", "empty manifest"] * 2
    kind, newest = chance.choice(kinds), sound[-1] if sound else None
    name = chance.choice(["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
    match kind:
        case "half a line of metrics":
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 3, "los')
        case "best is []":
            (run / "checkpoints" / "best").write_text("[]")
        case "half a STATUS.json":
            (run / "STATUS.json").write_text('{"state": "run')
        case "bit":
            flip_a_bit(newest / name, chance)
        case "cut":
            os.truncate(newest / name, (newest / name).stat().st_size // 2)
        case "gone":
            (newest / name).unlink()
        case "empty manifest":
            (newest / "manifest.json").write_text('{"files": {}}')
    return f"{kind} {newest.name if newest else ''} {name}"


@pytest.fixture(scope="module")
def whole(images, made_once):
    """The undisturbed run, and the seconds that it took."""

    def run(folder):
        began = time.monotonic()
        process = started(words_of(images, folder / "run"), folder / "output")
        process.join()
        assert process.exitcode == 0, (folder / "output").read_text()
        (folder / "seconds").write_text(f"{time.monotonic() - began}")

    folder = made_once("undisturbed", run)
    return folder / "run", float((folder / "seconds").read_text())


@pytest.mark.parametrize("seed, kills", [(1, 2), *(pytest.param(s, 10, marks=pytest.mark.slow) for s in range(2, 7))])
def test_killed_and_damaged_at_any_time_it_ends_as_if_nothing_had_been(whole, images, tmp_path, seed, kills):
    run, output, chance = tmp_path / "run", tmp_path / "output", random.Random(seed)
    judge, seconds = whole
    history, done = [], 0
    while done < kills:
        process = started(words_of(images, run), output)
        while not done and process.exitcode is None and not (run / "checkpoints/latest").exists():
            process.join(0.01)  # the first kill leaves something to go on from, the others come at any time
        process.join(chance.uniform(0.1, seconds) if done else chance.uniform(0, seconds / 4))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            done += 1
            history.append(f"killed, then: {damage(run, chance)}")
        else:
            assert process.exitcode == 0, "\n".join(history) + "\n" + output.read_text()
            history.append("ended; begun again")
            shutil.rmtree(run)
    last = started(words_of(images, run), output)
    last.join()
    assert last.exitcode == 0, "\n".join(history) + "\n" + output.read_text()
    print(*history, sep="\n", file=sys.stderr)
    assert "resumed from step-" in output.read_text()
    assert learnt(run) == learnt(judge)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(folder / f"checkpoints/step-{STEPS:08d}" / name) for folder in (run, judge))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
