"""Reading: C's threads against Python's, files that change and disks that freeze; whose memory is used again when."""

import ctypes
import gc
import importlib
import os
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import write_folder
from fastrot.data import storage as storages
from fastrot.data.bad_images import BadImages
from fastrot.data.decode import make_decoder
from fastrot.data.index import index
from fastrot.data.loader import Loader
from fastrot.data.manifest import Manifest
from fastrot.data.order import FullOrder
from fastrot.data.plan import Plan
from fastrot.data.storage import FileStorage
from fastrot.errors import BadImage, Fault, Unreadable
from fastrot_kernels import reader
from fastrot_kernels.arenas import Arenas
from fastrot_kernels.build import BuildError, library

CPU = torch.device("cpu")


def indexed(source, tmp_path) -> Manifest:
    return Manifest.load(index(str(source), tmp_path / "cache", 10**8, lambda items, total, title: items))


@pytest.fixture
def manifest(tmp_path):
    return indexed(write_folder(tmp_path / "d"), tmp_path)


def by_python(manifest, monkeypatch) -> FileStorage:
    """As where there is no compiler."""

    def no_compiler(threads):
        raise BuildError("there is no C compiler")

    with monkeypatch.context() as patched:
        patched.setattr(storages.reader, "Reader", no_compiler)
        return FileStorage(manifest)


def same(ones, others) -> bool:
    return all(
        str(one) == str(other) if isinstance(one, BadImage) else np.array_equal(one, other)
        for one, other in zip(ones, others, strict=True)
    )


def test_c_reads_what_python_reads_and_finds_the_same_faults(manifest, tmp_path, monkeypatch):
    os.remove(manifest.path(1))
    os.truncate(manifest.path(2), 9)
    os.utime(manifest.path(3))
    os.remove(manifest.path(4))
    os.mkfifo(manifest.path(4))  # opened, it would wait for a writer
    rows = np.array([5, 1, 2, 7, 3, 7, 0, 4])
    for one in (manifest, replace(manifest, file_state=None)):
        read = FileStorage(one).read(rows)
        assert same(read, by_python(one, monkeypatch).read(rows))
        assert [isinstance(buffer, Unreadable) for buffer in read][:4] == [False, True, True, False]
    assert isinstance(read[4], np.ndarray)  # its time was not kept
    assert "not a regular file" in str(read[7])
    assert FileStorage(manifest).read(np.arange(0)) == []


