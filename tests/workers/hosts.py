"""Ranks that share nothing: each with a folder to work in, a home, a cache and a place for scratch of its own."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from fastrot import distributed
from fastrot.cli import main
from fastrot.config import load
from fastrot.data.build import open_manifest
from fastrot.errors import UserError
from fastrot.runs.resume import resume_point
from fastrot.runs.run import _folder


def on_a_host_each(root: str, words: list[str], data: list[str]) -> int:
    """A command on the hosts root/0, root/1, ...; data: what each calls its images."""
    return main([*words, f"data.train={data[_settle(root)]}"])


def _settle(root: str) -> int:
    rank = int(os.environ["RANK"])
    host = Path(root, str(rank))
    for name, folder in (("HOME", "home"), ("XDG_CACHE_HOME", "xdg"), ("TMPDIR", "tmp")):
        (host / folder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(host / folder)
    os.environ["FASTROT_CACHE"] = "cache"  # relative: this host does not see another's under its name
    os.chdir(host)
    return rank


def refusals(root: str) -> None:
    """What each host gets of rank 0's, and what it says of images that are not rank 0's, a run that another holds, and
    disks that it cannot write; into root/RANK/got.json and said.json."""
    rank = _settle(root)
    config, _ = load(None, [])
    ranks = distributed.start()

    def asked(work: Callable[[], object]) -> str:
        try:
            work()
        except UserError as error:
            return str(error)
        return ""

    def held() -> None:
        with _folder("held/run", ranks):
            pass

    def opened(name: str) -> str:
        return asked(lambda: open_manifest(name, config, ranks, "data.train"))

    same, kept = (
        open_manifest("same", config, ranks, "data.train"),
        resume_point("auto", Path("kept"), None, ranks, print),
    )
    sizes = [os.stat(same.path(row)).st_size for row in range(len(same))]
    got = {
        "paths": [same.path(row).decode() for row in range(len(same))],
        "known": [not same.change(file, size, os.stat(same.path(file)).st_mtime_ns) for file, size in enumerate(sizes)],
        "content": same.content,
        "weight": kept.model["fc.weight"].tolist(),
        "position": kept.state.position,
        "path": str(kept.path),
    }
    Path(root, str(rank), "got.json").write_text(json.dumps(got))
    said = {name: opened(name) for name in ("same", "cut", "gone")}
    said["later"] = asked(lambda: resume_point("auto", Path("run"), None, ranks, print))
    said["held"] = asked(held)
    if rank:
        os.environ["FASTROT_CACHE"] = "/dev/null/cache"
    said["cache"] = opened("same")
    Path(root, str(rank), "said.json").write_text(json.dumps(said))
    distributed.end()
