"""`fastrot stream`: what the loader delivers is the stream, whoever decodes and shares it, and replaced images are told."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, write_folder
from fastrot import config as configs
from fastrot.data.build import plan_of
from fastrot.data.index import index
from fastrot.data.loader import Loader
from fastrot.data.manifest import Manifest
from fastrot.data.plan import StreamHash

GOLDEN = json.loads((ROOT / "tests" / "golden" / "stream.json").read_text())["stream"]


@pytest.mark.parametrize("window", ["random_resized", "random"])
def test_the_stream_is_one_for_any_ranks_decoder_and_start(images, fastrot, window):
    words = [
        "stream",
        "--json",
        f"data.train={images}",
        "optim.images_per_step=5",
        "data.crop=16",
        f"data.window={window}",
        "rotation.views=one",
    ]
    want = fastrot(*words, "--steps", 8)
    assert want.out.startswith("step 0  position 0  epoch 0.000  rows ")
    assert want.json["sha256"] == fastrot(*words, "--steps", 8, "--ranks", 4).json["sha256"]
    later = ["--steps", 3, "--first-step", 5]
    torch_, dali = (fastrot(*words, *later, "--pixels", "--decode", name).json for name in ("torch", "dali"))
    ranks = fastrot(*words, *later, "--pixels", "--decode", "dali", "--ranks", 3).json
    assert torch_["sha256"] == dali["sha256"] == ranks["sha256"] != want.json["sha256"]
    assert ranks["pixels_sha256"] == dali["pixels_sha256"]
    assert want.json["delivered_sha256"] == want.json["sha256"] and want.json["replaced"] == []
    assert fastrot(*words, "--steps", 0).code == 2


@pytest.fixture(scope="module")
def golden_images(tmp_path_factory):
    """The images whose stream the golden values are of: their sizes and labels."""
    root = tmp_path_factory.mktemp("golden")
    for i in range(37):
        Image.new("RGB", (100 + 13 * i % 400, 100 + 7 * i % 300), (i, 2 * i, 3 * i)).save(root / f"{i}.jpg")
    (root / "list").write_text("".join(f"{i}.jpg\t{i % 5}\n" for i in range(37)))
    return f"list:{root / 'list'}"


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['views']}-{case['first_step']}")
@pytest.mark.parametrize("ranks", [1, 3])
def test_what_the_loader_delivers_has_the_golden_hash(golden_images, fastrot, case, ranks):
    done = fastrot(
        "stream", "--json", f"data.train={golden_images}", f"run.seed={case['seed']}", "data.crop=8", "--ranks", ranks,
        f"optim.images_per_step={case['batch']}", f"rotation.views={case['views']}", "data.decode=torch",
        "--steps", case["steps"], "--first-step", case["first_step"],
    )  # fmt: skip
    assert done.json["sha256"] == done.json["delivered_sha256"] == case["sha256"]


WORDS = ["stream", "--json", "data.crop=8", "optim.images_per_step=5", "data.decode=torch", "--steps", 6]


@pytest.fixture
def broken(fastrot, tmp_path):
    """A folder of which rows 4 and 5 broke after it was indexed; (words of a stream, its result before, manifest)."""
    folder = write_folder(tmp_path / "d")
    words = [*WORDS, f"data.train={folder}"]
    before = fastrot(*words).json
    manifest = Manifest.load(index(str(folder), tmp_path / "cache", 10**8, lambda i, n, t: i))
    for path in (folder / "class1" / "0.jpg", folder / "class1" / "1.jpg"):
        times = path.stat()
        path.write_bytes(b"\xff\xd8" + bytes(times.st_size - 2))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the cache shall not see it
    return words, before, manifest


def test_replaced_images_are_told_and_the_stream_stays_the_plans(broken, fastrot):
    """The loader shows row 6 for both, with its own window; two epochs and a half."""
    words, before, manifest = broken
    config, _ = configs.load(None, [word for word in words if "." in str(word)])
    plan = plan_of(config, manifest)
    hashed, replaced = StreamHash(), []
    for start in range(0, 30, 5):
        sample = plan.at(start, start + 5)
        for at in np.flatnonzero(np.isin(sample.rows, (4, 5))).tolist():
            replaced.append([start + at, int(sample.rows[at]), 6])
            sample = sample.replaced(at, plan.of(np.array([6]), sample.epochs[at : at + 1]))
        hashed.add(sample, manifest.label[sample.rows])
    assert len(replaced) in (4, 5, 6)
    for ranks in (1, 3):
        done = fastrot(*words, "--ranks", ranks)
        assert done.json["sha256"] == before["sha256"]
        assert done.json["replaced"] == replaced
        assert done.json["delivered_sha256"] == hashed.hexdigest() != before["sha256"]
        assert f"position {replaced[0][0]}: row {replaced[0][1]} cannot be read; row 6 is shown for it" in done.out


def test_more_bad_images_than_allowed_stop_it(broken, fastrot):
    done = fastrot(*broken[0], "data.max_bad=1")
    assert done.code == 3 and "2 unreadable images, more than data.max_bad 1" in done.errors[0]


@pytest.mark.parametrize("fault", ["turns", "flips", "labels", "rows"])
def test_a_loader_that_delivers_something_else_has_another_hash(images, fastrot, monkeypatch, fault):
    words = [*WORDS, f"data.train={images}"]
    want = fastrot(*words).json["sha256"]
    batch = Loader._batch

    def other(*arguments, **options):
        made = batch(*arguments, **options)
        if fault == "rows":
            return replace(made, sample=replace(made.sample, rows=(made.sample.rows + 1) % 12))
        return replace(made, **{fault: (getattr(made, fault) + 1) % 2})

    monkeypatch.setattr(Loader, "_batch", other)
    done = fastrot(*words).json
    assert done["sha256"] != want and done["replaced"] == []
