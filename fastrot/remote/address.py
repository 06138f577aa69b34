"""What a source at a distance is made of: a folder, a file, a range or pattern of files, or a list of names."""

import fnmatch
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from fastrot.errors import UserError
from fastrot.remote.store import PARALLEL, Entry, Store

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WEB = ("http://", "https://")
_LIST = "list:"
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAGIC = re.compile(r"\{\d+\.\.\d+\}|[*?[]")
_FEW = 1000  # files of no known size that are asked for it


@dataclass(frozen=True)
class Found:
    """A source's files, by name.  prefix, rest: a copy of the store's root in a folder is, as a source,
    prefix + folder + rest."""

    store: Store
    files: dict[str, Entry]
    prefix: str = ""
    rest: str = ""


def is_remote(source: str | None) -> bool:
    """Whether a source names an address, not a path."""
    return source is not None and bool(_ADDRESS.match(source.removeprefix(_LIST)))


def absolute(source: str) -> str:
    """A path from the root on; an address as it is."""
    return source if is_remote(source) else os.path.abspath(source)


def addresses(spec: str) -> list[str]:
    """The files of a range or a pattern at a distance, in order, a glob's by name. Raises UserError, Fault."""
    match = _MAGIC.search(spec)
    if not match:
        return [spec]
    folder = _whole(spec[: match.start()].rpartition("/")[0])
    found = _named(open_store(folder), spec[len(folder.rstrip("/")) + 1 :])
    if not found:
        raise UserError(f"{spec}: no such file")
    return [f"{folder.rstrip('/')}/{entry.name}" for entry in found]


def open_store(address: str) -> Store:
    """The store below an address. Raises UserError for a scheme that is not known."""
    if address.startswith(_WEB):  # what is imported takes a tenth of a second, which no local source pays
        from fastrot.remote.web import Web

        return Web(address)
    from fastrot.remote.anywhere import Anywhere

    return Anywhere(address)


def locate(source: str) -> Found:
    """What lies at `source`: an address or a path of a folder, of a file, of files by {000..146} or a pattern; or
    list:ADDRESS of a text whose lines begin with names.

    Raises UserError where there is nothing or a name would leave its folder; Fault where nobody answers.
    """
    prefix = _LIST if source.startswith(_LIST) else ""
    address, query, magic = source.removeprefix(prefix), "", _MAGIC
    if address.startswith(_WEB):  # no server has patterns, and a query may be a signature
        address, mark, query = address.partition("?")
        query, magic = mark + query, _NUMBERS
    match = magic.search(address)
    folder, _, name = address[: match.start() if match else None].rpartition("/")
    folder, rest = _whole(folder), address[len(folder.rstrip("/")) + 1 :] if match else name

    if not prefix and not match and not open_store(address + query).is_file():
        store, rest = open_store(address + query), ""
        entries = store.find()
    else:
        store = open_store(folder + query)
        entries = _listed(store, rest) if prefix else _named(store, rest) if match else [store.info(rest)]
    return Found(store, _checked(store, entries), prefix, rest and f"/{rest}")


def _whole(folder: str) -> str:
    """The folder of an address's last part: what a cut at the last slash leaves."""
    return f"{folder}//" if folder.endswith(":") else f"{folder}/" if folder.endswith(":/") else folder or "/"


def _listed(store: Store, name: str) -> list[Entry]:
    """A list, and the files that it names."""
    lines = store.whole(name).decode(errors="surrogateescape").splitlines()
    return [Entry(name), *(Entry(line.partition("\t")[0]) for line in lines if line.strip())]


def _named(store: Store, pattern: str) -> list[Entry]:
    """The files of ranges of numbers, in order, and of shell patterns."""
    match = _NUMBERS.search(pattern)
    if match:
        first, last = int(match[1]), int(match[2])
        numbers = [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
        return [one for n in numbers for one in _named(store, pattern[: match.start()] + n + pattern[match.end() :])]
    if not re.search(r"[*?[]", pattern):
        return [Entry(pattern)]
    deep = pattern.count("/")
    files = sorted(store.find(), key=lambda entry: os.fsencode(entry.name))
    return [e for e in files if e.name.count("/") == deep and fnmatch.fnmatchcase(e.name, pattern)]


def _checked(store: Store, entries: Iterable[Entry]) -> dict[str, Entry]:
    """By name; with the store's checksums where it has a file of them, and few files' sizes where they are not known."""
    files = {entry.name: entry for entry in entries}
    if not files:
        raise UserError(f"{store.root}: no file there")
    for name in files:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise UserError(f"{store.root}: names {name!r}, which does not lie below it")
    unknown = [name for name, entry in files.items() if entry.size is None]
    if len(unknown) <= _FEW:
        files.update(zip(unknown, _each(store.info, unknown), strict=True))
    sums = store.sums
    return {name: replace(e, checksum=("sha256", sums[name])) if name in sums else e for name, e in files.items()}


def _each(ask: Callable[[str], Entry], names: list[str]) -> list[Entry]:
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(ask, names))
