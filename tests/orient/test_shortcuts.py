"""`fastrot shortcuts` against a network whose one cue is known: where it is bright."""

import numpy as np
import pytest
from scipy import stats
from test_orient import refused

import compass
from fastrot.config import Data
from fastrot.data.index import in_cache
from fastrot.data.manifest import Manifest
from fastrot.orient import cues, shortcuts

N = 12


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return compass.write(tmp_path_factory.mktemp("upright"), {f"{i:02}.jpg": 0 for i in range(N)})


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    return compass.write_onnx(tmp_path_factory.mktemp("onnx") / "compass.onnx")


def by_cue(rows):
    return {(row["cue"], row["does"]): row for row in rows}


def test_a_network_that_goes_by_light_is_found_out(fastrot, onnx_file, photos, tmp_path):
    page = tmp_path / "found.html"
    done = fastrot("shortcuts", "--checkpoint", onnx_file, "--data", photos, "--out", page, "--json")
    assert done.code == 0, done.err
    assert (done.json["images"], done.json["accuracy"], done.json["combined"]) == (N, 1.0, 1.0)
    for (cue, does), row in by_cue(done.json["taken"]).items():
        if cue != "light from above":
            assert (row["accuracy"], row["kept"], row["change"]) == (1.0, 1.0, 0.0), (cue, does)
        else:
            assert row["accuracy"] < 0.6 and row["change_high"] < -0.3 and row["kept"] < 0.5
        assert row["low"] <= row["accuracy"] <= row["high"]
    assert (
        "Cues planted" in page.read_text()
        and page.read_text().count("data:image/png") == len(cues.PLANTED) + len(cues.TAKEN) + 1
    )


def test_what_is_planted_is_followed_by_who_goes_by_it_and_by_no_other(tmp_path):
    """Gray squares with no up: a compass follows light from above, and neither fringes nor JPEGs."""
    gray = compass.write(tmp_path / "gray", {f"{i:02}.png": None for i in range(24)})
    manifest = Manifest.load(in_cache(f"images:{gray}", Data().max_pixels, "SOURCE"))
    rows = np.arange(24)
    found = {row.cue: row for row in shortcuts.measured(compass.Compass(), manifest, rows).planted}
    assert found["light from above"].accuracy == 1.0 and found["border"].accuracy > 0.9
    for cue in ("colour fringes", "chroma siting", "resampling"):
        assert found[cue].accuracy < 0.5 and found[cue].change_low <= 0.1 and found[cue].kept is None


@pytest.mark.parametrize("cue", [*cues.TAKEN, *cues.PLANTED], ids=lambda cue: cue.does)
def test_each_cue_changes_a_crop_and_keeps_its_shape(cue):
    crop = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    changed = cue.act(crop, np.random.default_rng(1))
    assert changed.shape == crop.shape and changed.dtype == np.uint8
    assert (changed != crop).any() == (cue.act is not cues.same)
    np.testing.assert_array_equal(changed, cue.act(crop, np.random.default_rng(1)))


def test_taken_from_images_that_tell_no_turn_a_cue_leaves_no_trace():
    """What is done lies in a frame of its own: over crops any way up, each change is as likely any way up."""
    crop = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    rows = np.arange(64)
    quarters = shortcuts.philox(0, rows, 0, shortcuts.TURN)[:, 0] >> 30
    assert np.bincount(quarters, minlength=4).min() > 8
    cue = cues.Cue("", "", lambda c, rng: cues.PLANTED[5].act(c, rng))  # a bar at the bottom
    changed = list(shortcuts._changed([crop] * 64, rows, cue, planted=False))
    black = np.array(
        [[(c[-4:] == 0).all(), (c[:, :4] == 0).all(), (c[:4] == 0).all(), (c[:, -4:] == 0).all()] for c in changed]
    )
    assert (black.sum(1) == 1).all() and black.sum(0).min() > 8


def test_a_bootstrapped_interval_is_near_the_normal_one():
    values = np.random.default_rng(0).integers(0, 5, 500) / 4
    low, high = shortcuts.interval(values)
    want = stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / np.sqrt(500))
    np.testing.assert_allclose((low, high), want, atol=0.004)


def test_bad_input_is_one_line(fastrot, photos, onnx_file, tmp_path):
    def call(checkpoint, data, *more):
        return fastrot("shortcuts", "--checkpoint", checkpoint, "--data", data, *more)

    (tmp_path / "empty").mkdir()
    (tmp_path / "text.onnx").write_text("no network")
    one = compass.write(tmp_path / "one", {"0.jpg": 0})
    refused(call(tmp_path / "none", photos), "no such folder; name a run folder of fastrot train")
    refused(call(tmp_path / "none.onnx", photos), "no such file")
    refused(call(tmp_path / "text.onnx", photos), "no ONNX file that can be run")
    refused(call(photos, photos), "is no run's")
    refused(call(onnx_file, tmp_path / "empty"), f"{tmp_path}/empty: holds no image")
    refused(call(onnx_file, one), "holds one image")
    refused(call(onnx_file, photos, "--images", "1"), "--images 1: must be at least 2")
    refused(call(onnx_file, photos, "--out", tmp_path / "f.txt"), "expected a name ending in .html")
    refused(call(onnx_file, photos, "--out", tmp_path / "no" / "f.html"), "f.html: cannot be written")


def test_an_image_that_goes_while_it_is_measured_is_named(tmp_path):
    source = compass.write(tmp_path / "e", {"0.jpg": 0, "1.jpg": 0})
    found = Manifest.load(in_cache(f"images:{source}", Data().max_pixels, "SOURCE"))
    (source / "1.jpg").unlink()
    with pytest.raises(shortcuts.UserError, match=r"1\.jpg: cannot be read"):
        shortcuts.measured(compass.Compass(), found, np.arange(2))
