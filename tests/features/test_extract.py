"""Feature stores: the numbers of a plain loop, whatever was killed and however many ranks worked."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms as T

from conftest import ROOT, write_folder
from fastrot import distributed
from fastrot.data.decode.squash import squashed_pixels
from fastrot.data.manifest import Manifest
from fastrot.data.order import FullOrder
from fastrot.data.plan import Plan
from fastrot.errors import UserError
from fastrot.features import write as writing
from fastrot.features.read import open_store
from fastrot.files import sha256_of
from fastrot.models import backbone
from fastrot.models.resnet import backbone_state, build_model
from fastrot.models.taps import flat_features

pytestmark = pytest.mark.usefixtures("narrow")

SMALL = ("--pool", "adaptive", "data.crop=64", "engine.images_per_micro_step=2", "data.decode=torch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_file(backbone_state(build_model("resnet18", 4, 5)), path)
    return path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def plain_loop(checkpoint, images, taps, transform, pool):
    """The usual eval script: PIL, torchvision's transforms, one image at a time."""
    model, _ = backbone.load_backbone(str(checkpoint))
    normalise = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    rows = []
    with torch.no_grad():
        for path in sorted(images.rglob("*.jpg")):
            batch = normalise(transform(Image.open(path).convert("RGB")))[None]
            rows.append(flat_features(model, batch, taps, pool))
    return {tap: torch.cat([row[tap] for row in rows]).numpy() for tap in taps}


def test_features_are_those_of_a_plain_loop(fastrot, images, checkpoint, tmp_path):
    words = ("features", "--checkpoint", checkpoint, "--data", images, "--taps", "1,3,5,avg", "--out", tmp_path / "f")
    done = fastrot(*words, *SMALL, "--json").json
    assert done["rows"] == done["computed"] == 12 and done["taps"]["avg"] == 64
    made = open_store(tmp_path / "f")
    transform = T.Compose([T.Resize(73), T.CenterCrop(64)])
    want = plain_loop(checkpoint, images, ("feature1", "feature3", "feature5", "avg"), transform, "adaptive")
    for tap, values in want.items():
        got = made.features[tap]
        assert got.dtype == np.float32
        # a level of rounding between one resize of a box and resize + crop
        assert np.abs(got - values).mean() < 0.01 * np.abs(values).mean(), tap
    assert made.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert Manifest.load(tmp_path / "f" / "rows").name(5).endswith("class1/1.jpg")
    assert made.classes == ["class0", "class1", "class2"]


def test_the_svms_pictures_are_torchvisions_to_the_bit(images):
    transform = T.Compose([T.Resize(256), T.Resize((224, 224))])
    for path in sorted(images.rglob("*.jpg")):
        want = np.asarray(transform(Image.open(path).convert("RGB")))
        got = squashed_pixels(np.frombuffer(path.read_bytes(), np.uint8), 1, None, 224, 256).numpy()
        assert np.array_equal(got, want)


