"""What is compiled into the cache: made once, whole, by one process at a time, and said."""

import logging
import os
import signal
import threading
from pathlib import Path

import pytest

from fastrot_kernels import build, nvrtc


def test_a_process_killed_in_the_middle_leaves_no_lock_and_no_half(tmp_path):
    target = tmp_path / "made"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:

        def half(scratch: Path) -> None:
            scratch.mkdir()
            (scratch / "lock").write_text("held for ever")
            os.write(writing, b".")
            signal.pause()

        build.make(target, "compiling", half)
        os._exit(1)
    os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not target.exists() and any(path.is_dir() for path in tmp_path.iterdir())
    build.make(target, "compiling", lambda scratch: scratch.write_text("whole"))
    assert target.read_text() == "whole"
    assert not any(path.is_dir() for path in tmp_path.iterdir()), "what the killed one left"


def test_a_second_process_says_whom_it_waits_for_and_makes_nothing(tmp_path, caplog):
    """Threads serve: a lock is an open file's, not a process's."""
    target, begun, go_on, made = tmp_path / "made", threading.Event(), threading.Event(), []

    def slowly(scratch: Path) -> None:
        begun.set()
        assert go_on.wait(30)
        scratch.write_text("first")

    def second(scratch: Path) -> None:
        made.append("second")

    first = threading.Thread(target=build.make, args=(target, "compiling x (a minute)", slowly))
    first.start()
    assert begun.wait(30)

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting" in record.getMessage():
                go_on.set()

    heard = Heard()
    logging.getLogger("fastrot_kernels.build").addHandler(heard)
    try:
        build.make(target, "compiling x (a minute)", second)
    finally:
        logging.getLogger("fastrot_kernels.build").removeHandler(heard)
        go_on.set()
        first.join()
    assert target.read_text() == "first" and not made
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "compiling x (a minute)",
        f"waiting for host {os.uname().nodename}, process {os.getpid()}: compiling x (a minute)",
    ]


def test_where_files_cannot_be_locked_each_makes_its_own_and_it_is_said(tmp_path, monkeypatch, caplog):
    def no_locks(handle, kind):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(build.fcntl, "flock", no_locks)
    target = tmp_path / "made"

    def build_folder(scratch: Path) -> None:
        scratch.mkdir()
        if not target.exists():  # another host is faster
            target.mkdir()
            (target / "file").write_text("theirs")

    build.make(target, "compiling", build_folder)
    assert (target / "file").read_text() == "theirs"
    assert "cannot be locked (Operation not supported)" in caplog.text
    assert not list(tmp_path.glob(".made-*"))


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def fails(scratch: Path) -> None:
        scratch.write_text("half")
        raise build.BuildError("no compiler")

    with pytest.raises(build.BuildError, match="no compiler"):
        build.make(tmp_path / "made", "compiling", fails)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]


def test_a_cache_that_cannot_be_written_is_a_build_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(build.BuildError, match="cannot be made"):
        build.make(tmp_path / "file" / "made", "compiling", lambda scratch: scratch.write_text(""))


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.c").write_text("int seven(void);\nint seven(void) { return 7; }\n")
    return tmp_path / "source"


def test_a_library_is_compiled_once_and_a_damaged_one_again(source, caplog, monkeypatch):
    assert build.library(source, "a").seven() == 7
    (made,) = (source.parent / "cache/kernels").glob("a-*.so")
    other = source.parent / "other/kernels" / made.name  # the loader knows the first by its path
    other.parent.mkdir(parents=True)
    other.write_bytes(b"\x7fELF, and then the power went")
    monkeypatch.setenv("FASTROT_CACHE", str(source.parent / "other"))
    assert build.library(source, "a").seven() == 7
    assert build.library(source, "a").seven() == 7
    assert [record.getMessage() for record in caplog.records] == 2 * ["compiling a (C, a few seconds)"]


def test_another_machine_or_compiler_on_the_same_cache_has_its_own_file(source, monkeypatch):
    build.library(source, "a")
    monkeypatch.setattr(build, "machine", lambda: ("aarch64", "glibc 2.17"))
    build.library(source, "a")
    run = build._run
    monkeypatch.setattr(build, "_run", lambda command: "gcc 99" if "--version" in command else run(command))
    build.library(source, "a")
    assert len(list((source.parent / "cache/kernels").glob("a-*.so"))) == 3


def test_machine_code_that_the_power_took_is_compiled_again(source, monkeypatch):
    monkeypatch.setattr(nvrtc, "_compiler", lambda: (None, "13.0"))
    monkeypatch.setattr(nvrtc, "_compiled", lambda *_: b"\x7fELF code")
    (source / "k.cu").write_text("")
    assert nvrtc.cubin(source / "k.cu", "sm_90") == b"\x7fELF code"
    (made,) = (source.parent / "cache/kernels").glob("k-*.cubin")
    made.write_bytes(b"")
    assert nvrtc.cubin(source / "k.cu", "sm_90") == b"\x7fELF code"
