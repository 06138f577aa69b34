"""Which way from JPEG bytes on a disk to random-resized crops in memory is the fastest, and at what cost?

Ours is what training uses (Plan, Storage, Decoder, Loader); peers run on the same files in the same rounds, each at the
better of two thread counts. A gate comes first: ours must show the plan's windows and the torch decoder's pixels within
the decoder's stated error; every arm's windows must follow the law of RandomResizedCrop, read off images whose colours
are their coordinates. Peers: `pip install -r bench/requirements.txt`; one that is missing is listed with the reason.
"""

import ctypes
import mmap
import os
import tempfile
import time
from pathlib import Path

import arena
import harness
import loader_arms
import numpy as np
import plot
import torch
from loader_arms import ARMS, BATCH, COLD, RATIO, SCALE, SIDE, Files
from PIL import Image

from fastrot import __version__, machine
from fastrot.data.decode import STATED
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.terminal import track

_CHECKED = 2  # batches of ours that are compared with the plan and the torch decoder
_READ = 8  # batches whose windows are read off
_LEAST_P = 1e-5  # of the Kolmogorov-Smirnov tests: about a hundred are made
_SHOWN = (4, 8)  # rows and columns of a contact sheet
# What the figures must show: of whom, against whom (the best of them).
RATIOS = [
    ("ours: dali, folder", ["DALI reader"]),
    ("ours: ffcv, side500.beton", ["FFCV, side500.beton"]),
    ("ours: ffcv, mixed500.beton", ["FFCV, mixed500.beton"]),
    ("ours: ffcv, keep.beton", ["FFCV, keep.beton"]),
    ("ours: turbo, raw256.beton", ["FFCV, raw256.beton"]),
    ("ours: fastrot.Loader in a plain loop", ["ours: turbo, folder"]),
    ("ours: turbo, folder", ["bare decode, simplejpeg", "bare decode, decode_jpeg"]),
    ("ours: turbo, folder", ["FFCV, side500.beton"]),
    ("ours: turbo, folder", ["DataLoader, Pillow", "DataLoader, decode_jpeg"]),
    ("ours: turbo_fast, folder", ["DataLoader, Pillow", "DataLoader, decode_jpeg"]),
    ("ours: turbo, raw256.beton", ["DataLoader, Pillow", "DataLoader, decode_jpeg"]),
]


def as_crops(batch) -> np.ndarray:
    """A batch as uint8 [n, S, S, 3]."""
    crops = np.asarray(batch)
    crops = crops if crops.shape[-1] == 3 else crops.transpose(0, 2, 3, 1)
    if crops.shape != (len(batch), SIDE, SIDE, 3) or crops.dtype != np.uint8:
        raise ValueError(f"gives {crops.dtype} {crops.shape}")
    return crops


def shown(name: str, files: Files, drawn: Files, threads: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """In a process of its own: ours against the plan; first crops of coordinate images, and of the real ones."""
    found = against_plan(name, files, threads) if ARMS[name].decoder else {}
    crops = []
    for source, batches in ((drawn, _READ), (files, 1)):
        flow = ARMS[name].make(source, threads)
        crops.append(np.concatenate([as_crops(next(flow)).copy() for _ in range(batches)]))
    return found, *crops


def against_plan(name: str, files: Files, threads: int) -> dict:
    """Ours: rows and windows are the plan's, and the pixels' error against the torch decoder, in levels."""
    arm = ARMS[name]
    made, oracle = (loader_arms.loader(files, arm.form, decoder, threads) for decoder in (arm.decoder, "torch"))
    flows = [one.train(range(_CHECKED), 0, BATCH, 1, 0, 1, lambda epoch: SIDE) for one in (made, oracle)]
    means = []
    for got, want in zip(*flows, strict=True):
        (got,), (want,) = got.micro_steps, want.micro_steps
        plan = made.plan.at(len(means), len(means) + BATCH)
        for field in ("rows", "windows", "flips", "turns"):
            np.testing.assert_array_equal(getattr(got.sample, field), getattr(plan, field))
        means += (got.pixels.float() - want.pixels.float()).abs().mean((1, 2, 3)).tolist()
    mean, worst = float(np.mean(means)), max(means)
    most = STATED[arm.decoder]
    if mean > most[0] or worst > most[1]:
        raise ValueError(f"pixels {mean:.3f} levels from torch's, the worst image {worst:.2f}; stated {most}")
    return {"pixels_mean": mean, "pixels_worst_image": worst}


def coordinates(home: Path, count: int = 64, height: int = 375, width: int = 500) -> list[str]:
    """JPEGs whose red is the column and whose green is the row, both from 0 to 255."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * (x + 0.5) / width, 255 * (y + 0.5) / height, np.full(x.shape, 128)], -1)
    home.mkdir()
    paths = [str(home / f"{at}.jpg") for at in range(count)]
    for path in paths:
        Image.fromarray(pixels.round().astype(np.uint8)).save(path, quality=95, subsampling=0)
    return paths


def windows_of(crops: np.ndarray) -> np.ndarray:
    """Windows of crops of coordinate images, as shares of the image: [n, 4] top, left, height, width."""
    at = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    down, across = (crops[..., channel].mean(axis, dtype=float) / 255 for channel, axis in ((1, 2), (0, 1)))
    height, width = (line @ at / (at @ at) for line in (down, across))
    return np.stack([down.mean(1) - height / 2, across.mean(1) - width / 2, height, width], 1)


def against_law(crops: np.ndarray) -> dict[str, float]:
    """p of Kolmogorov-Smirnov tests of these windows against RandomResizedCrop's: area, shape, place."""
    from scipy.stats import ks_2samp
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    draw, image = RandomResizedCrop(SIDE, SCALE, RATIO), [torch.empty(3, 375, 500)]
    drawn = [draw.make_params(image) for _ in range(5000)]
    law = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn]) / (375, 500, 375, 500)
    facts = {
        "area": lambda w: w[:, 2] * w[:, 3],
        "shape": lambda w: w[:, 3] / w[:, 2],
        "top": lambda w: w[:, 0],
        "left": lambda w: w[:, 1],
    }
    seen = windows_of(crops)
    p = {name: float(ks_2samp(fact(seen), fact(law)).pvalue) for name, fact in facts.items()}
    if min(p.values()) < _LEAST_P:
        raise ValueError(f"windows do not follow the law: p {p}")
    return p


