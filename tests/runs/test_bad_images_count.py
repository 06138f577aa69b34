"""Images replaced while running: said on the console, counted in every line, the table and STATUS.json."""

import json

import pytest

from conftest import metrics, write_folder

pytestmark = pytest.mark.usefixtures("narrow")

SMALL = ["model.arch=resnet18", "engine.kind=plain", "data.crop=16", "optim.images_per_step=6", "optim.lr=0.05",
         "optim.epochs=2", "optim.warmup_epochs=0", "run.log_every=1", "run.tensorboard=false", "data.max_bad=5"]  # fmt: skip


def test_replaced_images_are_counted_wherever_a_person_looks(tmp_path, fastrot):
    source, out = write_folder(tmp_path / "d", classes=2, per_class=6), tmp_path / "r"
    words = ["train", *SMALL, f"data.train={source}", f"data.val={source}", f"run.out={out}"]
    assert fastrot(*words, "run.max_steps=1").code == 0
    assert [line["bad_images"] for line in metrics(out) if "loss" in line] == [0]
    for name in ("class0/1.jpg", "class1/2.jpg"):
        path = source / name
        path.write_bytes(b"\0" * path.stat().st_size)
    done = fastrot(*words, "--resume-anyway", "data.files")
    assert done.code == 0, done.err
    counts = [line["bad_images"] for line in metrics(out) if "loss" in line]
    assert counts == sorted(counts) and counts[-1] == 2, "though they are met among the held-out images too"
    status = json.loads((out / "STATUS.json").read_text())
    assert status["state"] == "done" and status["bad_images"] == len(
        (out / "bad_images.jsonl").read_text().splitlines()
    )
    assert f"so far, in {out}/bad_images.jsonl" in done.err
    assert f"bad images {counts[-1]}" in done.err and "images replaced" in done.err
