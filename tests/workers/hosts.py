"""Ranks that share nothing: each with a folder to work in, a home, a cache and a place for scratch of its own."""

import os
from pathlib import Path

from fastrot.cli import main


def on_a_host_each(root: str, words: list[str], data: list[str], expected: int = 0) -> int:
    """A command on the hosts root/0, root/1, ...; data: what each calls its images."""
    rank = int(os.environ["RANK"])
    host = Path(root, str(rank))
    for name, folder in (("HOME", "home"), ("XDG_CACHE_HOME", "cache"), ("TMPDIR", "tmp")):
        (host / folder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(host / folder)
    os.environ.pop("FASTROT_CACHE", None)
    os.chdir(host)
    return main([*words, f"data.train={data[rank]}"]) - expected