def test_a_shard_is_read_as_its_files_and_pixels_keep_their_shape(manifest, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row in range(len(manifest)):
            tar.add(os.fsdecode(manifest.path(row)), f"{row:02d}.jpg")
    shard = indexed(tmp_path / "a.tar", tmp_path)
    rows = np.random.default_rng(0).integers(0, len(shard), 40)
    assert same(FileStorage(shard).read(rows), [np.fromfile(manifest.path(row), np.uint8) for row in rows])
    pixels = replace(
        shard, kind=np.full(12, 7, np.uint8), height=np.full(12, 2, np.int32), width=np.full(12, 3, np.int32),
        length=np.full(12, 18),
    )  # fmt: skip
    for one in (FileStorage(pixels), by_python(pixels, monkeypatch)):
        assert one.read(rows)[3].shape == (2, 3, 3)


def test_a_file_that_shrinks_while_it_is_read_is_no_fault_of_the_process(tmp_path):
    """A mapping of it would be a SIGBUS."""
    path, size, stop = tmp_path / "a", 1 << 20, threading.Event()
    path.write_bytes(bytes(size))
    name, out = np.frombuffer(os.fsencode(path), np.uint8), np.empty(size, np.uint8)

    def shrink():
        while not stop.is_set():
            os.truncate(path, 100)
            os.truncate(path, size)

    requests = np.zeros(8, reader.REQUEST)
    requests["path"], requests["path_length"], requests["out"] = name.ctypes.data, len(name), out.ctypes.data
    requests["length"], requests["size"], requests["time"] = size, reader.ANY_SIZE, reader.ANY_TIME
    made, shrinking = reader.Reader(2), threading.Thread(target=shrink)
    shrinking.start()
    try:
        outcomes = np.concatenate([made.start(requests, out).result() for _ in range(20)])
    finally:
        stop.set()
        shrinking.join()
    assert set(outcomes.tolist()) <= {reader.READ, reader.LEFT} and reader.LEFT in outcomes


@pytest.fixture
def disk(monkeypatch):
    """The reader's library on a disk that freezes."""
    flags = ("-include", str(Path(__file__).with_name("frozen.h")))
    made = library(Path(reader.__file__).parent, "reader_frozen", flags=flags)
    real = reader._library()
    for name in ("open", "start", "wait", "forget", "close", "free"):
        ours, theirs = getattr(made, f"reader_{name}"), getattr(real, f"reader_{name}")
        ours.argtypes, ours.restype = theirs.argtypes, theirs.restype
    monkeypatch.setattr(reader, "_library", lambda: made)
    monkeypatch.setattr(reader, "_ENDS_S", 0.01)
    made.is_frozen = ctypes.c_int.in_dll(made, "frozen")
    made.waiting = ctypes.c_int.in_dll(made, "waiting")
    yield made
    made.is_frozen.value = 0


def test_a_frozen_disk_ends_the_run_naming_the_file_and_keeps_its_memory(manifest, disk):
    plan = Plan(5, manifest.height, manifest.width, FullOrder(len(manifest), 5))
    decoder, _ = make_decoder("torch", "cpu", CPU, 1, 4, 2)
    storage = FileStorage(manifest, readers=1)
    made = Loader(manifest, plan, storage, decoder, BadImages(None, "d", 10), CPU, 2, 0.3)
    first = manifest.name(int(plan.at(0, 4).rows.min()))  # a batch is read in the order of its files
    disk.is_frozen.value = 1
    with pytest.raises(Fault, match=f"no batch for data.timeout 0.3 s: the loader was reading rows .*, at {first}$"):
        for batch in made.train(range(1), 0, 4, 1, 0, 1, lambda epoch: 20):
            next(batch.micro_steps)
    made.close()  # does not wait
    assert disk.waiting.value == 1


def test_a_dropped_batch_is_not_read_on_and_its_memory_waits_for_the_read_under_way(manifest, disk):
    storage = FileStorage(manifest, readers=1)
    disk.is_frozen.value = 1
    reading = storage.start(np.arange(4))
    while not disk.waiting.value:
        pass
    del reading
    gc.collect()
    assert not storage._arenas._free
    disk.is_frozen.value = 0
    (buffer,) = storage.read(np.array([5]))  # the one thread ended its read before
    assert np.array_equal(buffer, np.fromfile(manifest.path(5), np.uint8))
    storage.read(np.array([6]))  # looks at what was dropped
    assert len(storage._arenas._free) >= 1


def test_memory_that_a_thread_writes_into_outlives_its_reader(manifest, disk):
    held = len(reader._held)
    storage = FileStorage(manifest, readers=1)
    disk.is_frozen.value = 1
    reading = storage.start(np.arange(4))
    while not disk.waiting.value:
        pass
    del reading, storage
    gc.collect()
    assert len(reader._held) == held + 1 and disk.waiting.value == 1


def test_memory_is_used_again_once_no_part_of_it_is_left():
    arenas = Arenas(pinned=False)
    first = arenas.take(1000)
    place, part = first.ctypes.data, first[10:20][2:4]
    del first
    other = arenas.take(1000)
    assert other.ctypes.data != place, "a decoder still has a part of it"
    del part
    assert arenas.take(1200).ctypes.data == place
    taken = [arenas.take(n + 1) for n in range(100)]
    del taken
    assert len(arenas._free) == 16


def test_a_decoder_keeps_a_batchs_memory_until_it_is_done(manifest):
    """While it works no other batch is read there, whoever else has let go of it."""
    torch_decoder = importlib.import_module("fastrot.data.decode.torch")
    looked, real = threading.Event(), torch_decoder.window_pixels
    waiting = torch_decoder.TorchDecoder(1, lambda *image: looked.wait() and real(*image))  # lets go image by image
    others = (make_decoder(name, "cpu", CPU, 1, 4, 2)[0] for name in ("dali", "turbo"))
    for decoder in (waiting, *others):
        storage = FileStorage(manifest)
        loader = Loader(
            manifest, Plan(5, manifest.height, manifest.width, FullOrder(12, 5)), storage, decoder,
            BadImages(None, "d", 0), CPU, 2, 60.0,
        )  # fmt: skip
        sample = loader.plan.at(0, 4)
        decoder.submit(loader._to_decode(storage.read(sample.rows), sample.rows, sample.windows, 20))
        gc.collect()
        assert not storage._arenas._free, decoder.name
        looked.set()
        decoder.result()
        decoder.submit(loader._to_decode(storage.read(sample.rows), sample.rows, sample.windows, 20))
        decoder.result()
        gc.collect()
        assert storage._arenas._free, decoder.name
        loader.close()
