"""python tests/chaos --kills 200 --seed 1 --ledger build/chaos.jsonl

Each sweep is one training of 40 steps, struck until it ends by itself. Launcher, storage and the run's place change from
start to start; in a third of the sweeps ranks, engine and decoder too. Images, losses and weights must be, bit for bit, those
of a run that nothing disturbed; where ranks changed, of one that was stopped by run.max_steps where they did. The ledger has
a JSON line for each start and each sweep; exit code 1 where something was found. Disks that fill need the right to mount.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from chaos.strikes import ALWAYS, FROZEN, STRIKES, small_disk  # noqa: E402  # where it lies is known by now
from chaos.sweep import make_place, sweeps  # noqa: E402
from fastrot import machine  # noqa: E402

RARE = {"rank stalls": 1.0, "storage freezes": 1.0, "disk full": 1.5, "folder read-only": 1.0, "folder gone": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="strikes in all (default 200)")
    parser.add_argument("--each", type=int, default=10, help="strikes a sweep at most (default 10)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ledger", type=Path, default=ROOT / "build" / "chaos.jsonl")
    parser.add_argument("--only", choices=sorted(STRIKES), action="append", help="these strikes alone")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what is mounted is unmounted
    began, counts = time.monotonic(), Counter[str]()
    args.ledger.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, args.ledger.open("w") as ledger:
        root = Path(folder)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(machine.compiled_folder("torch_extensions"))
        os.environ["FASTROT_CACHE"] = str(ROOT / "build" / "chaos-cache")
        build = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", root / "frozen.so"]
        subprocess.run(build, input=FROZEN, text=True, check=True)
        os.environ["LD_PRELOAD"] = str(root / "frozen.so")

        def write(line: dict) -> None:
            ledger.write(json.dumps(line | {"time": round(time.time())}) + "\n")
            ledger.flush()
            counts.update(_counted(line))
            for found in line.get("found", []):
                print(f"sweep {line['sweep']}, start {line.get('start', 'end')}: {found}", flush=True)

        strikes = dict.fromkeys(args.only, 1.0) if args.only else ALWAYS | RARE
        with small_disk(root / "small") as small:
            found = sweeps(make_place(root, small), args.seed, args.kills, args.each, strikes, write)
    summary = {"seed": args.seed, "seconds": round(time.monotonic() - began), **counts, "found": found}
    with args.ledger.open("a") as ledger:
        ledger.write(json.dumps(summary) + "\n")
    print(json.dumps(summary, indent=1))
    return int(bool(found))


def _counted(line: dict) -> dict[str, int]:
    if "ids" in line:
        keys = ("ids", "repeated", "missing", "unequal_lines", "unequal_tensors", "lines_missing")
        return {"sweeps": 1} | {
            key: len(line[key]) if isinstance(line[key], list) else line[key] for key in keys if key in line
        }
    words = " ".join(line.get("found", []))
    counts = {
        "starts": 1,
        "hung": "hung" in words,
        "orphans": "orphans" in words,
        "lost": "lost" in words or "stood" in words,
    }
    return (
        counts
        | ({"strikes": 1, f"of them {line['strike']}": 1} if line.get("struck") else {})
        | ({"damaged": 1} if line.get("damage") else {})
    )


if __name__ == "__main__":
    sys.exit(main())
