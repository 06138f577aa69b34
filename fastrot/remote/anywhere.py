"""Stores that fsspec knows: s3, gs, a shared disk, memory and many more."""

import base64
import re
from datetime import datetime
from typing import Any

import fsspec  # type: ignore[import-untyped]

from fastrot.errors import UserError
from fastrot.remote.store import Checksum, Entry, Piece, Store, persist, shown

_MD5 = re.compile(r'"?([0-9a-f]{32})"?')  # an ETag of S3's; those of several parts hold a dash
_VERSIONS = ("ETag", "etag", "md5Hash")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class Anywhere(Store):
    """address  with its scheme, or a path. Raises UserError for a scheme that is not known or whose package is missing."""

    def __init__(self, address: str):
        self.root = shown(address.rstrip("/"))
        scheme = address.partition("://")[0] if "://" in address else "file"
        local = {"auto_mkdir": True} if scheme in ("file", "local") else {}
        try:
            self._fs, path = fsspec.url_to_fs(address, **local)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            todo = f"pip install 'fastrot[{extra}]'" if extra else str(error)
            raise UserError(f"{self.root}: the package that reads {scheme}:// is not installed; {todo}") from None
        except ValueError as error:
            raise UserError(f"{self.root}: {error}; expected s3://, gs://, http(s)://, file:// or a path") from None
        self._path, self._s3 = path.rstrip("/"), _EXTRAS.get(scheme) == "s3"

    def is_file(self) -> bool:
        def ask() -> bool:
            self._fs.invalidate_cache()
            return bool(self._fs.info(self._path)["type"] == "file")

        return persist(self.root, ask)

    def find(self) -> list[Entry]:
        def ask() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._fs.find(self._path, detail=True)
            return found

        start = len(self._path) + 1
        found = {path[start:]: info for path, info in persist(self.root, ask).items()}
        return [self._entry(name, info) for name, info in found.items() if name and not name.endswith("/")]

    def info(self, name: str) -> Entry:
        return self._entry(name, persist(self.at(name), lambda: self._fs.info(self._below(name))))

    def read(self, entry: Entry, start: int, end: int) -> Piece:
        known = entry if entry.size is not None else self.info(entry.name)
        size = known.size or 0
        want = max(0, min(end, size) - start)

        def ask() -> bytes:
            data: bytes = self._fs.cat_file(self._below(entry.name), start=start, end=start + want) if want else b""
            if len(data) != want:
                raise OSError(f"{len(data):,} bytes came, not {want:,}")
            return data

        return Piece(persist(self.at(entry.name), ask), size, known.checksum, known.version, known.time)

    def vouches(self, entry: Entry) -> bool:
        """S3's ETag is no MD5 where the object is encrypted by a key of a service or of the customer."""
        if not self._s3 or entry.checksum is None or entry.checksum[0] != "md5":
            return True
        bucket, _, key = self._below(entry.name).partition("/")
        head = persist(self.at(entry.name), lambda: self._fs.call_s3("head_object", Bucket=bucket, Key=key))
        return not (str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in head)

    def put(self, data: bytes, name: str) -> None:
        persist(self.at(name), lambda: self._fs.pipe_file(self._below(name), data))
        self._fs.invalidate_cache()

    def remove(self, name: str) -> None:
        persist(self.at(name), lambda: self._fs.rm_file(self._below(name)))

    def _below(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _entry(self, name: str, info: dict[str, Any]) -> Entry:
        time = _seconds(next((info[key] for key in _TIMES if info.get(key)), None))
        version = next((str(info[key]) for key in _VERSIONS if info.get(key)), str(time or ""))
        return Entry(name, info.get("size"), self._checksum(info), version, time)

    def _checksum(self, info: dict[str, Any]) -> Checksum | None:
        if self._s3 and (match := _MD5.fullmatch(str(info.get("ETag", "")))):
            return "md5", match[1]
        if info.get("md5Hash"):
            return "md5", base64.b64decode(info["md5Hash"]).hex()
        return None


def _seconds(time: Any) -> float | None:
    """As backends say a time: seconds, a datetime, ISO's text."""
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, datetime) else time
