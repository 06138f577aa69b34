"""Staging: what comes is what lies at the source, whatever the server, the disk or a kill does in between."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from conftest import ROOT, metrics, write_folder
from fastrot.cli import main
from fastrot.data import pieces, stage
from fastrot.errors import Fault, UserError
from fastrot.remote import address, store, web
from web_server import serving
from workers.hosts import on_a_host_each
from workers.ranks import as_ranks

PIECE = 50_000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces of 50 kB, and no long pauses."""
    monkeypatch.setattr(pieces, "PIECE", PIECE)
    monkeypatch.setattr(stage, "PIECE", PIECE)
    monkeypatch.setattr(store, "PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(web, "STALL_S", 0.5)


def noise(size: int, seed: int = 0) -> bytes:
    return b"".join(hashlib.sha256(f"{seed} {n}".encode()).digest() for n in range(size // 32 + 1))[:size]


FILES = {
    "top.bin": noise(1000, 1),
    "a/one two.jpg": noise(20_000, 2),
    "a/\u00e4\u00f6#%41.jpg": noise(10, 3),
    "b/empty": b"",
    "b/edge": noise(PIECE, 4),
    "b/c/large.tar": noise(7 * PIECE + 123, 5),
}


def under(root: str, files: dict) -> dict:
    return {f"{root}/{name}": content for name, content in files.items()}


def sums(files: dict) -> bytes:
    return "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in files.items()).encode()


def held(dest: Path) -> dict:
    """All files of a staged folder."""
    paths = [path for path in dest.rglob("*") if path.is_file() and stage.HOME not in path.parts]
    return {str(path.relative_to(dest)): path.read_bytes() for path in paths}


def test_a_folder_of_a_web_server_comes_whole_and_once(tmp_path):
    with serving(under("data", FILES)) as server:
        first = stage.stage(f"{server.url}/data", tmp_path / "d")
        assert held(tmp_path / "d") == FILES and first["data"] == str(tmp_path / "d")
        assert first["fetched_bytes"] == first["bytes"] == sum(map(len, FILES.values()))
        assert first["verified_by"] == {"size": len(FILES)}
        again = stage.stage(f"{server.url}/data/", tmp_path / "d")
        assert again["fetched_bytes"] == 0 and again["files"] == len(FILES)
        server.files["data/b/edge"] = noise(PIECE, 6)
        del server.files["data/top.bin"]
        assert stage.stage(f"{server.url}/data", tmp_path / "d")["fetched_bytes"] == PIECE
        assert under("data", held(tmp_path / "d")) == server.files
    times = {(tmp_path / "d" / name).stat().st_mtime for name in held(tmp_path / "d")}
    assert times == {784111777.0}  # the source's, of small and of large


def test_a_server_that_fails_stalls_cuts_and_lies_is_survived(tmp_path):
    content = FILES | {"SHA256SUMS": sums(FILES)}
    with serving(under("data", content)) as server:
        server.lists = False  # what SHA256SUMS names is there
        server.faults |= {
            "data/top.bin": ["stall", 503],
            "data/a/one two.jpg": ["flip", "cut"],
            "data/b/edge": ["short", "flip"],
            "data/b/c/large.tar": ["cut", 500, "stall", "flip", "cut", "flip"],
        }
        done = stage.stage(f"{server.url}/data", tmp_path)
        assert held(tmp_path) == content and not any(server.faults.values())
        assert done["verified_by"] == {"sha256": len(FILES), "size": 1}


def test_content_md5_finds_a_lie_of_the_right_length(tmp_path):
    with serving(FILES) as server:
        server.md5 = True
        server.faults |= {"a/one two.jpg": ["flip"], "b/c/large.tar": ["flip"]}
        assert stage.stage(server.url, tmp_path)["verified_by"] == {"md5": len(FILES)}
        assert held(tmp_path) == FILES


def test_a_server_without_ranges_gives_files_in_one_go(tmp_path):
    with serving(under("data", FILES)) as server:
        server.ranges = False
        server.faults["data/b/c/large.tar"] = ["cut"]
        stage.stage(f"{server.url}/data", tmp_path)
        assert held(tmp_path) == FILES


def test_many_files_of_unknown_size_are_asked_for_once(tmp_path, monkeypatch):
    monkeypatch.setattr(address, "_FEW", 0)
    with serving(FILES) as server:
        assert stage.stage(server.url, tmp_path)["files"] == len(FILES) and held(tmp_path) == FILES
        heads = [name for method, name, _ in server.asked if method == "HEAD" and name]
        assert heads == ["b/c/large.tar"]
        (tmp_path / stage.HOME / "record.json").unlink()  # as after a kill
        server.asked.clear()
        assert stage.stage(server.url, tmp_path)["fetched_bytes"] == 0


def test_a_file_a_range_a_pattern_and_a_list_keep_their_names(tmp_path):
    shards = {f"s/train-{n:03d}.tar": noise(1000 + n, n) for n in range(12)}
    with serving({**shards, "s/list.txt": b"train-001.tar\t5\nsub/x.jpg\n", "s/sub/x.jpg": b"x"}) as server:
        for number, (source, names) in enumerate({
            "s/train-003.tar": ["train-003.tar"],
            "s/train-{001..010}.tar": [f"train-{n:03d}.tar" for n in range(1, 11)],
            "s/train-004.tar?key=secret": ["train-004.tar"],
        }.items()):  # fmt: skip
            done = stage.stage(f"{server.url}/{source}", tmp_path / str(number))
            assert done["data"] == str(tmp_path / str(number) / source[2:].partition("?")[0])
            assert sorted(held(tmp_path / str(number))) == names and "secret" not in done["source"]
        done = stage.stage(f"list:{server.url}/s/list.txt", tmp_path / "l")
        assert done["data"] == f"list:{tmp_path}/l/list.txt"
        assert sorted(held(tmp_path / "l")) == ["list.txt", "sub/x.jpg", "train-001.tar"]


def test_other_stores_and_a_shared_disk(tmp_path):
    memory = fsspec.filesystem("memory")
    for name, content in FILES.items():
        memory.pipe(f"/pool/{name}", content)
    stage.stage("memory://pool", tmp_path / "a")
    assert stage.stage(str(tmp_path / "a"), tmp_path / "b")["files"] == len(FILES)
    assert held(tmp_path / "a") == held(tmp_path / "b") == FILES
    assert list(held(tmp_path / "b")) and stage.stage("memory://pool/b/*e", tmp_path / "c")["files"] == 1
    stage.stage(f"file://{tmp_path}/a/b/c/large.tar", tmp_path / "d")
    assert held(tmp_path / "d") == {"large.tar": FILES["b/c/large.tar"]}


KILLED = f"""
import sys
from pathlib import Path
from fastrot.data import pieces, stage
pieces.PIECE = stage.PIECE = {PIECE}
stage.stage(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_kill_leaves_whole_files_and_scratch_and_what_is_there_is_not_fetched_again(tmp_path):
    with serving(FILES) as server:
        server.faults |= {"top.bin": ["stall"], "b/c/large.tar": [200, 200, 200, "stall"]}
        server.faults["b/c/large.tar"] = [None, None, None, "stall", "stall", "stall", "stall", "stall"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(tmp_path)], env=environment)
        notes = tmp_path / "b" / "c" / ".part-large.tar.done"
        until = time.monotonic() + 60
        while not (notes.exists() and notes.read_text().count("\n") == 4 and (tmp_path / "b" / "edge").exists()):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = {name: content for name, content in held(tmp_path).items() if not Path(name).name.startswith(".")}
        assert "b/edge" in there and there.items() <= FILES.items() and "top.bin" not in there
        with (tmp_path / "b" / "c" / ".part-large.tar").open("r+b") as file:  # a disk that lost one piece
            pieces_there = [int(line.split()[0]) for line in notes.read_text().splitlines()[1:]]
            file.seek(pieces_there[0] * PIECE)
            file.write(b"no")
        server.faults.clear()
        server.asked.clear()
        stage.stage(server.url, tmp_path)
        assert held(tmp_path) == FILES
        fetched = [asked for method, name, asked in server.asked if method == "GET" and name == "b/c/large.tar"]
        missing = set(range(8)) - set(pieces_there[1:])
        assert sorted(fetched) == sorted(f"bytes={n * PIECE}-{(n + 1) * PIECE - 1}" for n in missing)


def test_the_second_of_two_waits_and_finds_it_done(tmp_path, capfd):
    with serving(FILES) as server:
        server.delay_s = 0.02
        done = []
        threads = [threading.Thread(target=lambda: done.append(stage.stage(server.url, tmp_path))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(one["fetched_bytes"] for one in done) == [0, sum(map(len, FILES.values()))]
        assert "another process stages there; waiting" in capfd.readouterr().err


def test_a_staged_source_is_the_local_one(tmp_path, fastrot):
    write_folder(tmp_path / "local")
    content = {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "local").rglob("*.jpg")}
    was = fastrot("index", tmp_path / "local", "--json").json
    with serving(content) as server:
        words = [f"data.train={server.url}/local", f"data.stage={tmp_path / 'disk'}"]
        first = fastrot("index", "--json", *words).json
    again = fastrot("index", "--json", *words).json  # the server is gone: what was staged is believed
    assert first["content"] == again["content"] == was["content"] and again["rows"] == len(content)
    (copy,) = (tmp_path / "disk").iterdir()
    assert again["source"] == str(copy)
    assert fastrot("index", "--json", *words[:1]).errors == [
        f"fastrot: data.train: {server.url}/local is not on this machine; set data.stage to a folder on its disk, "
        f"or fastrot stage {server.url}/local DIR"
    ]


def refusal(done) -> str:
    assert done.code == 2 and len(done.errors) == 1 and "Traceback" not in done.err, done.err
    return done.errors[0].removeprefix("fastrot: ")


def test_wrong_sources_are_one_line(tmp_path, fastrot, monkeypatch):
    assert refusal(fastrot("stage", "gopherr://host/x", tmp_path / "d")).startswith(
        "gopherr://host/x: Protocol not known"
    )
    assert refusal(fastrot("stage", tmp_path / "none", tmp_path / "d")) == f"{tmp_path}/none: no such file or folder"
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    line = "gs://bucket/x: the package that reads gs:// is not installed; pip install 'fastrot[gs]'"
    assert refusal(fastrot("stage", "gs://bucket/x", tmp_path / "d")) == line
    with serving(under("data", FILES)) as server:
        assert refusal(fastrot("stage", f"{server.url}/nothing", tmp_path / "d")).endswith(
            "/nothing: no such file or folder"
        )
        server.lists = False
        assert "lists no file; put a SHA256SUMS there" in refusal(
            fastrot("stage", f"{server.url}/data", tmp_path / "d")
        )
        server.password = b"me:secret"
        assert "/data: refused (HTTP 401)" in refusal(fastrot("stage", f"{server.url}/data", tmp_path / "d"))
        server.lists, signed = True, server.url.replace("//", "//me:secret@")
        assert "secret" not in fastrot("stage", f"{signed}/data", tmp_path / "e", "--json").out
        assert held(tmp_path / "e") == FILES
        server.password = None
        server.files["data/SHA256SUMS"] = b"something else"
        assert "SHA256SUMS: line 1: expected a sha256" in refusal(
            fastrot("stage", f"{server.url}/data", tmp_path / "d")
        )
        server.files["data/SHA256SUMS"] = sums({"../../out": b"x"})
        assert "names '../../out', which does not lie below it" in refusal(
            fastrot("stage", f"{server.url}/data", tmp_path / "d")
        )


def test_a_checksum_that_does_not_hold_is_one_line_and_no_file(tmp_path, fastrot):
    for name in ("b/c/large.tar", "top.bin"):
        with serving(under("data", FILES | {"SHA256SUMS": sums(FILES | {name: b"another"})})) as server:
            line = refusal(fastrot("stage", f"{server.url}/data", tmp_path / "d"))
            assert f"/data/{name}: its bytes came 3 times and did not match its checksum" in line
            assert not (tmp_path / "d" / name).exists()


def test_a_server_that_lies_about_ranges_is_refused_in_one_line(tmp_path, fastrot):
    with serving({"large.tar": FILES["b/c/large.tar"]}) as server:
        server.ranges = "lies"
        line = refusal(fastrot("stage", f"{server.url}/large.tar", tmp_path))
        assert "asked for bytes" in line and line.endswith("it cannot be read in parts")


def test_a_server_that_never_answers_is_a_fault(tmp_path):
    with serving(FILES) as server:
        server.faults["top.bin"] = [503] * 9
        with pytest.raises(Fault, match=r"top.bin: failed 4 times \(HTTP 503\); start again"):
            stage.stage(server.url, tmp_path)


def test_folders_that_cannot_take_it_are_one_line(tmp_path, fastrot, monkeypatch):
    source = write_folder(tmp_path / "images", 1, 2)
    (tmp_path / "file").touch()
    line = f"{tmp_path}/file/d: cannot be written (Not a directory); name a folder on this machine's disk"
    assert refusal(fastrot("stage", source, tmp_path / "file" / "d")) == line
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    line = f"{tmp_path}/used: holds mine.txt, which is not the source's; name a folder of its own"
    assert refusal(fastrot("stage", source, tmp_path / "used")) == line
    usage = stage.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert "are free; make room" in refusal(fastrot("stage", source, tmp_path / "d"))


def test_a_disk_that_fills_is_one_line_and_the_rest_comes_later(tmp_path, fastrot):
    with serving(FILES) as server:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PIECE, before[1]))
        try:
            done = fastrot("stage", server.url, tmp_path / "d")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert refusal(done) == (
            f"{tmp_path}/d: cannot be written (File too large); make room and start again: what is whole is kept"
        )
        stage.stage(server.url, tmp_path / "d")
        assert held(tmp_path / "d") == FILES


def test_a_path_below_a_source_is_refused(tmp_path):
    with serving({"l.txt": b"/etc/passwd\n"}) as server, pytest.raises(UserError, match="does not lie below it"):
        stage.stage(f"list:{server.url}/l.txt", tmp_path)


@pytest.mark.slow
def test_each_of_two_hosts_stages_a_copy_of_its_own_and_trains_on_it(tmp_path, narrow):
    write_folder(tmp_path / "images")
    content = {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "images").rglob("*.jpg")}
    words = [
        "train", "model.arch=resnet18", "data.crop=16", "optim.images_per_step=6", "optim.warmup_epochs=0", "run.out=run",
        "run.log_every=1", "run.max_steps=3", "run.tensorboard=false", "engine.kind=plain",
    ]  # fmt: skip
    with serving(content) as server:
        address = f"{server.url}/images"
        as_ranks(2, on_a_host_each, str(tmp_path), [*words, "data.stage=disk"], [address, address])
        fetched = [name for method, name, _ in server.asked if method == "GET" and name.endswith(".jpg")]
    assert sorted(fetched) == sorted([*content, *content])
    for host in "01":
        (copy,) = (tmp_path / host / "disk").iterdir()
        assert under("images", held(copy)) == content
    as_ranks(2, main, [*words[:-1], "engine.kind=plain", f"data.train={tmp_path}/images", f"run.out={tmp_path}/run"])
    ours, theirs = ([line["loss"] for line in metrics(root / "run")] for root in (tmp_path / "0", tmp_path))
    assert ours == theirs and len(ours) == 3
