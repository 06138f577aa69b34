"""`fastrot orient` against the network called by hand, with torch and without; and what it says of bad input."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires

import numpy as np
import pytest
import torch
from PIL import Image
from places import state
from torchvision.transforms import v2

import compass
from conftest import ROOT
from fastrot.errors import EXTRAS
from fastrot.models.resnet import build_model
from fastrot.orient import answers, sheet
from fastrot.orient.answers import combined
from fastrot.orient.looking import Source
from fastrot.orient.network import SHOWS, TRUST, open_network
from fastrot.orient.tally import Tally
from fastrot.probes.progress import silent
from trained import write_run

pytestmark = pytest.mark.usefixtures("narrow")
SIDE, SHORT = 32, 40
WORDS = [f"data.crop={SIDE}", "data.train=photos"]
FITS = {"crop": [v2.Resize(SHORT), v2.CenterCrop(SIDE)], "squash": [v2.Resize((SIDE, SIDE))]}
PHOTOS = {"a/0.jpg": 0, "a/1.jpg": 1, "b/2.png": 2, "b/deep/3.jpg": 3, "b/no up.jpg": None, "top <&> .jpg": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = compass.write(tmp_path_factory.mktemp("photos"), PHOTOS)
    (folder / "a" / "broken.jpg").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def model(narrow):
    """A ResNet that nobody trained, but whose head is drawn large, so that it is sure of something."""
    network = build_model("resnet18", 4, 0)
    torch.nn.init.normal_(network.fc.weight, 0, 0.5, generator=torch.Generator().manual_seed(0))
    return network.eval()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    more = [*WORDS, f"data.resize={SHORT}"]
    return write_run(tmp_path_factory.mktemp("runs") / "orient", model, {"data": "c0ffee"}, more)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    return compass.write_onnx(tmp_path_factory.mktemp("onnx") / "compass.onnx")


@torch.no_grad()
def by_hand(model, path, fit):
    """Probabilities of the four turns as anyone would write it: torchvision, four turns, softmax."""
    transform = v2.Compose([
        *FITS[fit], v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    x = transform(Image.open(path).convert("RGB"))
    total = torch.zeros(4)
    for shown in range(4):
        said = model(x.rot90(shown, (1, 2))[None])[0].log_softmax(0)
        total += said.roll(-shown)
    return (total / 4).softmax(0).numpy()


@pytest.mark.parametrize("fit", FITS)
def test_a_runs_answers_are_its_networks_as_anyone_would_ask_it(fastrot, fit, run, model, photos, tmp_path):
    out = tmp_path / "found.jsonl"
    if fit == "squash":
        run = write_run(tmp_path / "run", model, {}, [*WORDS, "data.fit=squash"])
    done = fastrot("orient", photos, "--checkpoint", run, "--out", out, "--json")
    found = list(answers.read(out))
    assert [one.file for one in found] == [str(photos / name) for name in sorted(PHOTOS)]
    for one in found:  # torchvision resizes in two steps of rounding, which is a level here and there
        assert np.allclose(one.probabilities, by_hand(model, one.file, fit), rtol=0, atol=0.03), one
    assert len({one.clockwise for one in found}) > 1
    counts = done.json
    assert (counts["images"], counts["unreadable"], counts["by_class"]["a"]["images"]) == (7, 1, 3)
    assert counts["undecided"] == sum(not one.decided for one in found)
    assert "nobody calibrated it: what is less sure than 0.5 stays undecided" in done.err
    assert {path.name for path in tmp_path.iterdir()} - {"run"} == {"found.html", "found.jsonl"}
    line = json.loads(out.read_text().splitlines()[0])
    assert line == {"file": str(photos / "a/broken.jpg"), "class": "a", "unreadable": "not an image that Pillow knows"}


def test_a_real_network_turns_its_answer_with_the_image(run):
    """To float error: a view stands elsewhere in the batch then; the combination itself is exact (test_answers)."""
    network = open_network(str(run))
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    found = combined(network.logits(pixels))
    for turn in range(4):
        of_turned = combined(network.logits(np.ascontiguousarray(np.rot90(pixels, turn, (1, 2)))))
        assert np.allclose(of_turned, np.roll(found, turn, 1), rtol=0, atol=1e-5)


def test_a_runs_calibration_is_used(fastrot, run, photos, tmp_path):
    weights = open_network(str(run)).weights
    said = {"temperature": 3.0, "threshold": 0.31, "measured": {"images": 10}, "weights": weights}
    (run / TRUST).write_text(json.dumps(said))
    try:
        trust = open_network(str(run)).trust
        done = fastrot("orient", photos, "--checkpoint", run, "--json")
        (run / TRUST).write_text('{"temperature": -1}')
        bad = fastrot("orient", photos, "--checkpoint", run)
    finally:
        (run / TRUST).unlink()
    assert vars(trust) == said and "calibrated" not in done.err
    assert bad.code == 2 and len(bad.errors) == 1 and TRUST in bad.errors[0]


def test_an_onnx_file_is_run_by_what_the_docs_install(onnx_file, photos, tmp_path):
    """In a process that has none of our other dependencies; torch not at all."""
    (installed,) = re.findall(r"^pip install ([a-z0-9 ]+)$", (ROOT / "docs/upright.md").read_text(), re.MULTILINE)
    asked = {re.split(r"[^\w-]", one)[0] for one in requires("fastrot")}
    module = {"pillow": "PIL", "pyyaml": "yaml"}
    lacking = sorted(module.get(name, name) for name in {*asked, *EXTRAS} - {*installed.split()})
    assert {"torch", "torchvision", "safetensors"} <= {*lacking}
    out = tmp_path / "found.jsonl"
    words = ["orient", str(photos), "--checkpoint", str(onnx_file), "--out", str(out), "--json"]
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking!r})); "
    code += f"from fastrot.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["turned"] == {"90": 2, "180": 1, "270": 1} and (counts["upright"], counts["undecided"]) == (1, 1)
    assert counts["tags"] == {"right": 0, "wrong": 0, "missing": 4, "none": 1}
    for one in answers.read(out):
        turn = PHOTOS[os.path.relpath(one.file, photos)]
        assert one.decided == (turn is not None) and (not one.decided or one.clockwise == 90 * turn)


def test_an_onnx_files_logits_are_those_of_its_views(onnx_file):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    x = (pixels / 255 - 0.5) / 0.25
    views = np.stack([np.rot90(x, turn, (1, 2)) for turn in range(4)], 1)  # [n, 4, S, S, 3]
    sides = views[..., :16, :, :], views[..., :16, :], views[..., 16:, :, :], views[..., 16:, :]
    expected = 12 / 32**2 * np.stack([side.sum((2, 3, 4)) for side in sides], 2)
    assert np.allclose(open_network(str(onnx_file)).logits(pixels), expected, rtol=0, atol=1e-4)


def test_the_sheet_shows_the_doubtful_first_and_needs_no_other_file(fastrot, onnx_file, photos, tmp_path):
    done = fastrot("orient", photos, "--checkpoint", onnx_file, "--out", tmp_path / "o.jsonl")
    page = (tmp_path / "o.html").read_text()
    assert done.code == 0 and "turn 90" in done.out and re.search(r"all +│ 7 +│ 1 +│ 2 +│ 1 +│ 1 +│ 1 +│ 1 ", done.out)
    names = re.findall(r"<br>(.*?)</figcaption>", page)
    assert html.unescape(names[0]) == "b/no up.jpg" and len(names) == 5
    assert set(map(html.unescape, names[1:])) == {"a/1.jpg", "b/2.png", "b/deep/3.jpg", "top <&> .jpg"}
    assert page.count('src="data:image/jpeg;base64,') == page.count("<img") == 10
    assert "a/broken.jpg: not an image that Pillow knows" in page and not re.search(r"(src|href)=\"(?!data:)", page)


def test_the_sheet_keeps_the_least_sure_of_many(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "_MOST", 3)
    source, tally = Source.open(str(photos), silent), Tally()
    made = sheet.Sheet(source)
    for number in np.random.default_rng(0).permutation(40):  # odd ones undecided, all as if of the first file
        p = 0.3 + 0.01 * number
        least = 1.0 if number % 2 else 0.0
        one = answers.answer(source.file(0), 0, None, 1, np.log([(1 - p) / 3, p, (1 - p) / 3, (1 - p) / 3]), least)
        made.add(one)
        tally.add(one)
    made.save(tmp_path / "o.html", tally, "a network")
    page = (tmp_path / "o.html").read_text()
    assert re.findall(r"<figcaption>(\d+)%", page) == ["31", "33", "35", "30", "32", "34"]
    assert page.count("Undecided: 20") == page.count("To be turned: 20") == 1


def test_without_out_nothing_is_written(fastrot, onnx_file, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fastrot("orient", photos, "--checkpoint", onnx_file).code == 0
    assert not list(tmp_path.iterdir())


def upright(done) -> list[int]:
    """How many are upright, have to be turned, and have no up."""
    said = done.json
    return [said["upright"], sum(said["turned"].values()), said["undecided"]]


@pytest.mark.slow  # docs/upright.md does so too
def test_photographs_are_put_upright_and_given_back(fastrot, onnx_file, photos, tmp_path):
    def orient(source, *more):
        done = fastrot("orient", source, "--checkpoint", onnx_file, "--json", *more)
        assert done.code == 0, done.err
        return done

    source, words = tmp_path / "photos", ("--min-confidence", "0.6")
    shutil.copytree(photos, source)
    before = state(source)
    copied = orient(source, *words, "--apply", f"copy:{tmp_path}/out")
    count = upright(copied)
    assert count[1] and count[2] and copied.json["applied"]["counts"]["turned"] == count[1] and state(source) == before
    done = orient(source, *words, "--apply", "lossless", "--in-place", "--journal", tmp_path / "j.jsonl").json[
        "applied"
    ]
    assert done["counts"]["turned"] == count[1] and state(source) != before
    assert upright(orient(source, *words)) == [count[0] + count[1], 0, count[2]]
    assert fastrot("orient", "--undo", tmp_path / "j.jsonl", "--json").json["given_back"] == count[1]
    refused(fastrot("orient", "--undo", tmp_path / "j.jsonl"), "no such journal")
    refused(fastrot("orient", source), "name SOURCE and --checkpoint, or --undo JOURNAL alone")
    refused(fastrot("orient", source, "--checkpoint", onnx_file, "--apply", "exif"), "add --in-place")
    refused(fastrot("orient", source, "--checkpoint", onnx_file, "--trim"), "are for --apply")
    assert state(source) == before


def refused(done, *says):
    assert done.code == 2 and len(done.errors) == 1, done.err
    assert all(say in done.errors[0] for say in says), done.errors


def test_bad_input_gets_one_line(fastrot, run, onnx_file, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()

    def orient(source=photos, checkpoint=onnx_file, *more):
        return fastrot("orient", source, "--checkpoint", checkpoint, *more)

    refused(orient(tmp_path / "empty"), f"{tmp_path}/empty: holds no image")
    refused(orient(tmp_path / "none"), f"{tmp_path}/none: no such folder")
    refused(orient(photos, tmp_path / "none"), "no such folder; name a run folder of fastrot train")
    refused(orient(photos, tmp_path / "none.onnx"), "no such file")
    refused(orient(photos, photos), "is no run's")
    refused(orient(photos, onnx_file, "--min-confidence", "1.5"), "--min-confidence 1.5: must be 0 to 1")
    refused(orient(photos, onnx_file, "--out", tmp_path / "found.txt"), "expected a name ending in .jsonl")
    refused(orient(photos, onnx_file, "--out", tmp_path / "no" / "o.jsonl"), "o.jsonl: cannot be written (No such file")
    refused(orient(photos, onnx_file, "--out", tmp_path / "file" / "o.jsonl"), "cannot be written (Not a directory)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_networks_that_learnt_something_else_are_refused(fastrot, photos, tmp_path):
    other = build_model("resnet18", 10, 0)
    runs = {
        "ten": (write_run(tmp_path / "ten", other, {}, WORDS), "tells 10 classes apart, not the four turns"),
        "tuned": (
            write_run(tmp_path / "tuned", build_model("resnet18", 4, 0), {"backbone": "c0ffee"}, WORDS),
            "is of no run of fastrot train",
        ),
        "heads": (write_run(tmp_path / "heads", torch.nn.Linear(2, 4), {"backbone": "c0ffee"}, WORDS), "is of no run"),
    }
    files = {
        "plain": (compass.write_onnx(tmp_path / "plain.onnx", props={}), "no rotation network of fastrot's"),
        "many": (compass.write_onnx(tmp_path / "many.onnx", classes=10), "tells 10 classes apart"),
        "odd": (compass.write_onnx(tmp_path / "odd.onnx", props={SHOWS: "{}"}), "its metadata cannot be read"),
    }
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    files["garbage"] = tmp_path / "garbage.onnx", "no ONNX file that can be run"
    for checkpoint, says in (runs | files).values():
        refused(fastrot("orient", photos, "--checkpoint", checkpoint), says)
