"""Calibration from a folder to what the run's folder holds; its figures against the logits themselves."""

import json

import numpy as np
import pytest
from PIL import Image

import compass
import rotated
from fastrot.demo import no_up
from fastrot.orient import calibrate as calibrating
from fastrot.orient.network import TRUST, RunNetwork, Trust

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def run(narrow, tmp_path_factory):
    return rotated.write_run(tmp_path_factory.mktemp("runs") / "up", rotated.network())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return compass.write(tmp_path_factory.mktemp("photos"), {f"{at}.jpg": 0 for at in range(220)})


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walls")
    no_up.write(folder, 100, seed=3, side=40)
    return folder


def test_what_was_found_is_kept_and_orient_and_the_page_have_it(fastrot, run, photos, walls, monkeypatch):
    def logits(self, pixels):
        return compass.Compass().logits(pixels) / 8

    monkeypatch.setattr(RunNetwork, "logits", logits)
    words = ("orient", photos, "--checkpoint", run, "--calibrate", "--without-up", walls, "--also", photos, "--json")
    done = fastrot(*words).json
    kept = json.loads((run / TRUST).read_text())
    assert kept["measured"] == done["measured"] and kept["temperature"] == done["temperature"] < 1
    held_out = kept["measured"]["held_out"]
    assert held_out["accuracy"] == 1 and held_out["images"] == 220 and held_out["source"] == str(photos)
    assert held_out["calibration_error"][1] < held_out["calibration_error"][0]
    assert held_out["without_up"]["pictures"] == 100 and kept["measured"]["elsewhere"]["risk"]["1.0"] == 0
    assert RunNetwork(str(run)).trust.threshold == kept["threshold"] < 1 and held_out["decided"] > 0.9
    page = (run / "calibration.html").read_text()
    assert all(said in page for said in ("Reliability", "Risk", str(walls), f"{kept['temperature']:.4g}", "Wilson"))
    assert "http" not in page.replace("http://www.w3.org", "")
    assert fastrot("orient", photos, "--checkpoint", run, "--json").code == 0
    assert not list(run.glob(".tmp*"))


@pytest.mark.parametrize(
    "count, more, says",
    [
        (0, (), "holds no image"),
        (99, (), "99 images are too few to calibrate on; name at least 100"),
        (1, ("--out", "a.jsonl"), "--calibrate: takes no --out"),
    ],
)
def test_too_little_to_calibrate_on_is_refused(fastrot, run, tmp_path, count, more, says):
    source = compass.write(tmp_path, {f"{at}.jpg": 0 for at in range(count)})
    done = fastrot("orient", source, "--checkpoint", run, "--calibrate", *more)
    assert done.code == 2 and len(done.errors) == 1 and says in done.errors[0], done.err


def test_what_is_for_calibration_needs_it_and_a_file_has_none(fastrot, run, photos, tmp_path):
    done = fastrot("orient", photos, "--checkpoint", run, "--without-up", photos)
    assert done.code == 2 and "are for --calibrate" in done.errors[0]
    done = fastrot("orient", photos, "--checkpoint", tmp_path / "up.onnx", "--calibrate")
    assert done.code == 2 and "calibrate the run, and export it again" in done.errors[0]


def test_a_calibration_of_another_checkpoint_is_refused_until_it_is_made_anew(fastrot, photos, tmp_path):
    run = rotated.write_run(tmp_path / "run", rotated.network(seed=5))
    (run / TRUST).write_text(Trust(2.0, 0.9, {}, "0" * 64).to_json())
    done = fastrot("orient", photos, "--checkpoint", run)
    assert done.code == 2 and len(done.errors) == 1 and "is of another checkpoint's weights" in done.errors[0]
    assert fastrot("orient", photos, "--checkpoint", run, "--calibrate").code == 0
    assert fastrot("orient", photos, "--checkpoint", run).code == 0


def test_a_temperature_at_the_end_and_a_threshold_that_nothing_reaches_are_said():
    chosen = calibrating.trust.Chosen
    assert len(calibrating.remarks(chosen(1.3, 0.9))) == 1
    assert "end of what is tried" in calibrating.remarks(chosen(20.0, 0.9))[1]
    assert "all images stay undecided" in calibrating.remarks(chosen(1.3, 1.0))[1]


def test_pictures_without_an_up_are_a_seeds_and_stand_in_no_turn():
    drawn = [np.asarray(no_up.draw(at, 7, 32), np.float64) for at in range(40)]
    assert all((np.asarray(no_up.draw(at, 7, 32)) == drawn[at]).all() for at in range(4))
    assert not (np.asarray(no_up.draw(0, 8, 32)) == drawn[0]).all()
    light = np.mean([pixels.mean(2) - pixels.mean() for pixels in drawn], 0)
    top_less_bottom, left_less_right = (
        light[:16].mean() - light[16:].mean(),
        light[:, :16].mean() - light[:, 16:].mean(),
    )
    spread = np.std([pixels[:16].mean() - pixels[16:].mean() for pixels in drawn]) / len(drawn) ** 0.5
    assert abs(top_less_bottom) < 4 * spread and abs(left_less_right) < 4 * spread
    assert isinstance(no_up.draw(1, 0), Image.Image)
