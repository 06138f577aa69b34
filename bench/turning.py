"""python bench/turning.py SHARED/data/photos10 [--images 2000] [--seed 0]

Photographs turned at random by jpegtran (Debian's libjpeg-turbo-progs), half of them with one of the eight EXIF tags, half with
none; put upright without loss by their true answers, in place, killed (SIGKILL) in the middle, gone on with, undone; and once
as a copy. Prints counts and seconds as JSON; exit code 1 where a pixel, a byte, a mode or a time differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]

from fastrot.orient import journal  # noqa: E402
from fastrot.orient.answers import Answer  # noqa: E402
from fastrot.orient.turning import apply  # noqa: E402

TURN = {0: [], 90: ["-rotate", "270"], 180: ["-rotate", "180"], 270: ["-rotate", "90"]}  # counter-clockwise
# of an EXIF tag, what takes upright pixels to those that are stored under it
STORED = {
    1: [], 2: ["-flip", "horizontal"], 3: ["-rotate", "180"], 4: ["-flip", "vertical"], 5: ["-transpose"],
    6: ["-rotate", "270"], 7: ["-transverse"], 8: ["-rotate", "90"],
}  # fmt: skip


def jpegtran(data: bytes, words: list[str]) -> bytes:
    command = ["jpegtran", "-perfect", "-copy", "all", *words]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout if words else data


def with_tag(data: bytes, orientation: int) -> bytes:
    """A JPEG with a block of one tag, little-endian."""
    block = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation]) + bytes(7)
    return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]


def turned(photographs: list[Path], folder: Path, seed: int) -> Iterator[tuple[Answer, Path]]:
    """Write each photograph turned; its true answer, and the photograph."""
    draw = random.Random(seed)
    for number, photograph in enumerate(photographs):
        clockwise, tag = draw.choice(list(TURN)), draw.choice(list(STORED)) if number % 2 else 1
        data = jpegtran(jpegtran(photograph.read_bytes(), TURN[clockwise]), STORED[tag])
        name = f"{photograph.parent.name}/{number:05}.jpg"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(with_tag(data, tag) if number % 2 else data)
        os.utime(path, ns=(10**18, 10**18 + number))
        yield Answer(name, number, None, clockwise, (1.0, 0.0, 0.0, 0.0), True, tag), photograph


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Of every file: sha256, mode, modification time."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in files
    }


def unequal(folder: Path, truth: list[tuple[Answer, Path]]) -> int:
    """Files whose stored pixels are not the photograph's, or whose tag does not say that they are upright."""
    count = 0
    for said, photograph in truth:
        with Image.open(folder / said.file) as image, Image.open(photograph) as wanted:
            upright = image.getexif().get(0x0112, 1) == 1
            count += not (upright and np.array_equal(np.asarray(image), np.asarray(wanted)))
    return count


def killed_in_the_middle(place: Path, lines: int) -> int:
    """Carry the answers out in another process and kill it; lines of its journal then."""
    book = place / "photos.orient-journal.jsonl"
    work = subprocess.Popen([sys.executable, __file__, "--carry-out", str(place)])
    while work.poll() is None and not (book.exists() and book.read_bytes().count(b"\n") > lines):
        time.sleep(0.001)
    work.send_signal(signal.SIGKILL)
    work.wait()
    return book.read_bytes().count(b"\n") - 1


def carry_out(place: Path, how: str = "lossless") -> dict:
    answers = [Answer(**said) for said in json.loads((place / "answers.json").read_text())]
    return apply(answers, place / "photos", how, in_place=how == "lossless").plain()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--carry-out", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.carry_out:
        carry_out(args.photographs)
        return 0
    photographs = sorted(args.photographs.rglob("*.jp*g"))
    photographs = random.Random(args.seed).sample(photographs, min(args.images, len(photographs)))
    with tempfile.TemporaryDirectory(dir=Path.cwd() / "build" if Path("build").is_dir() else None) as folder:
        place = Path(folder)
        truth = list(turned(photographs, place / "photos", args.seed))
        (place / "answers.json").write_text(json.dumps([asdict(said) for said, _ in truth]))
        before = state(place / "photos")
        report = {"images": len(truth), "to be turned": sum(said.clockwise != 0 for said, _ in truth)}
        report["not upright before"] = unequal(place / "photos", truth)
        report |= struck_and_undone(place, truth, before)
        began = time.monotonic()
        report["copy"] = {key: n for key, n in carry_out(place, f"copy:{place}/out")["counts"].items() if n}
        report["copy_seconds"] = round(time.monotonic() - began, 2)
        report["source touched by the copy"] = sum(before[name] != one for name, one in state(place / "photos").items())
    print(json.dumps(report, indent=1))
    return int(any(report[key] for key in report if key.startswith(("damaged", "unequal", "not as", "source"))))


def struck_and_undone(place: Path, truth: list[tuple[Answer, Path]], before: dict[str, tuple[str, int, int]]) -> dict:
    report: dict = {"replaced when killed": killed_in_the_middle(place, len(truth) // 3)}
    at_kill = state(place / "photos")
    began = time.monotonic()
    done = carry_out(place)
    report["going on"] = {key: n for key, n in done["counts"].items() if n}
    report["going_on_seconds"] = round(time.monotonic() - began, 2)
    after = state(place / "photos")
    files = {name: one for name, one in at_kill.items() if ".tmp-" not in name}
    report["damaged by the kill"] = sum(one not in (before[name], after[name]) for name, one in files.items())
    report["unequal to the photographs"] = unequal_where_turned(place, truth)
    began = time.monotonic()
    report["undone"] = journal.undo(Path(done["journal"]))["given_back"]
    report["undo_seconds"] = round(time.monotonic() - began, 2)
    now = state(place / "photos")
    report["not as before after undo"] = len(now.keys() ^ before.keys()) + sum(
        before.get(name) != now[name] for name in now
    )
    began = time.monotonic()
    done = carry_out(place)
    report["in place, undisturbed"] = {key: n for key, n in done["counts"].items() if n}
    report["in_place_seconds"] = round(time.monotonic() - began, 2)
    report["originals_bytes"] = done["originals_bytes"]
    report["unequal to the photographs, undisturbed"] = unequal_where_turned(place, truth)
    journal.undo(Path(done["journal"]))
    return report


def unequal_where_turned(place: Path, truth: list[tuple[Answer, Path]]) -> int:
    """An image that is shown upright, by a tag or without one, is not touched: it is compared as it is shown."""
    touched = [(said, photograph) for said, photograph in truth if said.clockwise or said.exif == 1]
    return unequal(place / "photos", touched)


if __name__ == "__main__":
    sys.exit(main())
