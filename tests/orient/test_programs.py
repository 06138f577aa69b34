"""Programs against torch: the same numbers for any number of views, in onnxruntime and in torch.export's own."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from fastrot.files import sha256_of
from fastrot.models.resnet import backbone_state
from fastrot.orient.export import OPSET, export
from fastrot.orient.network import SHOWS, TRUST, OnnxNetwork, RunNetwork, Trust
from rotated import network, write_run

pytestmark = pytest.mark.usefixtures("narrow")
STATED = {"held_out": {
    "source": "kept/", "images": 800, "accuracy": 0.905, "calibration_error": [0.0712, 0.0113], "decided": 0.62,
    "wrong_of_decided": 0.0081, "risk": {"0.5": 0.004, "1.0": 0.095},
    "without_up": {"source": "walls/", "pictures": 200, "answered": 0.045},
}}  # fmt: skip


@pytest.fixture(scope="module")
def model(narrow):
    return network()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    root = write_run(tmp_path_factory.mktemp("runs") / "up", model)
    weights = sha256_of(root / "checkpoints" / "step-00000002" / "model.safetensors")
    (root / TRUST).write_text(Trust(1.7, 0.87, STATED, weights).to_json())
    return root


@pytest.fixture(scope="module")
def views():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def onnx_file(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "up.onnx"
    done = export(str(run), "onnx", str(out), head=True)
    assert (done["opset"], done["output"], done["size"]) == (OPSET, "logits", 32)
    return out


@pytest.fixture(scope="module")
def pt2_file(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "up.pt2"
    assert export(str(run), "pt2", str(out), head=True)["opset"] is None
    return out


@pytest.mark.slow  # ONNX takes seconds to write
def test_onnx_with_its_head_says_what_torch_says(model, onnx_file, views):
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        want = model(views).numpy()
    assert np.ptp(want) > 1
    for n in (1, 2, 5):
        (got,) = session.run(["logits"], {"views": views[:n].numpy()})
        np.testing.assert_allclose(got, want[:n], rtol=0, atol=1e-4)
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known[SHOWS])["size"] == 32 and json.loads(known[TRUST])["threshold"] == 0.87
    assert "quarter turns counter-clockwise" in known["fastrot.classes"]
    import onnx

    program = onnx.load(onnx_file)
    assert {one.version for one in program.opset_import if one.domain == ""} == {OPSET}
    onnx.checker.check_model(program)


@pytest.mark.slow
def test_orient_takes_the_file_for_the_run(run, onnx_file):
    file, folder = OnnxNetwork(onnx_file), RunNetwork(str(run))
    assert file.shows == folder.shows and file.trust == folder.trust
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(file.logits(pixels), folder.logits(pixels), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch's own, of how it reads
def test_a_pt2_program_says_what_torch_says(model, pt2_file, views):
    facts = {"facts.json": ""}
    program = torch.export.load(pt2_file, extra_files=facts).module()
    for n in (1, 5):
        torch.testing.assert_close(program(views[:n]), model(views[:n]), rtol=0, atol=1e-4)
    assert json.loads(json.loads(facts["facts.json"])[SHOWS])["fit"] == "squash"


@pytest.mark.slow
def test_a_backbone_of_unknown_training_claims_nothing(fastrot, model, views, tmp_path):
    save_file(backbone_state(model), tmp_path / "theirs.safetensors")
    out = tmp_path / "theirs.onnx"
    words = ("export", "--checkpoint", tmp_path / "theirs.safetensors", "--to", "onnx", "--out", out, "--json")
    assert fastrot(*words).json["output"] == "features"
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    big = torch.nn.functional.interpolate(views, (224, 224))
    model.fc, head = torch.nn.Identity(), model.fc
    with torch.no_grad():
        want = model(big).numpy()
    model.fc = head
    np.testing.assert_allclose(session.run(["features"], {"views": big.numpy()})[0], want, rtol=0, atol=1e-4)
    assert SHOWS not in session.get_modelmeta().custom_metadata_map
    card = out.with_suffix(".md").read_text()
    assert "is not known" in card and "Which way is up" not in card and "of unknown training" in card


def test_the_card_says_what_was_measured(pt2_file):
    card = pt2_file.with_suffix(".md").read_text()
    said = ("pretrained by predicting image rotations", "the whole image resized to it", "75.0 % (chance 25 %)",
            "800 of `kept/`", "90.5 %", "0.071, 0.011", "62.0 %", "0.8 %", "0.4 %, 9.5 %", "divided by 1.7", "of 0.87",
            "200 pictures without an up (`walls/`) 4.5 %", "photographs", "c0ffee")  # fmt: skip
    assert [one for one in said if one not in card] == []


@pytest.mark.slow
def test_a_card_of_a_run_that_nobody_calibrated_says_so(fastrot, model, tmp_path):
    run = write_run(tmp_path / "run", model)
    assert fastrot("export", "--checkpoint", run, "--to", "pt2", "--head", "--out", tmp_path / "up.pt2").code == 0
    assert "Not calibrated" in (tmp_path / "up.md").read_text()


@pytest.mark.parametrize(
    "words, says",
    [
        (["--to", "onnx", "--out", "up.pt2"], "--out up.pt2: expected a name ending in .onnx"),
        (["--to", "torchscript", "--out", "up.pt"], "invalid choice: 'torchscript'"),
        (["--to", "timm", "--head", "--out", "up.pth"], "--head: timm reads backbones alone"),
        (["--to", "pt2", "--head", "--out", "none/up.pt2"], "--out none/up.pt2: cannot be written"),
    ],
)
def test_wrong_words_are_refused(fastrot, run, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    done = fastrot("export", "--checkpoint", run, *words)
    assert done.code == 2 and says in done.err and not any(tmp_path.iterdir())


def test_a_run_without_a_rotation_head_is_refused(fastrot, model, tmp_path):
    tuned = write_run(tmp_path / "tuned", model, defining={"backbone": "0" * 64})
    wide = write_run(tmp_path / "wide", network(classes=7))
    for run, says in ((tuned, "of no run of fastrot train"), (wide, "tells 7 classes apart")):
        done = fastrot("export", "--checkpoint", run, "--to", "onnx", "--head", "--out", tmp_path / "up.onnx")
        assert done.code == 2 and len(done.errors) == 1 and says in done.errors[0]


def test_without_onnx_installed_the_extra_is_named(fastrot, run, tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = fastrot("export", "--checkpoint", run, "--to", "onnx", "--head", "--out", tmp_path / "up.onnx")
    assert done.code == 2 and "pip install 'fastrot[onnx]'" in done.errors[0]


def test_a_calibration_of_other_weights_is_refused(fastrot, model, run, tmp_path):
    other = write_run(tmp_path / "other", network(seed=2))
    (other / TRUST).write_bytes((run / TRUST).read_bytes())
    done = fastrot("export", "--checkpoint", other, "--to", "pt2", "--head", "--out", tmp_path / "up.pt2")
    assert done.code == 2 and "is of another checkpoint's weights" in done.errors[0]