def sheet(crops: np.ndarray, path: Path) -> None:
    """A contact sheet of the first crops, for the eye."""
    rows, columns = _SHOWN
    tiles = crops[: rows * columns, ::2, ::2].reshape(rows, columns, SIDE // 2, SIDE // 2, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tiles.transpose(0, 2, 1, 3, 4).reshape(rows * SIDE // 2, columns * SIDE // 2, 3)).save(path)


def gate(name: str, files: Files, drawn: Files, threads: int, sheets: Path) -> dict:
    """What an arm was found to show. Raises Lost or ValueError where it is not what it should be."""
    if not ARMS[name].cropped:
        return {}
    found, coloured, photographs = arena.call(shown, name, files, drawn, threads, patience_s=120)
    found["windows_p"] = against_law(coloured)
    sheet(photographs, sheets / f"{name.replace(': ', '_').replace(', ', '_')}.png")
    return found


def resident(paths: list[str]) -> float:
    """Share of the files' pages that lie in the page cache (mincore)."""
    libc, page, inside, total = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, 0, 0
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for path in paths:
        handle, size = os.open(path, os.O_RDONLY), os.path.getsize(path)
        at, pages = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0), -(-size // page)
        seen = ctypes.create_string_buffer(pages)
        libc.mincore(at, size, seen)
        libc.munmap(at, size)
        os.close(handle)
        inside, total = inside + sum(byte & 1 for byte in seen.raw), total + pages
    return inside / total


def drop(paths: list[str]) -> float:
    """Ask the kernel to forget the files; the share that it kept."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return resident(paths)


def race(started: dict[str, arena.Contestant], args, cold: list[str] | None) -> tuple[dict, dict, list[float]]:
    """Laps by arm, why an arm was lost, and what share of `cold` files was still cached at the start of each lap."""
    laps, lost, kept = {name: [] for name in started}, {}, []
    turns = [(at, name) for at in range(args.rounds) for name in (started if at % 2 == 0 else reversed(started))]
    for _, name in track(turns, len(turns), "rounds"):
        if name in lost:
            continue
        try:
            if cold:
                kept.append(drop(cold))
            laps[name].append(started[name].lap(args.seconds, len(cold) // 2 if cold else None))
        except arena.Lost as why:
            lost[name] = str(why)
    return laps, lost, kept


def best_of(name: str, cold: bool, files: Files, settings: list[int], seconds: float) -> tuple[arena.Contestant, int]:
    """The arm at its fastest thread count, started; one that it refuses is passed over. Raises Lost."""
    best, kept = (0.0, 0), None
    for threads in settings:
        try:
            one = arena.Contestant(loader_arms.make, name, cold, files, threads)
            pace = (lap := one.lap(seconds)).images / lap.wall_s if len(settings) > 1 else 1.0
        except (arena.Lost, ValueError):
            if kept is None:
                raise
            continue
        if pace > best[0]:
            best, kept, one = (pace, threads), one, kept
        if one:
            one.close()
    return kept, best[1]


def row(name: str, arm, laps: list[arena.Lap], threads: int, gated: dict) -> dict:
    return {
        "arm": name,
        "version": __version__ if arm.decoder else harness.version_of(arm.package),
        "reads": arm.form,
        "threads": threads,
        "images_per_s": harness.spread(lap.images / lap.wall_s for lap in laps),
        "cpu_ms_per_image": harness.spread(1000 * lap.cpu_s / lap.images for lap in laps),
        "peak_mib": max(lap.peak_mib for lap in laps),
        "gate": gated,
    }


def ratios(laps: dict[str, list[arena.Lap]]) -> list[dict]:
    """images/s of ours over the best peer's, and CPU seconds an image of that peer over ours, round by round."""
    pace = {name: [lap.images / lap.wall_s for lap in of] for name, of in laps.items() if of}
    cost = {name: [lap.cpu_s / lap.images for lap in of] for name, of in laps.items() if of}
    out = []
    for ours, peers in RATIOS:
        peers = [peer for peer in peers if peer in pace]
        if ours not in pace or not peers:
            continue
        best = max(peers, key=lambda peer: np.median(pace[peer]))
        faster = harness.spread(a / b for a, b in zip(pace[ours], pace[best], strict=False))
        cheaper = harness.spread(b / a for a, b in zip(cost[ours], cost[best], strict=False))
        out.append({"of": ours, "against": best, "faster": faster, "cheaper_in_cpu": cheaper})
    return out


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument(
        "--data", required=True, metavar="SOURCE", help="a folder of class folders of JPEGs, or list:FILE"
    )
    options.add_argument("--arms", nargs="+", metavar="TEXT", help="only arms whose name contains one of these")
    options.add_argument("--seconds", type=float, default=2, help="of a timed lap")
    options.add_argument(
        "--threads", type=int, nargs="+", help="thread counts to choose from; default: cores, and half as many more"
    )
    options.add_argument("--cold", action="store_true", help="drop the files from the page cache before each lap")
    options.add_argument("--sheets", type=Path, default=Path("runs/loader_sheets"), help="folder of the contact sheets")
    args = options.parse_args()
    arms = {n: a for n, a in (COLD if args.cold else ARMS).items() if not args.arms or any(t in n for t in args.arms)}
    cores = machine.cores()
    settings = args.threads or ([cores] if args.cold else [cores, cores + max(1, cores // 2)])
    began = time.monotonic()
    result = {"facts": harness.facts(), "batch": BATCH, "side": SIDE, "rows": [], "missing": {}}
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as home:
        home = Path(home)
        os.environ["FASTROT_CACHE"] = str(home / "cache")
        manifest = Manifest.load(index(args.data, home / "manifests", 10**9, track))
        paths = [
            os.fsdecode(manifest.path(at))
            for at in range(len(manifest))
            if manifest.name(at).lower().endswith((".jpg", ".jpeg"))
        ]
        if args.cold:
            paths = copies(paths, home / "copies")
        files = loader_arms.prepare(paths, home / "images", all_forms=not args.cold)
        drawn = loader_arms.prepare(coordinates(home / "drawn"), home / "coordinates", all_forms=not args.cold)
        started, chosen, gated, lost = {}, {}, {}, {}
        try:
            for name in track(list(arms), len(arms), "gate and thread counts"):
                try:
                    if arms[name].form == "litdata":
                        for one in (files, drawn):
                            arena.call(loader_arms.write_litdata, one, patience_s=180)
                    gated[name] = {} if args.cold else gate(name, files, drawn, settings[0], args.sheets)
                    started[name], chosen[name] = best_of(name, args.cold, files, settings, args.seconds / 2)
                except (arena.Lost, ValueError) as why:
                    lost[name] = str(why)
                    print(f"{name}: {why}", flush=True)
            laps, fell, kept = race(started, args, paths if args.cold else None)
        finally:
            for one in started.values():
                one.close()
    result["missing"] = lost | fell
    result["rows"] = [row(n, arms[n], of, chosen[n], gated[n]) for n, of in laps.items() if of and n not in fell]
    result["ratios"] = ratios(laps)
    if args.cold:
        result["cached_at_start_of_lap"] = harness.spread(kept)
    result["took_s"] = time.monotonic() - began
    harness.write(args.out, __doc__.splitlines()[0], result)
    if args.out:
        picture(args.out.with_suffix(".svg"), result["rows"])


def picture(out: Path, rows: list[dict]) -> None:
    """Images a second of every arm by what it reads, the fastest first."""
    groups: dict[str, dict] = {}
    for entry in sorted(rows, key=lambda entry: -entry["images_per_s"]["median"]):
        form, spread = entry["reads"], entry["images_per_s"]
        made = "raw pixels, side 256" if "raw" in form else "JPEGs made anew, side 500"
        group = made if "raw" in form or "500" in form else "JPEGs as they are"
        label = f"{entry['arm']} ({entry['version']})"
        groups.setdefault(group, {})[label] = (spread["median"], spread["least"], spread["most"])
    plot.bars(out, "Bytes on disk to crops in memory: median, least and most; a scale a group", "images/s", groups)


def copies(paths: list[str], home: Path, count: int = 4096) -> list[str]:
    """Copies of the files, synced, so many that a lap reads none twice."""
    home.mkdir()
    made = [str(home / f"{at}.jpg") for at in range(-(-count // len(paths)) * len(paths))]
    for at, path in enumerate(made):
        Path(path).write_bytes(Path(paths[at % len(paths)]).read_bytes())
    os.sync()
    return made


if __name__ == "__main__":
    main()
