"""make fuzz [PARSER=NAME] [RUNS=N] [SECONDS=S]: each parser on N inputs; a table; exits 1 where one crashed.

C (entropy, window, reader) by clang's libFuzzer with its address and undefined-behaviour checks, Python by atheris, which
lies in build/fuzz/lib. Coverage leads to the inputs; after LED of them, which find nearly all there is to find, Python's
are mutations of what these have kept, without the instruments and two to three times as fast. What was found stays in
build/fuzz/corpus, a line for each row of the table in build/fuzz/ledger.jsonl, an input that crashed in
build/fuzz/crashes: put it into tests/fuzz/test_parsers.py.
"""

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT), str(ROOT / "kernels"), str(ROOT / "build" / "fuzz" / "lib")]

import atheris  # noqa: E402 -- the path comes first

import parsers  # noqa: E402
import seeds  # noqa: E402

HOME, TURBO = ROOT / "build" / "fuzz", ROOT / "kernels" / "fastrot_kernels" / "turbo"
NATIVE: dict[str, tuple[list[str], Callable[[], list[bytes]]]] = {
    "entropy": (["entropy.c"], seeds.places),
    "window": (["window.c", "entropy.c", "resample.c"], seeds.windows),
    "reader": ([], seeds.stretches),
}
CHECKS = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
LIMITS = ["-max_len=8192", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1"]
LED = 100_000
HEADER = {key: key for key in ("parser", "executions", "seconds", "coverage", "crashes")} | {"led": "by coverage"}
LINE = "{parser:12}{executions:>12}{led:>13}{seconds:>9}{coverage:>10}  {crashes}"


def native(name: str, words: list[str]) -> None:
    built, sources = HOME / name, [str(TURBO / source) for source in NATIVE[name][0]]
    files = [str(HERE / f"{name}.c"), *sources, f"-I{TURBO}"]
    subprocess.run(
        ["clang", "-g", "-O2", "-std=gnu11", *CHECKS, *files, "-ljpeg", "-lm", "-pthread", "-o", str(built)], check=True
    )
    with (HOME / f"{name}.log").open("a") as out:
        subprocess.run([str(built), *words], stdout=out, stderr=subprocess.STDOUT, cwd=HOME, check=False)


def python(name: str, words: list[str], led: bool) -> None:
    """In a fork, of which what reads is instrumented; where coverage does not lead, the target alone, as libFuzzer asks."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    out = os.open(HOME / f"{name}.log", os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    parser = parsers.PARSERS[name]
    functions = [one for one in gc.get_objects() if type(one) is FunctionType] if led else []
    for function in functions:
        if (function.__module__ or "").startswith(parser.modules):
            atheris.instrument_func(function)
    target = parser.one if led else atheris.instrument_func(parser.one)
    atheris.Setup([name, *words, f"-keep_seed={int(not led)}"], target)
    atheris.Fuzz()


def fuzz(name: str, runs: int, seconds: int) -> dict[str, object]:
    """Its row of the table."""
    corpus, crashes, begun = (HOME / kind / name for kind in ("corpus", "crashes", "seeds"))
    shutil.rmtree(begun, ignore_errors=True)
    for folder in (corpus, crashes, begun):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate((NATIVE[name][1] if name in NATIVE else parsers.PARSERS[name].seeds)()):
        (begun / str(number)).write_bytes(seed)
    before, log, start = {*crashes.iterdir()}, HOME / f"{name}.log", time.monotonic()
    log.write_text("")

    def words(some: int) -> list[str]:
        left = max(1, round(seconds - (time.monotonic() - start))) if seconds else 0
        where = [f"-artifact_prefix={crashes}/", str(corpus), str(begun)]
        return [f"-runs={some}", f"-max_total_time={left}", *LIMITS, *where]

    def said(what: str) -> list[int]:
        return [int(one) for one in re.findall(rf"{what}: +(\d+)", log.read_text(errors="replace"))]

    if name in NATIVE:
        native(name, words(runs))
    else:
        python(name, words(min(runs, LED)), led=True)
        if runs > LED and {*crashes.iterdir()} == before:
            python(name, words(runs - LED), led=False)
    done, found = said("stat::number_of_executed_units"), [str(path) for path in {*crashes.iterdir()} - before]
    row = {"parser": name, "executions": sum(done), "led": sum(done) if name in NATIVE else sum(done[:1])}
    row |= {"seconds": round(time.monotonic() - start), "coverage": max(said("cov"), default=0)}
    return row | {"crashes": " ".join(found) or ("0" if done else f"no end of it: {log}")}


def main() -> int:
    words = argparse.ArgumentParser(prog="make fuzz")
    words.add_argument("parser", nargs="*", choices=[[], *NATIVE, *parsers.PARSERS])
    words.add_argument("--runs", type=int, default=1_000_000)
    words.add_argument("--seconds", type=int, default=0, help="at most, for each; 0: no limit")
    asked = words.parse_args()
    rows = []
    print(LINE.format(**HEADER))
    for name in asked.parser or [*NATIVE, *parsers.PARSERS]:
        rows.append(fuzz(name, asked.runs, asked.seconds))
        print(LINE.format(**rows[-1]), flush=True)
        with (HOME / "ledger.jsonl").open("a") as ledger:
            ledger.write(json.dumps(rows[-1]) + "\n")
    return 0 if all(row["crashes"] == "0" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
