"""Indexing in parts: killed and started again it goes on, and a worker that dies is an error, not a wait."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import pytest

from conftest import ROOT, write_folder
from fastrot.data import index as indexing
from fastrot.data import reading, scan
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.data.verify import verify
from fastrot.errors import Fault, UserError

# index(source, cache) by processes, four rows a part; once all is listed, a file becomes a pipe that never answers
BY_PROCESSES = """
import os, sys
from pathlib import Path
from fastrot.data import scan
from fastrot.data.index import index
scan._MANY, scan.ROWS = 0, 4
def track(items, total, title):
    if title.startswith("indexing"):
        os.unlink(sys.argv[3])
        os.mkfifo(sys.argv[3])
    return items
index(sys.argv[1], Path(sys.argv[2]), 10**8, track)
"""


def plain(items, total, title):
    return items


@pytest.fixture
def by_processes(monkeypatch):
    monkeypatch.setattr(scan, "_MANY", 0)
    monkeypatch.setattr(scan, "ROWS", 4)


def test_processes_find_what_threads_find(tmp_path, monkeypatch, by_processes):
    root = write_folder(tmp_path / "d", classes=3, per_class=5)
    (root / "class1/2.jpg").write_bytes(b"junk")
    found = Manifest.load(index(str(root), tmp_path / "one", 10**8, plain))
    monkeypatch.undo()
    other = Manifest.load(index(str(root), tmp_path / "two", 10**8, plain))
    assert found.content == other.content
    assert found.quarantined == other.quarantined == [[f"{root}/class1/2.jpg", "not an image that Pillow knows"]]
    assert not list((tmp_path / "one").glob("*.parts"))


def test_a_worker_that_dies_is_a_fault(tmp_path, by_processes):
    with pytest.raises(Fault, match="^[^\n]*a worker process died[^\n]*$"):
        scan.look_at(8, lambda first, last: [(1,)] * (last - first), os._exit, tmp_path, plain, "looking")


def test_killed_and_started_again_only_what_was_not_done_is_looked_at(tmp_path, monkeypatch):
    """The last of 18 files becomes a pipe that never answers; the indexer is killed while a worker waits for it."""
    root, cache = write_folder(tmp_path / "d", classes=3, per_class=6), tmp_path / "cache"
    last = root / "class2/5.jpg"
    last.write_bytes(b"")
    stat = last.stat()
    command = [sys.executable, "-c", BY_PROCESSES, f"list:{files_of(root)}", str(cache), str(last)]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    )
    until(lambda: len(list(cache.glob("*.parts/*/[0-9]*.npz"))) == 4, process)
    assert others_of(process)
    process.kill()
    process.wait()
    until(lambda: not others_of(process), None)  # no worker waits for ever

    last.unlink()
    last.write_bytes(b"")
    os.utime(last, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    looked, scan_file = [], indexing.scan_file

    def spy(*words, max_pixels):
        looked.append(words[0])
        return scan_file(*words, max_pixels=max_pixels)

    monkeypatch.setattr(scan, "ROWS", 4)
    monkeypatch.setattr(scan, "_MANY", 0)
    monkeypatch.setattr(scan, "workers_pool", lambda processes: ThreadPoolExecutor(2))
    monkeypatch.setattr(indexing, "scan_file", spy)
    source = f"list:{root / 'files.txt'}"
    resumed = Manifest.load(index(source, cache, 10**8, plain))
    assert sorted(looked) == sorted(os.fsencode(path) for path in (root / "class2/4.jpg", last))
    assert resumed.content == Manifest.load(index(source, tmp_path / "other", 10**8, plain)).content
    assert resumed.quarantined == [[str(last), "empty file"]]
    assert {path.suffix for path in cache.iterdir()} == {"", ".lock"}


def test_parts_of_a_source_that_changed_since_are_not_used(tmp_path, monkeypatch):
    root, cache = write_folder(tmp_path / "d"), tmp_path / "cache"

    def broken(items, total, title):
        list(items)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(str(root), cache, 10**8, broken)
    (done,) = cache.glob("*.parts/*")
    (root / "class0/0.jpg").unlink()
    assert len(Manifest.load(index(str(root), cache, 10**8, plain))) == 11
    assert not done.exists()


def test_a_damaged_part_is_one_line(tmp_path):
    (tmp_path / "0-1.npz").write_bytes(b"PK\3\4junk")
    with pytest.raises(UserError, match=f"^{tmp_path}/0-1.npz: damaged [^\n]*; remove {tmp_path} and start again$"):
        scan.look_at(1, None, None, tmp_path, plain, "looking")


def test_two_at_once_index_a_source_once(tmp_path, monkeypatch):
    root, count, lock = write_folder(tmp_path / "d"), [], Lock()
    scan_file = indexing.scan_file

    def spy(*words, max_pixels):
        with lock:
            count.append(words)
        return scan_file(*words, max_pixels=max_pixels)

    monkeypatch.setattr(indexing, "scan_file", spy)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: index(str(root), tmp_path / "cache", 10**8, plain), range(4)))
    assert len(set(folders)) == 1 and len(count) == 12


def stumbling(monkeypatch, times: int, number: int) -> list[str]:
    """Images are opened `times` times with this error before they can be; a list that tells how often class1/2.jpg was."""
    opened, open_image = [], indexing.open_image

    def stumble(file):
        if file.name.endswith(b"class1/2.jpg"):
            opened.append(file.name)
            if len(opened) <= times:
                raise OSError(number, os.strerror(number))
        return open_image(file)

    monkeypatch.setattr(indexing, "open_image", stumble)
    monkeypatch.setattr(reading, "_PAUSES_S", (0, 0))
    return opened


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_error_that_passes_leaves_no_trace(tmp_path, monkeypatch, number):
    root = write_folder(tmp_path / "d")
    opened = stumbling(monkeypatch, 2, number)
    found = Manifest.load(index(str(root), tmp_path / "cache", 10**8, plain))
    assert len(opened) == 3
    assert (len(found), found.quarantined) == (12, [])


@pytest.mark.parametrize("number, kind, tries", [(errno.EIO, Fault, 3), (errno.EACCES, UserError, 1)])
def test_a_read_error_that_stays_ends_indexing_in_a_line_and_is_not_kept(tmp_path, monkeypatch, number, kind, tries):
    """A file that cannot be read today is no broken image: once it can be, it is a row."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})  # parts of one row
    root, cache = write_folder(tmp_path / "d"), tmp_path / "cache"
    with monkeypatch.context() as patch:
        opened = stumbling(patch, 99, number)
        with pytest.raises(kind) as error:
            index(str(root), cache, 10**8, plain)
    words = f"indexing {root}: {root}/class1/2.jpg: cannot be read; mend it and start again"
    assert str(error.value).startswith(words) and os.strerror(number) in str(error.value)
    assert len(opened) == tries
    looked, scan_file = [], indexing.scan_file
    monkeypatch.setattr(indexing, "scan_file", lambda *w, **k: looked.append(w[0]) or scan_file(*w, **k))
    assert len(Manifest.load(index(str(root), cache, 10**8, plain))) == 12
    assert looked == [os.fsencode(root / "class1/2.jpg")]  # a row a part, of so few


