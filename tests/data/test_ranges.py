"""Shards and .beton read where they are: the local file's pixels, in order, by few requests, whatever the server does."""

from contextlib import ExitStack

import fsspec
import numpy as np
import pytest

import fastrot
from conftest import metrics, write_folder
from data.test_tar import shard_folder
from fastrot.data import ranges
from fastrot.data.index import index
from fastrot.data.manifest import Manifest
from fastrot.errors import Fault, UserError
from fastrot.remote import file as far
from fastrot.remote import store, web
from web_server import serving

BLOCK = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(store, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(web, "STALL_S", 0.5)
    for module in (far, ranges):
        monkeypatch.setattr(module, "BLOCK", BLOCK)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with three shards and a .beton of 36 images."""
    from fastrot.config import Data
    from fastrot.data.encode import Encoding
    from fastrot.data.pack import pack

    root = tmp_path_factory.mktemp("packed")
    folder = write_folder(root / "images", 3, 12)
    manifest = Manifest.load(index(str(folder), root / "cache", 10**8, lambda items, total, title: items))
    shard_folder(manifest, root)
    pack(str(folder), str(root / "a.beton"), Encoding("mix", 90, None, 0.5), 1, Data())
    return root


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir() if path.suffix in (".tar", ".beton")}


def pixels(source, epochs=2, **options):
    """All that a loader gives in two epochs, and the manifest."""
    manifest = fastrot.open(str(source))
    with fastrot.Loader(manifest, 7, 32, seed=3, decode="turbo", device="cpu", **options) as loader:
        batches = [batch for _ in range(epochs) for batch in loader]
    columns = ("pixels", "labels", "flips")
    found = [np.concatenate([getattr(batch, name).numpy() for batch in batches]) for name in columns]
    return [*found, np.concatenate([batch.rows for batch in batches])], manifest


FULL, WINDOW = {"order": "full"}, {"order": "window", "window_rows": 4, "window_chunks": 2}


@pytest.mark.parametrize(
    "name, order",
    [
        ("a.beton", FULL),
        ("s-{000..002}.tar", WINDOW),
        pytest.param("s-{000..002}.tar", FULL, marks=pytest.mark.slow),
        pytest.param("a.beton", WINDOW, marks=pytest.mark.slow),
    ],
)
def test_the_stream_is_the_local_files(packed, name, order):
    want, local = pixels(packed / name, **order)
    with serving(contents(packed)) as server:
        got, there = pixels(f"{server.url}/{name}", **order)
        assert there.content == local.content and all(map(np.array_equal, got, want))
        assert {method for method, *_ in server.asked} <= {"HEAD", "GET"}


def test_other_stores_patterns_and_a_server_that_fails(packed):
    want, local = pixels(packed / "s-{000..002}.tar")
    memory = fsspec.filesystem("memory")
    for name, content in contents(packed).items():
        memory.pipe(f"/shards/{name}", content)
    got, there = pixels("memory://shards/s-*.tar")
    assert there.content == local.content and all(map(np.array_equal, got, want))
    with serving(contents(packed)) as server:
        source = f"{server.url}/s-{{000..002}}.tar"
        fastrot.open(source)
        server.faults |= {"s-000.tar": ["cut", 503], "s-001.tar": ["stall"], "s-002.tar": ["short", "cut"]}
        got, _ = pixels(source)
        assert all(map(np.array_equal, got, want)) and not any(server.faults.values())


def test_windows_keep_the_reads_few(packed):
    with serving(contents(packed)) as server:
        source = f"{server.url}/s-{{000..002}}.tar"
        fastrot.open(source)
        counts = {}
        for name, order in {"full": {}, "window": {"order": "window", "window_rows": 4, "window_chunks": 2}}.items():
            server.asked.clear()
            pixels(source, epochs=1, **order)
            counts[name] = sum(method == "GET" for method, *_ in server.asked)
        blocks = sum(-(-len(content) // BLOCK) for name, content in server.files.items() if name.endswith(".tar"))
        assert counts["full"] >= 36 and counts["window"] <= blocks


def test_the_cache_of_blocks_is_bounded(packed, monkeypatch):
    monkeypatch.setattr(ranges, "CACHE", 3 * BLOCK)
    with serving(contents(packed)) as server:
        manifest = fastrot.open(f"{server.url}/a.beton")
        made = ranges.Ranges(manifest, True)
        rows = np.arange(len(manifest))
        out = [np.zeros(n, np.uint8) for n in manifest.length.tolist()]
        made.start(rows, out)[0]()
        assert len(made._kept) == 3
        made.close()
        content = (packed / "a.beton").read_bytes()
        assert all(
            bytes(one) == content[o : o + len(one)] for one, o in zip(out, manifest.offset.tolist(), strict=True)
        )


def test_servers_that_cannot_be_read_in_place_are_one_line(packed, fastrot, tmp_path):
    with serving(contents(packed)) as server:
        server.ranges = "lies"
        done = fastrot("index", f"{server.url}/a.beton")
        assert done.code == 2 and len(done.errors) == 1 and "it cannot be read in parts" in done.errors[0]
        server.ranges = False
        done = fastrot("index", f"{server.url}/s-000.tar")
        assert done.code == 2 and len(done.errors) == 1 and "its server ignores ranges; stage it" in done.errors[0]
        server.ranges = True
        done = fastrot("index", f"{server.url}/s-{{000..009}}.tar")
        assert done.code == 2 and "/s-003.tar: no such file" in done.errors[0]
        signed = server.url.replace("//", "//me:secret@")
        done = fastrot("index", f"{signed}/a.beton")
        assert (
            done.code == 2 and "is not on this machine; set data.stage" in done.errors[0] and "secret" not in done.err
        )
        server.files["z.tar"] = b"\x1f\x8b" + bytes(1000)
        done = fastrot("index", f"{server.url}/z.tar")
        assert done.code == 2 and "is compressed; unpack it first: gunzip" in done.errors[0]


def test_a_store_that_fails_while_images_are_read_ends_the_run_and_blames_no_image(packed):
    with serving(contents(packed)) as server:
        source = f"{server.url}/s-{{000..002}}.tar"
        fastrot.open(source)
        server.faults["s-001.tar"] = [503] * 1000
        with pytest.raises(Fault, match=r"s-001.tar: failed 3 times \(HTTP 503\)"):
            pixels(source)
        server.faults.clear()
        manifest = fastrot.open(source)
        server.files["s-001.tar"] = server.files["s-001.tar"] + bytes(512)
        with (
            pytest.raises(UserError, match="s-001.tar: changed"),
            fastrot.Loader(manifest, 7, 32, decode="turbo") as some,
        ):
            list(some)


def test_a_run_trains_in_place_and_goes_on(packed, fastrot, tmp_path, narrow):
    words = [
        "train", "model.arch=resnet18", "data.crop=16", "optim.images_per_step=6", "optim.epochs=3",
        "optim.warmup_epochs=0", "run.log_every=1", "run.tensorboard=false", "engine.kind=plain",
    ]  # fmt: skip
    with ExitStack() as stack:
        server = stack.enter_context(serving(contents(packed)))
        there = [*words, f"data.train={server.url}/s-{{000..002}}.tar", f"run.out={tmp_path / 'a'}"]
        assert fastrot(*there, "run.max_steps=2").code == 0
        assert fastrot(*there, "run.max_steps=4").code == 0
    here = [*words, f"data.train={packed}/s-{{000..002}}.tar", f"run.out={tmp_path / 'b'}", "run.max_steps=4"]
    assert fastrot(*here).code == 0
    assert [line["loss"] for line in metrics(tmp_path / "a")] == [line["loss"] for line in metrics(tmp_path / "b")]