def test_the_svms_features_are_those_of_a_plain_loop(fastrot, images, checkpoint, tmp_path):
    words = ("features", "--checkpoint", checkpoint, "--data", images, "--taps", "4", "--transform", "svm")
    assert fastrot(*words, *SMALL, "--out", tmp_path / "f").code == 0
    transform = T.Compose([T.Resize(73), T.Resize((64, 64))])
    want = plain_loop(checkpoint, images, ("feature4",), transform, "adaptive")["feature4"]
    np.testing.assert_allclose(open_store(tmp_path / "f").features["feature4"], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("passes", [(), ("--passes", 2)], ids=["evaluation", "augmented"])
def test_a_store_killed_twice_and_resumed_is_the_same_bytes(fastrot, images, checkpoint, tmp_path, monkeypatch, passes):
    words = ["features", "--checkpoint", checkpoint, "--data", images, *SMALL, *passes, "--out"]
    blocks = 12 if passes else 6
    assert fastrot(*words, tmp_path / "whole").code == 0
    monkeypatch.setattr(writing, "_COMMIT_S", -1.0)
    write = os.pwrite
    for fails_at in (7, 6):  # writes: 5 a block; the second death lies inside a block
        left = iter(range(fails_at))

        def dying(handle, view, at, left=left):
            if next(left, None) is None:
                write(handle, bytes(view)[: len(view) // 2], at)
                raise OSError(28, "No space left on device")
            return write(handle, view, at)

        monkeypatch.setattr(writing.os, "pwrite", dying)
        died = fastrot(*words, tmp_path / "killed")
        distributed.end()  # what the end of the process does after a fault
        assert died.code == 3 and "cannot be written (No space left on device)" in died.err
    monkeypatch.setattr(writing.os, "pwrite", write)
    done = fastrot(*words, tmp_path / "killed", "--json")
    assert done.json["computed"] == 2 * blocks - 2 * 2 and f"goes on after 2 of {blocks} blocks" in done.err
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert fastrot(*words, tmp_path / "killed", "--json").json["computed"] == 0


def test_augmented_passes_are_the_plans_epochs(fastrot, images, checkpoint, tmp_path):
    """The oracle: each window cut and resized by PIL, mirrored where the plan says, one image at a time."""
    words = ("features", "--checkpoint", checkpoint, "--data", images, "--taps", "4,avg", "--passes", 3, "run.seed=5")
    done = fastrot(*words, *SMALL, "data.scale=[0.3,0.9]", "--out", tmp_path / "f", "--json")
    assert (done.json["rows"], done.json["passes"], done.json["computed"]) == (
        12,
        3,
        36,
    ) and "3 augmented passes" in done.err
    made, rows = open_store(tmp_path / "f"), Manifest.load(tmp_path / "f" / "rows")
    assert made.labels.tolist() == 3 * rows.label.tolist()
    facts = json.loads((tmp_path / "f" / "manifest.json").read_text())
    assert facts["passes"] == {
        "count": 3, "seed": 5, "window": "random_resized", "scale": [0.3, 0.9], "ratio": [0.75, 4 / 3], "flip": 0.5,
    }  # fmt: skip
    plan = Plan(5, rows.height, rows.width, FullOrder(12, 5), scale=(0.3, 0.9))
    model, _ = backbone.load_backbone(str(checkpoint))
    normalise = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    for at in (0, 7, 12, 30, 35):
        sample = plan.of(np.array([at % 12]), np.array([at // 12]))
        top, left, h, w = sample.windows[0].tolist()
        image = Image.open(rows.path(at % 12)).crop((left, top, left + w, top + h)).resize((64, 64), Image.BILINEAR)
        image = image.transpose(Image.FLIP_LEFT_RIGHT) if sample.flips[0] else image
        with torch.no_grad():
            want = flat_features(model, normalise(image)[None], ("feature4", "avg"), "adaptive")
        for tap, values in want.items():
            assert np.abs(made.features[tap][at] - values[0].numpy()).mean() < 0.02 * values.abs().mean(), (tap, at)
    assert not np.array_equal(made.features["avg"][:12], made.features["avg"][12:24])
    other = fastrot(*words, *SMALL, "data.scale=[0.4,0.9]", "--out", tmp_path / "f")
    assert other.code == 2 and "holds features of another passes" in other.err


@pytest.mark.parametrize("passes", [(), ("--passes", 3)], ids=["evaluation", "augmented"])
def test_a_block_size_changes_no_row_beyond_rounding(fastrot, images, checkpoint, tmp_path, passes):
    words = ("features", "--checkpoint", checkpoint, "--data", images, "--taps", "avg", *SMALL, *passes)
    for size in (2, 5):  # blocks of 5 straddle the passes
        assert fastrot(*words, f"engine.images_per_micro_step={size}", "--out", tmp_path / str(size)).code == 0
    two, five = (open_store(tmp_path / size).features["avg"] for size in "25")
    np.testing.assert_allclose(two, five, rtol=1e-4, atol=1e-5)


def start(launcher, *words):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "fastrot.cli", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.slow
def test_real_kills_and_two_ranks_change_no_byte(fastrot, checkpoint, tmp_path):
    images = write_folder(tmp_path / "images", classes=4, per_class=200)
    words = ["features", "--checkpoint", checkpoint, "--data", images, *SMALL, "--out"]
    assert fastrot(*words, tmp_path / "whole").code == 0
    two = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    for launcher in ((), two):
        process = start(launcher, *words, tmp_path / "killed")
        while process.poll() is None:
            if len(writing.finished_blocks(tmp_path / "killed", 2)) > (150 if launcher else 20):
                os.killpg(process.pid, signal.SIGKILL)
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        process.communicate()
    assert not (tmp_path / "killed" / "manifest.json").exists(), "both runs were to be killed"
    process = start(two, *words, tmp_path / "killed")
    assert process.communicate() and process.returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_the_manifest_names_what_was_computed_from_what(fastrot, images, checkpoint, tmp_path):
    words = ("features", "--checkpoint", checkpoint, "--data", images, "--taps", "avg", *SMALL, "--out", tmp_path / "f")
    assert fastrot(*words).code == 0
    facts = json.loads((tmp_path / "f" / "manifest.json").read_text())
    assert facts["content"] == Manifest.load(tmp_path / "f" / "rows").content
    assert facts["checkpoint"]["sha256"] == sha256_of(checkpoint)
    assert facts["files"]["avg.npy"]["sha256"] == sha256_of(tmp_path / "f" / "avg.npy")
    assert facts["pool"] == "adaptive" and facts["transform"] == "test" and facts["side"] == 64


def test_the_control_is_drawn_from_its_seed(fastrot, images, tmp_path):
    words = ("features", "--data", images, "--taps", "avg", *SMALL, "model.arch=resnet18")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert fastrot(*words, "--random-init", seed, "--out", tmp_path / out).code == 0
    a, b, c = (open_store(tmp_path / out).features["avg"] for out in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_half_precision_rounds_and_refuses_to_overflow(fastrot, images, checkpoint, tmp_path):
    words = ["features", "--data", images, "--taps", "avg", *SMALL, "--dtype", "float16"]
    assert fastrot(*words, "--checkpoint", checkpoint, "--out", tmp_path / "f").code == 0
    assert open_store(tmp_path / "f").features["avg"].dtype == np.float16
    state = backbone_state(build_model("resnet18", 4, 5))
    state["layer4.1.bn2.weight"] *= 1e6
    save_file(state, tmp_path / "large.safetensors")
    done = fastrot(*words, "--checkpoint", tmp_path / "large.safetensors", "--out", tmp_path / "g")
    assert done.code == 2 and "overflow float16; use --dtype float32" in done.err


def test_bfloat16_features_are_those_of_float32_rounded_and_probed_like_them(fastrot, images, checkpoint, tmp_path):
    words = ["features", "--data", images, "--taps", "avg", *SMALL, "--checkpoint", checkpoint]
    for dtype in ("float32", "bfloat16"):
        assert fastrot(*words, "--dtype", dtype, "--out", tmp_path / dtype).code == 0
    single, short = (open_store(tmp_path / dtype).features["avg"] for dtype in ("float32", "bfloat16"))
    want = torch.from_numpy(np.array(single)).bfloat16()
    assert torch.equal(torch.from_numpy(np.array(short, np.float32)), want.float())
    raw = np.load(tmp_path / "bfloat16" / "avg.npy")  # as a program without ml_dtypes reads it
    assert torch.equal(torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16), want)
    stores = ["--train", tmp_path / "bfloat16", "--test", tmp_path / "bfloat16", "--json"]
    assert fastrot("knn", *stores, "--k", "1").code == 0
    assert fastrot("linear", "--features", *stores[1:], "--epochs", "1").code == 0


def test_a_kill_while_the_store_is_laid_out_leaves_none_to_probe(fastrot, images, checkpoint, tmp_path, monkeypatch):
    """Neither before its plan is there, when all is laid out again, nor between the plan and the labels."""
    words = ["features", "--checkpoint", checkpoint, "--data", images, "--out", tmp_path / "f", "--taps", "avg", *SMALL]
    write, save = writing.write_text, np.save

    def killed(write, name):
        def wrapped(path, *rest, **options):
            if str(path).endswith(name):
                raise KeyboardInterrupt
            return write(path, *rest, **options)

        return wrapped

    for where, work, name in (("write_text", write, "plan.json"), ("np.save", save, "labels.npy")):
        with monkeypatch.context() as patch:
            patch.setattr(f"fastrot.features.write.{where}", killed(work, name))
            assert fastrot(*words).code == 130
        distributed.end()  # a killed process leaves its group
        with pytest.raises(UserError, match="no feature store|not all there"):
            open_store(tmp_path / "f")
    assert (tmp_path / "f" / "plan.json").exists()
    assert fastrot(*words).code == 0
    assert len(open_store(tmp_path / "f").labels)


def test_features_that_others_made_are_not_overwritten(fastrot, images, checkpoint, tmp_path):
    (tmp_path / "f").mkdir()
    np.save(tmp_path / "f" / "labels.npy", np.arange(3))
    done = fastrot(
        "features", "--checkpoint", checkpoint, "--data", images, "--out", tmp_path / "f", "--taps", "avg", *SMALL
    )
    assert done.code == 2 and "did not begin; name another folder" in done.errors[0]
    assert np.load(tmp_path / "f" / "labels.npy").tolist() == [0, 1, 2]


def test_what_a_user_may_get_wrong_is_one_line(fastrot, images, checkpoint, tmp_path):
    words = ["features", "--data", images, *SMALL]
    mine = [*words, "--checkpoint", checkpoint, "--taps", "avg", "--out", tmp_path / "f"]
    assert fastrot(*mine).code == 0
    cases = {
        "--taps 1,9: '9' is none": [*words, "--checkpoint", checkpoint, "--taps", "1,9", "--out", tmp_path / "x"],
        "--checkpoint C or --random-init": [*words, "--out", tmp_path / "x"],
        "no such file or folder": [*words, "--checkpoint", tmp_path / "none", "--out", tmp_path / "x"],
        "holds no backbone.safetensors": [*words, "--checkpoint", tmp_path, "--out", tmp_path / "x"],
        "holds features of another pool": [*mine, "--pool", "gap"],
        "pool specified is for images of 224": [*mine[:-1], tmp_path / "x", "--pool", "specified", "--taps", "5"],
        "cannot be written": [*mine[:-1], checkpoint / "below"],
        "--passes 0: must be 1 or more": [*mine, "--passes", "0"],
        "--passes: --transform svm shows every image whole": [*mine, "--passes", "2", "--transform", "svm"],
        "holds features of another passes": [*mine, "--passes", "2"],
    }
    for line, command in cases.items():
        done = fastrot(*command)
        assert done.code == 2 and len(done.errors) == 1 and line in done.errors[0], (line, done.err)
    (tmp_path / "f" / "manifest.json").rename(tmp_path / "f" / "plan.json")
    with pytest.raises(UserError, match="not all there; run the same fastrot features again"):
        open_store(tmp_path / "f")


def test_an_image_that_broke_since_is_no_other_images_features(fastrot, checkpoint, tmp_path):
    images = write_folder(tmp_path / "images")
    words = [
        "features",
        "--checkpoint",
        checkpoint,
        "--data",
        f"list:{tmp_path / 'list'}",
        *SMALL,
        "--out",
        tmp_path / "f",
    ]
    (tmp_path / "list").write_text("".join(f"{p}\t0\n" for p in sorted(images.rglob("*.jpg"))))
    broken = images / "class1" / "2.jpg"
    data = bytearray(broken.read_bytes())
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16  # a Huffman code that cannot be: its header is sound
    broken.write_bytes(data)
    done = fastrot(*words)
    distributed.end()
    assert done.code == 3 and "unreadable images, more than data.max_bad 0" in done.err


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        lambda store, record: record.write_text("[]"),
        lambda store, record: record.write_text("{"),
        lambda store, record: (store / "avg.npy").unlink(),
        lambda store, record: (store / "avg.npy").write_bytes(b"short"),
    ],
)
def test_a_damaged_store_is_one_line_and_never_all_there(fastrot, images, checkpoint, tmp_path, damage, finished):
    store = tmp_path / "f"
    words = ["features", "--data", images, *SMALL, "--checkpoint", checkpoint, "--taps", "avg", "--out", store]
    assert fastrot(*words).code == 0
    record = store / "manifest.json"
    if not finished:
        facts = json.loads(record.read_text())
        del facts["files"]
        record.unlink()
        record = store / "plan.json"
        record.write_text(json.dumps(facts))
    damage(store, record)
    done = fastrot(*words)
    assert done.code == 2 and len(done.errors) == 1, done.err