def test_workers_that_are_processes_carry_a_read_error_too(tmp_path, by_processes):
    root = write_folder(tmp_path / "d")

    def gone(items, total, title):
        (root / "class1/2.jpg").unlink()
        return items

    with pytest.raises(UserError, match="class1/2.jpg: cannot be read; [^\n]* \\(No such file or directory\\)$"):
        index(str(root), tmp_path / "cache", 10**8, gone)


@pytest.mark.parametrize(
    "spoil, words", [(os.unlink, "cannot be opened"), (lambda p: os.utime(p, ns=(1, 1)), "changed")]
)
def test_verify_quarantines_what_bytes_say_alone(tmp_path, monkeypatch, spoil, words):
    root, cache = write_folder(tmp_path / "d"), tmp_path / "cache"
    folder = index(str(root), cache, 10**8, plain)
    spoil(root / "class1/2.jpg")
    with pytest.raises(UserError, match=f"class1/2.jpg: {words}[^\n]*start again[^\n]*$"):
        verify(folder, plain)
    kept = Manifest.load(folder)
    assert (len(kept), kept.quarantined) == (12, [])


def test_what_is_found_keeps_its_rows(tmp_path):
    """Sizes that name their row, over many parts, with reasons in between."""
    n = 1000

    def look(row):
        return (
            f"bad {row}" if row % 7 == 3 else (row + 1, row + 2, row % 5, row % 9, row % 4, row.to_bytes(32, "little"))
        )

    found = scan.look_at(n, lambda a, b: ((row,) for row in range(a, b)), look, tmp_path, plain, "looking")
    good = np.array([row % 7 != 3 for row in range(n)])
    rows = np.arange(n)
    assert np.array_equal(found.sound, good)
    assert found.reason == {row: f"bad {row}" for row in rows[~good].tolist()}
    assert np.array_equal(found.height[good], rows[good] + 1)
    assert np.array_equal(found.width[good], rows[good] + 2)
    assert np.array_equal(found.kind[good], rows[good] % 5)
    assert np.array_equal(found.orientation[good], rows[good] % 9)
    assert np.array_equal(found.coding[good], rows[good] % 4)
    assert np.array_equal(found.head[good].view("<u8")[:, 0], rows[good])


def files_of(root: Path) -> Path:
    """A list of every file below `root`, in order."""
    listed = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.glob("*/*")))
    (root / "files.txt").write_text(listed)
    return root / "files.txt"


def others_of(process: subprocess.Popen) -> list[str]:
    """The living processes of its session, but for itself."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(session) == process.pid != int(pid) and state != "Z":
            found.append(pid)
    return found


def until(happened, process: subprocess.Popen | None, looks: int = 1500) -> None:
    """Look, 50 times a second, until it has happened; fail when the process ends first."""
    for _ in range(looks):
        if happened():
            return
        assert process is None or process.poll() is None, "ended too early"
        signal.sigtimedwait([], 0.02)
    raise AssertionError("nothing happened")
