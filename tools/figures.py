"""Figures in the documents, each from a file of bench/results: do text and file still say the same?

A figure stands between two comments, which a page does not show:
    <!--= loader_cpu.json / rows / arm=ours: turbo, folder / images_per_s / median ; {:,.0f} -->1,801<!-- -->
The first names a file of bench/results, then the way to a value: keys, and `key=value` for the element of a list; after
the semicolon its format. Exit code 1 where one differs, or leads nowhere; with --write it is set instead.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "kernels").rglob("*.md"))]
FIGURE = re.compile(r"<!--= (?P<way>[^;>]+) ; (?P<format>[^>]+) -->(?P<text>[^<]*)<!-- -->")


def value(way: str, results: Path = RESULTS) -> Any:
    """What lies at the end of a way. Raises KeyError, or OSError where there is no such file."""
    name, *keys = (key.strip() for key in way.split(" / "))
    found: Any = json.loads((results / name).read_text())
    for key in keys:
        if isinstance(found, list):
            field, _, wanted = key.partition("=")
            some = [one for one in found if str(one.get(field)) == wanted]
            if len(some) != 1:
                raise KeyError(key)
            found = some[0]
        else:
            found = found[key]
    return found


def renewed(text: str, results: Path = RESULTS) -> tuple[str, list[tuple[int, str]]]:
    """A document with its figures as the results say, and (line, what was wrong) of each that was not so."""
    wrong: list[tuple[int, str]] = []

    def figure(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 1
        try:
            now = match["format"].strip().format(value(match["way"], results))
        except (OSError, KeyError, TypeError, ValueError) as error:
            wrong.append((line, f"{match['way'].strip()} leads nowhere ({type(error).__name__}: {error})"))
            return match[0]
        if now != match["text"]:
            wrong.append((line, f"says {match['text']}, and {match['way'].strip()} is {now}"))
        start, end = match.start("text") - match.start(), match.end("text") - match.start()
        return match[0][:start] + now + match[0][end:]

    return FIGURE.sub(figure, text), wrong


def main(write: bool) -> int:
    count, failed = 0, False
    for path in DOCUMENTS:
        text = path.read_text()
        new, wrong = renewed(text)
        count += len(FIGURE.findall(text))
        for line, why in wrong:
            print(f"{path.relative_to(ROOT)}:{line}: {why}")
        if write and new != text:
            path.write_text(new)
        failed |= any("leads nowhere" in why for _, why in wrong) or (bool(wrong) and not write)
    print(f"{count} figures of documents, from bench/results")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
