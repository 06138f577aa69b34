"""How fast is staging beside one stream of a plain client, from a server 20 ms away; and does it survive a cut and a lie?"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

import harness

from fastrot.data.stage import stage

sys.path.append(str(harness.ROOT / "tests"))
from web_server import serving

NOISE = hashlib.shake_256(b"stage").digest(1 << 20)


def content(number: int, size: int) -> bytes:
    """A file's bytes, all files' different."""
    return (number.to_bytes(8, "little") + NOISE * (size // len(NOISE) + 1))[:size]


def serve(files: int, size: int, delay_ms: float, mb_per_s: float) -> None:
    """A server process: prints its address, ends with its standard input. The last file's first answers are a cut and a lie."""
    named = {f"f{number:05d}": content(number, size) for number in range(files)}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in named.items())
    with serving(named | {"SHA256SUMS": sums.encode()}) as server:
        server.delay_s, server.mb_per_s = delay_ms / 1000, mb_per_s
        print(server.url, flush=True)
        for line in sys.stdin:
            server.faults[f"f{files - 1:05d}"] = json.loads(line)


def one_stream(address: str, files: int, dest: Path) -> None:
    """A plain client: one connection, one file after another, nothing verified."""
    client = HTTPConnection(address.removeprefix("http://"))
    for number in range(files):
        client.request("GET", f"/f{number:05d}")
        with client.getresponse() as answer, (dest / f"f{number:05d}").open("wb") as file:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
    client.close()


def measured(files: int, size: int, delay_ms: float, mb_per_s: float, rounds: int) -> dict:
    """MB/s of both over `rounds`, each into a new folder, the plain client's of the first thousand files; then a staging
    through a cut and a lie."""
    words = [sys.executable, __file__, "--serve", str(files), str(size), str(delay_ms), str(mb_per_s)]
    speeds: dict[str, list[float]] = {"stage": [], "one_stream": []}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().strip()
        few = min(files, 1000)
        ways: dict[str, tuple[int, Callable[[Path], object]]] = {
            "stage": (files, lambda dest: stage(address, dest, lambda items, *_: items)),
            "one_stream": (few, lambda dest: one_stream(address, few, dest)),
        }
        for _ in range(rounds):
            for name, (count, way) in ways.items():
                with tempfile.TemporaryDirectory() as dest:
                    start = time.perf_counter()
                    way(Path(dest))
                    speeds[name].append(count * size / 1e6 / (time.perf_counter() - start))
        server.stdin.write(json.dumps(["cut", "flip"]) + "\n")
        server.stdin.flush()
        with tempfile.TemporaryDirectory() as dest:
            bad_day = stage(address, Path(dest), lambda items, *_: items)
            last = (Path(dest) / f"f{files - 1:05d}").read_bytes() == content(files - 1, size)
        server.stdin.close()
    found = {name: harness.spread(each, "_mb_per_s") for name, each in speeds.items()}
    times = found["stage"]["median_mb_per_s"] / found["one_stream"]["median_mb_per_s"]
    survived = last and bad_day["verified_by"].get("sha256") == files
    return {
        "files": files,
        "bytes_each": size,
        "delay_ms": delay_ms,
        "mb_per_s_of_a_connection": mb_per_s or None,
        **found,
        "times": times,
        "cut_and_lie_survived": survived,
    }


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--mb", type=int, default=1000, help="megabytes of each set")
    options.add_argument("--delay", type=float, default=20.0, help="milliseconds before each answer")
    options.add_argument("--limit", type=float, default=50.0, help="MB/s of one connection, in the last set")
    options.add_argument(
        "--serve", nargs=4, type=float, metavar="N", help="what the bench starts: files, bytes, ms, MB/s"
    )
    args = options.parse_args()
    if args.serve:
        files, size, *pace = args.serve
        serve(int(files), int(size), *pace)
        return
    shards = max(1, args.mb // 100), min(100, args.mb) * 1_000_000
    result = {"facts": harness.facts()}
    result["sets"] = [
        measured(*files, args.delay, mb_per_s, args.rounds)
        for files, mb_per_s in (((args.mb * 10, 100_000), 0), (shards, 0), (shards, args.limit))
    ]
    harness.write(args.out, __doc__, result)


if __name__ == "__main__":
    main()
