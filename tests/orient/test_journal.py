"""What is replaced can be had back: real kills before every step that touches a disk, then on, and back."""

import json
import os
import signal
import sys

import pytest
from places import NEEDS_TURBOJPEG, answer, jpeg, make, state

from fastrot.errors import UserError
from fastrot.orient import journal
from fastrot.orient.turning import apply

pytestmark = NEEDS_TURBOJPEG
FILES = {"a/one.jpg": jpeg(1), "two.jpg": jpeg(2, 6), "three.jpg": jpeg(3)}
ANSWERS = [answer("a/one.jpg", 90), answer("two.jpg", 180), answer("three.jpg", 0)]
STEPS = {
    "open",
    "os.rename",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.utime",
    "os.truncate",
    "shutil.rmtree",
}


def struck(work, place, step) -> bool:
    """Do `work` in a child that is killed (SIGKILL) before its step-th touch of the disk; False where it ends before that."""
    child = os.fork()
    if not child:
        count = 0

        def touch(*_):
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        def hook(event, args):
            if event in STEPS and str(place) in str(args[0]):
                touch()

        def fsync(handle, real=os.fsync):
            touch()
            real(handle)

        try:
            os.fsync = fsync
            sys.addaudithook(hook)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def ways(place, how):
    """The same command each time, the folder that it changes, and its journal."""
    folder, in_place = place / "photos", not how.startswith("copy")
    words = how if in_place else f"copy:{place}/out"
    target = folder if in_place else place / "out"
    return (
        lambda: apply(ANSWERS, folder, words, in_place),
        target,
        target.with_name(target.name + ".orient-journal.jsonl"),
    )


EACH = [pytest.param(how, 1, marks=pytest.mark.slow) for how in ("lossless", "exif", "copy")]


@pytest.mark.parametrize(("how", "apart"), [("lossless", 13), ("copy", 13), *EACH])
def test_a_kill_at_any_step_loses_nothing(tmp_path, how, apart):
    quiet = make(tmp_path / "quiet" / "photos", FILES)
    before = state(quiet)
    ways(quiet.parent, how)[0]()
    done = state(quiet.parent)
    for step in range(0, 1000, apart):
        place = tmp_path / str(step)
        make(place / "photos", FILES)
        work, target, book = ways(place, how)
        if not struck(work, place, step):
            break
        found = state(target) if target.exists() else {}
        for name, one in found.items():  # each file is what it was or what it becomes, in bytes, mode and time
            if ".tmp-orient-" not in name:
                assert one in (before[name], done[f"{target.name}/{name}"])
        assert set(before) <= set(found) or how == "copy"
        if step // apart % 2:
            work()
            files = {name: one for name, one in state(place).items() if name != book.name}
            assert files == {name: one for name, one in done.items() if name != book.name}
        if book.exists():
            journal.undo(book)
        assert state(place) == {f"photos/{name}": one for name, one in before.items()} or (
            how == "copy" and not step % 2
        )
        assert state(place / "photos") == before
    assert step > 25


@pytest.mark.parametrize("apart", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_an_undo_that_is_killed_at_any_step_goes_on(tmp_path, apart):
    for step in range(0, 1000, apart):
        place = tmp_path / str(step)
        before = state(make(place / "photos", FILES))
        work, _, book = ways(place, "lossless")
        work()
        if not struck(lambda book=book: journal.undo(book), place, step):
            break
        if book.exists():
            journal.undo(book)
        assert state(place) == {f"photos/{name}": one for name, one in before.items()}
    assert step > 15


def test_a_journal_cut_at_any_byte_goes_on(tmp_path):
    place = tmp_path / "place"
    before = state(make(place / "photos", FILES))
    work, folder, book = ways(place, "exif")
    work()
    whole = book.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        with book.open("wb") as file:  # as a kill in the midst of a line: the file it speaks of is not replaced yet
            file.write(whole[:length])
        with journal.opened(book, folder) as found:
            assert len(found.entries) == whole[:length].count(b"\n") - 1
        assert book.read_bytes() == whole[: whole.rfind(b"\n", 0, length) + 1]
    book.write_bytes(whole)
    journal.undo(book)
    assert state(place / "photos") == before


def test_undo_leaves_what_has_changed_since(tmp_path):
    place = tmp_path / "place"
    before = state(make(place / "photos", FILES))
    work, folder, book = ways(place, "lossless")
    work()
    (folder / "two.jpg").write_bytes(b"edited")
    with pytest.raises(UserError, match=r"1 of 2 files have changed since, as two.jpg") as caught:
        journal.undo(book)
    assert "\n" not in str(caught.value)
    assert (folder / "two.jpg").read_bytes() == b"edited" and state(folder)["a/one.jpg"] == before["a/one.jpg"]
    assert (place / "photos.orient-journal.jsonl.originals/two.jpg").read_bytes() == FILES["two.jpg"]


def test_undo_never_gives_back_damaged_bytes(tmp_path):
    place = tmp_path / "place"
    make(place / "photos", FILES)
    work, folder, book = ways(place, "lossless")
    work()
    now = state(folder)
    (place / "photos.orient-journal.jsonl.originals/two.jpg").write_bytes(b"damaged")
    with pytest.raises(UserError, match="gone or damaged"):
        journal.undo(book)
    assert state(folder)["two.jpg"] == now["two.jpg"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"file": "x"}\n', "no journal of fastrot orient"),
        ("[1]\n", "no journal of fastrot orient"),
        ("\xff\n", "no journal of fastrot orient"),
        ('{"journal": "fastrot orient", "version": 1, "folder": "/nowhere"}\n', "is the journal of /nowhere"),
        ('{"journal": "fastrot orient", "version": 1, "folder": "FOLDER"}\n{}\n', "is damaged"),
        (
            '{"journal": "fastrot orient", "version": 1, "folder": "FOLDER"}\n{"file": "../x", "before": "", "after": ""}\n',
            "damaged",
        ),
    ],
)
def test_a_journal_of_something_else(tmp_path, text, says):
    folder = make(tmp_path / "photos", FILES)
    book = tmp_path / "j.jsonl"
    book.write_text(text := text.replace("FOLDER", str(folder)))
    with pytest.raises(UserError, match=says) as caught:
        apply(ANSWERS, folder, "exif", in_place=True, journal=book)
    assert "\n" not in str(caught.value) and book.read_text() == text


def test_a_journal_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such journal"):
        journal.undo(tmp_path / "none.jsonl")


def test_a_journal_in_use(tmp_path):
    folder = make(tmp_path / "photos", FILES)
    book = tmp_path / "j.jsonl"
    with journal.opened(book, folder), pytest.raises(UserError, match="in use"):
        journal.undo(book)


def test_names_that_are_no_text(tmp_path):
    """A path's bytes need not be UTF-8."""
    name = os.fsdecode(b"\xff\n.jpg")
    folder = make(tmp_path / "photos", {name: jpeg(1)})
    before = state(folder)
    apply([answer(name, 90)], folder, "lossless", in_place=True, journal=tmp_path / "j.jsonl")
    assert state(folder) != before
    lines = (tmp_path / "j.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["file"] == name
    assert journal.undo(tmp_path / "j.jsonl")["given_back"] == 1
    assert state(folder) == before


def test_where_a_disk_has_no_links_originals_are_copies(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(journal.os, "link", no_links)
    folder = make(tmp_path / "photos", FILES)
    before = state(folder)
    apply(ANSWERS, folder, "exif", in_place=True, journal=tmp_path / "j.jsonl")
    journal.undo(tmp_path / "j.jsonl")
    assert state(folder) == before
