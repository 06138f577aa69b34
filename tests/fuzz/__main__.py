"""make fuzz [PARSER=NAME] [RUNS=N] [SECONDS=S]: each parser on N inputs that coverage leads to; a table; exits 1 where one crashed.

C (entropy, window, reader) by clang's libFuzzer with its address and undefined-behaviour checks, Python by atheris, which
lies in build/fuzz/lib. What was found stays in build/fuzz/corpus, an input that crashed in build/fuzz/crashes: put it
into tests/fuzz/test_parsers.py.
"""

import argparse
import gc
import os
import re
import shutil
import subprocess
import sys
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
LINE = "{:12}{:>12}{:>14}{:>10}  {}"
LIMITS = ["-max_len=8192", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1"]


def begin(name: str, words: list[str], log: Path) -> None:
    """The fuzzer of a parser, to its end; its words go into `log`. Python is forked: of it, what reads is instrumented."""
    if name in NATIVE:
        built, sources = HOME / name, [str(TURBO / source) for source in NATIVE[name][0]]
        files = [str(HERE / f"{name}.c"), *sources, f"-I{TURBO}"]
        subprocess.run(
            ["clang", "-g", "-O2", "-std=gnu11", *CHECKS, *files, "-ljpeg", "-lm", "-pthread", "-o", str(built)],
            check=True,
        )
        with log.open("w") as out:
            subprocess.run([str(built), *words], stdout=out, stderr=subprocess.STDOUT, cwd=HOME, check=False)
    elif child := os.fork():
        os.waitpid(child, 0)
    else:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        parser = parsers.PARSERS[name]
        for function in [one for one in gc.get_objects() if isinstance(one, FunctionType)]:
            if (function.__module__ or "").startswith(parser.modules):
                atheris.instrument_func(function)
        atheris.Setup([name, *words], parser.one)
        atheris.Fuzz()


def fuzz(name: str, runs: int, seconds: int) -> list[str]:
    """Its row of the table: parser, executions, executions/s, coverage, crashes."""
    corpus, crashes, begun = (HOME / kind / name for kind in ("corpus", "crashes", "seeds"))
    shutil.rmtree(begun, ignore_errors=True)
    for folder in (corpus, crashes, begun):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate((NATIVE[name][1] if name in NATIVE else parsers.PARSERS[name].seeds)()):
        (begun / str(number)).write_bytes(seed)
    before = {*crashes.iterdir()}
    words = [
        f"-runs={runs}",
        f"-max_total_time={seconds}",
        *LIMITS,
        f"-artifact_prefix={crashes}/",
        str(corpus),
        str(begun),
    ]
    log = HOME / f"{name}.log"
    begin(name, words, log)
    said = log.read_text(errors="replace")
    done, pace = (
        re.findall(rf"stat::{what}: +(\d+)", said) for what in ("number_of_executed_units", "average_exec_per_sec")
    )
    covered = re.findall(r"cov: (\d+)", said)
    found = [str(path) for path in crashes.iterdir() if path not in before]
    if not done:
        found.append(f"no end of it: {log}")
    return [name, *(column[-1] if column else "?" for column in (done, pace, covered)), " ".join(found) or "0"]


def main() -> int:
    words = argparse.ArgumentParser(prog="make fuzz")
    words.add_argument("parser", nargs="*", choices=[[], *NATIVE, *parsers.PARSERS])
    words.add_argument("--runs", type=int, default=1_000_000)
    words.add_argument("--seconds", type=int, default=0, help="at most, for each; 0: no limit")
    asked = words.parse_args()
    rows = [["parser", "executions", "executions/s", "coverage", "crashes"]]
    print(LINE.format(*rows[0]))
    for name in asked.parser or [*NATIVE, *parsers.PARSERS]:
        rows.append(fuzz(name, asked.runs, asked.seconds))
        print(LINE.format(*rows[-1]), flush=True)
    return 0 if all(row[-1] == "0" for row in rows[1:]) else 1


if __name__ == "__main__":
    sys.exit(main())
