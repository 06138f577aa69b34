"""http and https: ranges that are checked against what the server says it sent, and folders where it lists them."""

import base64
import html
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.util import Retry, Timeout, make_headers

from fastrot.errors import UserError
from fastrot.remote.store import PARALLEL, SUMS, Checksum, Entry, Piece, Store, persist, shown

STALL_S = 30.0  # without a byte, after which a request is made anew
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_LINK = re.compile(r"<a\s[^>]*?href\s*=\s*[\"']?([^\"' >]+)", re.IGNORECASE)
_DIGEST = re.compile(r"\b(md5|sha-256)=:?([A-Za-z0-9+/]+=*):?", re.IGNORECASE)
_NO_HEAD = (403, 405, 501)  # what servers say that know no HEAD; a signed address is good for GET alone


class _Status(OSError):
    def __init__(self, status: int):
        super().__init__(f"HTTP {status}")
        self.status = status


class Web(Store):
    """url  of a folder or a file; a query, such as a signature, stays with every request."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.root = shown(url.rstrip("/"))
        self._base = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
        self._query = f"?{parts.query}" if parts.query else ""
        user = unquote(parts.netloc.rpartition("@")[0])
        self._headers = {"Accept-Encoding": "identity"} | (make_headers(basic_auth=user) if user else {})
        proxy = getproxies().get(parts.scheme)
        settings: dict[str, Any] = {
            "maxsize": PARALLEL,
            "timeout": Timeout(connect=STALL_S, read=STALL_S),
            "retries": Retry(None, connect=0, read=0, redirect=5, status=0, other=0),  # `persist` asks again
        }
        through = proxy if proxy and not proxy_bypass(parts.hostname or "") else None
        self._pool = urllib3.ProxyManager(through, **settings) if through else urllib3.PoolManager(**settings)

    def is_file(self) -> bool:
        """A server sends those who ask for a folder to its name with a slash."""

        def ask() -> bool:
            path = urlsplit(self._head("").geturl() or self._base).path
            return not path.endswith("/") and path != ""

        return persist(self.root, ask)

    def find(self) -> list[Entry]:
        """What SHA256SUMS names, where it is there; else what the server's own pages of links do."""
        sums = self.sums
        names = [*sums, SUMS] if sums else sorted(set(self._listed()))
        if not names:
            raise UserError(
                f"{self.root}/: lists no file; put a {SUMS} there, or name the files in a text and stage list:URL of it"
            )
        return [Entry(name) for name in names]

    def info(self, name: str) -> Entry:
        def ask() -> Entry:
            response = self._head(name)
            size = response.headers.get("Content-Length")
            match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            total = int(match[3]) if match else int(size) if size is not None else None
            return Entry(name, total, None if match else _checksum(response), *_dated(response))

        return persist(self.at(name), ask)

    def read(self, entry: Entry, start: int, end: int) -> Piece:
        def ask() -> Piece:
            return self._piece(self._ask("GET", entry.name, start, end), entry, start, end)

        return persist(self.at(entry.name), ask)

    def copy(self, entry: Entry, to: Path) -> Piece:
        def ask() -> Piece:
            response = self._ask("GET", entry.name)
            with to.open("wb") as file:
                for chunk in response.stream(1 << 20, decode_content=False):
                    file.write(chunk)
                return Piece(None, file.tell(), _checksum(response), *_dated(response))

        return persist(self.at(entry.name), ask)

    def _piece(self, response: urllib3.BaseHTTPResponse, entry: Entry, start: int, end: int) -> Piece:
        where = self.at(entry.name)
        said = response.headers.get("Content-Range", "")
        if response.status == 416:  # of an empty file there is no range
            response.drain_conn()
            if start or not said.endswith("/0"):
                raise UserError(f"{where}: has no bytes {start} to {end - 1}; it changed while it was read")
            return Piece(b"", 0, None, *_dated(response))
        if response.status == 200:
            if start:
                response.close()
                raise UserError(f"{where}: its server ignores ranges; stage it")
            data, length = response.read(end + 1, decode_content=False), response.headers.get("Content-Length")
            if len(data) > end:
                response.close()
                return Piece(None, -1 if length is None else int(length), _checksum(response), *_dated(response))
            if entry.size not in (None, len(data)):
                raise OSError(f"{len(data):,} bytes came, not {entry.size:,}")
            return Piece(data, len(data), _checksum(response), *_dated(response))
        data = response.read(decode_content=False)
        match = _RANGE.fullmatch(said)
        first, last, size = map(int, match.groups()) if match else (-1, -1, -1)
        if (first, last) != (start, min(end, size) - 1):
            sent = said or "no Content-Range"
            raise UserError(
                f"{where}: asked for bytes {start}-{end - 1}, its server sent {sent}; it cannot be read in parts"
            )
        if len(data) != last - first + 1:
            raise OSError(f"{len(data):,} bytes came, not {last - first + 1:,}")
        version, time = _dated(response)
        if (entry.version and version and version != entry.version) or entry.size not in (None, size):
            raise UserError(f"{where}: changed while it was read; start again")
        return Piece(data, size, _checksum(response) if len(data) == size else None, version, time)

    def _head(self, name: str) -> urllib3.BaseHTTPResponse:
        try:
            response = self._ask("HEAD", name)
        except _Status as error:
            if error.status not in _NO_HEAD:
                raise
            response = self._ask("GET", name, 0, 1)
            response.close()  # all of the file may be on its way
        response.drain_conn()
        return response

    def _ask(self, method: str, name: str, start: int = 0, end: int = 0) -> urllib3.BaseHTTPResponse:
        """The answer, its body yet to be read. Raises OSError by its status."""
        url = f"{self._base}/{quote(name)}" if name else self._base
        headers = self._headers | ({"Range": f"bytes={start}-{end - 1}"} if end else {})
        response = self._pool.request(method, url + self._query, headers=headers, preload_content=False)
        if response.status in (200, 206) or (response.status == 416 and end):
            return response
        response.close()
        if response.status in (404, 410):
            raise FileNotFoundError
        if response.status == 401 or (response.status == 403 and method != "HEAD"):
            raise PermissionError(f"HTTP {response.status}")
        raise _Status(response.status)

    def _listed(self) -> Iterator[str]:
        """Names in the server's pages, folder by folder."""
        folders = [""]
        with ThreadPoolExecutor(PARALLEL) as pool:
            while folders:
                found = [name for names in pool.map(self._links, folders) for name in names]
                yield from (name for name in found if not name.endswith("/"))
                folders = sorted({name for name in found if name.endswith("/")})

    def _links(self, folder: str) -> list[str]:
        """Names that a folder's page leads to, below the folder; folders end with a slash."""
        page = f"{self._base}/{quote(folder)}"

        def ask() -> str:
            response = self._pool.request("GET", page + self._query, headers=self._headers)
            if response.status != 200 or "html" not in response.headers.get("Content-Type", ""):
                return ""
            return response.data.decode(errors="replace")

        hrefs = (urljoin(page, html.unescape(href)) for href in _LINK.findall(persist(shown(page), ask)))
        below = {
            unquote(urlunsplit((*urlsplit(href)[:3], "", ""))[len(page) :]) for href in hrefs if href.startswith(page)
        }
        return [folder + name for name in below if name and "//" not in name]


def _dated(response: urllib3.BaseHTTPResponse) -> tuple[str, float | None]:
    """A word that changes with the file's bytes, and when it was written."""
    written = response.headers.get("Last-Modified")
    seconds = parsedate_to_datetime(written).timestamp() if written else None
    return response.headers.get("ETag") or written or "", seconds


def _checksum(response: urllib3.BaseHTTPResponse) -> Checksum | None:
    """Of the whole file, where the server says one; an ETag is none by HTTP's own word."""
    said = {
        name.lower().replace("-", ""): value
        for key in ("Repr-Digest", "Digest")
        for name, value in _DIGEST.findall(response.headers.get(key, ""))
    }
    if "Content-MD5" in response.headers:
        said.setdefault("md5", response.headers["Content-MD5"])
    for name in ("sha256", "md5"):
        if name in said:
            return name, base64.b64decode(said[name]).hex()
    return None
